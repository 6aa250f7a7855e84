"""Prompts whose logprobs are told, in the scheduler: against the toy model of `scheduler_fixtures.py`."""

from __future__ import annotations

import pytest

from tests.worker.scheduler_fixtures import Run, check_told, generate
from warmroute_worker.messages import Generate, Sampling


def asking(rid: str, length: int, first: int, new: int = 2, start: int = 0) -> Generate:
    sampling = Sampling(logprobs=0, prompt_logprobs_from=first)
    return generate(rid, length, new, start, ignore_eos=True, sampling=sampling)


def test_what_is_told_does_not_come_from_the_cache() -> None:
    run = Run()
    run.scheduler.add(generate("before", 30, new=1))
    run.finish()
    for first, cached in ((1, 0), (4, 0), (5, 4), (6, 4), (17, 16), (28, 24), (29, 28), (30, 28), (31, 28)):
        message = asking(str(first), 30, first)
        run.scheduler.add(message)
        assert run.scheduler.load().waiting_uncached_tokens == 30 - cached
        run.finish()
        check_told(run, message)
        assert run.rows[str(first)][0].cached_tokens == cached, first


def test_siblings_wait_for_a_prompt_that_is_told() -> None:
    run = Run(chunked_prefill_size=8)
    run.scheduler.add(asking("told", 21, 1))
    run.scheduler.add(generate("sibling", 21, 2))
    run.finish()
    assert [run.rows[rid][0].cached_tokens for rid in ("told", "sibling")] == [0, 20]


@pytest.mark.parametrize("chunk", [-1, 64])
def test_a_step_tells_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Over all requests, the oldest first; what stands before and what is not told goes on in the same step."""
    monkeypatch.setattr("warmroute_worker.scheduler.scheduler.MOST_TOLD", 8)
    run = Run(chunked_prefill_size=chunk)
    messages = [asking("a", 20, 1), asking("b", 20, 11, start=7), generate("plain", 9, 1, start=3)]
    for message in messages:
        run.scheduler.add(message)
    first = run.step()
    assert first.lengths.tolist() == [8, 10, 9]
    run.finish()
    assert [len(plan.told) for plan in run.plans if len(plan.told)] == [8, 8, 8, 4]
    for message in messages:
        check_told(run, message)


def test_who_is_retracted_tells_the_rest_and_nothing_twice() -> None:
    run = Run(chunked_prefill_size=8)
    message = asking("a", 40, 5)
    run.scheduler.add(message)
    run.step()
    run.step()
    run.scheduler.retract_all()
    run.finish()
    check_told(run, message)
    told = sum(len(plan.told) for plan in run.plans)
    assert told == 35
    assert run.plans[2].starts.tolist() == [16], "what was told before comes from the cache"


def test_what_is_told_for_one_who_left_is_nobodys() -> None:
    """Two plans under way: the second tells for two requests, of which the first is retracted before that."""
    run = Run(chunked_prefill_size=16, depth=2)
    messages = [asking("a", 20, 1), asking("b", 20, 1, start=3)]
    for message in messages:
        run.scheduler.add(message)
    run.step()
    assert run.under_way[0].lengths.tolist() == [4, 12]
    run.scheduler._retract(run.scheduler._running[0])
    run.finish()
    for message in messages:
        check_told(run, message)
