"""The scheduler without torch, against the toy model of `scheduler_fixtures.py`."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest

from tests.worker.scheduler_fixtures import PAGE, VOCAB, Run, check_told, expected_answer, generate
from warmroute_worker.messages import Generate, Sampling, Times

GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize(
    ("seed", "operations"),
    [*((seed, 1000) for seed in range(16)), pytest.param(17, 10_000, marks=pytest.mark.slow), (20, 10_000)],
)
def test_thousands_of_random_operations(seed: int, operations: int) -> None:
    """Common prefixes, aborts in every state, pools that are too small: each answer is that of the model."""
    draw = random.Random(seed)
    run = Run(
        num_pages=draw.choice([6, 11, 20, 60]),
        max_running_requests=draw.choice([1, 3, 8]),
        chunked_prefill_size=draw.choice([-1, 1, 3, 8, 64]),
        depth=1 + seed % 4,
    )
    sent: dict[str, Generate] = {}
    aborted: set[str] = set()
    went_on = 0
    stems = [[draw.randrange(VOCAB) for _ in range(24)] for _ in range(3)]
    for operation in range(operations):
        choice = draw.random()
        if choice < 0.22:
            stem = draw.choice(stems)[: draw.randrange(25)]
            prompt = stem + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 40))]
            message = Generate(
                f"r{operation}",
                prompt,
                draw.choice([0, 1, 2, 5, 20, 1000]),
                ignore_eos=draw.random() < 0.5,
                stop_token_ids=[draw.randrange(VOCAB)] if draw.random() < 0.3 else [],
                sampling=Sampling(logprobs=1, prompt_logprobs_from=draw.randrange(1, len(prompt) + 2))
                if draw.random() < 0.3
                else Sampling(temperature=draw.choice([0, 0, 0, 1])),
            )
            sent[message.rid] = message
            run.scheduler.add(message)
        elif choice < 0.27 and sent:
            rid = draw.choice(list(sent)[-12:])
            before = rid in run.scheduler._requests
            run.scheduler.abort(rid)
            run.scheduler.check_integrity()
            if before:
                aborted.add(rid)
        elif choice < 0.30:
            run.scheduler.flush(operation)
            run.scheduler.check_integrity()
        else:
            went_on += run.step(draw.choice([1, 2, 8]), draw.randrange(8)).more > 0
    run.finish(20_000)
    assert (went_on > operations / 100) is (run.limits.depth == 1), "steps follow each other"

    assert run.rows.keys() == sent.keys(), "everybody is answered"
    for rid, message in sent.items():
        tokens, reason = run.answer(rid)
        if len(message.token_ids) >= run.room:
            assert (tokens, reason) == ([], "error")
            assert run.rows[rid][-1].error
            continue
        wanted, wanted_reason = expected_answer(message, run.room)
        if rid in aborted:
            assert reason == "abort"
            assert tokens == wanted[: len(tokens)]
        else:
            assert (tokens, reason) == (wanted, wanted_reason)
        check_told(run, message)
    assert run.cache.num_available == run.cache.num_pages, "back to the baseline"
    load = run.scheduler.load()
    assert (load.running, load.waiting, load.used_tokens, load.waiting_uncached_tokens) == (0, 0, 0, 0)
    assert load.generation_tokens_total == sum(len(run.answer(rid)[0]) for rid in sent)
    started = [rid for rid in sent if run.rows[rid][-1].finish_reason != "error"]
    assert load.prompt_tokens_total <= sum(len(sent[rid].token_ids) for rid in started)


def test_how_long_requests_waited_and_were_prefilled() -> None:
    """Of the first admission, and told once, with the first token."""
    run = Run(max_running_requests=1, chunked_prefill_size=8)
    scheduler = run.scheduler
    scheduler.add(generate("a", 20, 2, ignore_eos=True), 10.0)
    scheduler.add(generate("b", 5, 2, start=3, ignore_eos=True), 11.0)
    found: dict[str, list[Times | None]] = {"a": [], "b": []}
    now = 12.0
    while not scheduler.is_idle:
        plan = scheduler.schedule(now=now)
        for row in scheduler.apply(*run.executor.execute(plan), now=now + 0.5).rows:
            found[row.rid].append(row.times)
        if now == 13.0:
            scheduler.retract_all()
        now += 1
    # `a` needs 3 steps, after the second of which it is retracted, and one more for its second token.
    assert found == {"a": [Times(2.0, 2.5), None], "b": [Times(5.0, 0.5), None]}


def test_what_is_counted_by_mode() -> None:
    run = Run(chunked_prefill_size=8)
    run.scheduler.add(generate("a", 20, 3, ignore_eos=True))
    run.finish()
    # Of these only the last token is not cached, and yet it is a prefill.
    run.scheduler.add(generate("again", 17, 3, ignore_eos=True))
    run.finish()

    def counts() -> tuple[int, int, int, int, int]:
        load = run.scheduler.load()
        tokens = (load.prefilled_tokens_total, load.reused_tokens_total, load.decoded_tokens_total)
        return (load.prefill_passes_total, load.decode_passes_total, *tokens)

    assert counts() == (3 + 1, 2 + 2, 20 + 1, 16, 2 + 2)
    run.scheduler.add(generate("b", 5, 2, start=3, ignore_eos=True))
    run.scheduler.add(generate("c", 20, 2, start=7, ignore_eos=True))
    run.step()
    run.scheduler.retract_all()
    assert run.scheduler.load().retracted == 2
    run.scheduler.abort("c")
    assert run.scheduler.load().retracted == 1
    run.step()
    assert run.scheduler.load().retracted == 0
    run.finish()
    # `b` is computed twice, then with a page from the cache and the token that it had said; of `c` there were 3 tokens.
    assert counts() == (5 + 1, 4, 21 + 5 + 3 + 2, 16 + 4, 4)


def test_chunks_keep_to_the_limit_and_only_the_last_one_samples() -> None:
    run = Run(chunked_prefill_size=8)
    run.scheduler.add(generate("a", 30, new=1))
    run.scheduler.add(generate("b", 5, new=1, start=3))
    run.finish()
    assert [plan.lengths.tolist() for plan in run.plans] == [[8], [8], [8], [6, 2], [3]]
    assert [plan.sampled.tolist() for plan in run.plans] == [[False]] * 3 + [[True, False], [True]]


def test_a_prompt_that_is_told_leaves_the_rest_of_the_step_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of it only so much is computed in a step as may be told; the same prompt untold does not wait for it either."""
    monkeypatch.setattr("warmroute_worker.scheduler.scheduler.MOST_TOLD", 4)
    run = Run(chunked_prefill_size=16)
    told = generate("told", 40, new=1, sampling=Sampling(logprobs=0, prompt_logprobs_from=1))
    run.scheduler.add(told)
    run.scheduler.add(generate("b", 10, new=1, start=3))
    run.scheduler.add(generate("same prompt", 40, new=1))
    run.finish()
    assert run.plans[0].lengths.tolist() == [4, 10, 2]
    check_told(run, told)


def test_decoding_goes_on_while_others_are_prefilled() -> None:
    run = Run(chunked_prefill_size=8)
    run.scheduler.add(generate("a", 3, new=20, ignore_eos=True))
    run.step()
    run.scheduler.add(generate("b", 30, start=3))
    for _ in range(4):
        plan = run.step()
        assert plan.rows[0] == 0
        assert plan.lengths[0] == 1
        assert plan.sampled[0]


def test_chunking_off_computes_prompts_whole() -> None:
    run = Run(chunked_prefill_size=-1)
    run.scheduler.add(generate("a", 70))
    run.scheduler.add(generate("b", 60, start=3))
    assert run.step().lengths.tolist() == [70, 60]


def test_cached_tokens_are_page_exact_and_never_the_whole_prompt() -> None:
    run = Run()
    for count, length in enumerate((1, 3, 4, 5, 8, 9, 17)):
        for again in range(2):
            rid = f"{length}/{again}"
            run.scheduler.add(generate(rid, length, new=2, start=count * 5))
            run.finish()
            expected = (length - 1) // PAGE * PAGE if again else 0
            assert {row.cached_tokens for row in run.rows[rid]} == {expected}
    load = run.scheduler.load()
    assert load.cached_tokens_total == sum(rows[0].cached_tokens for rows in run.rows.values())
    assert load.prompt_tokens_total == 2 * (1 + 3 + 4 + 5 + 8 + 9 + 17)
    computed = load.prompt_tokens_total - load.cached_tokens_total
    assert run.executor.computed == computed + load.generation_tokens_total - len(run.rows), "a hit is not computed"


def test_siblings_wait_for_the_prefix_that_is_being_computed() -> None:
    run = Run(chunked_prefill_size=8)
    prompt = generate("", 20).token_ids
    for n in range(3):
        run.scheduler.add(Generate(f"s{n}", [*prompt, n], 2))
    run.scheduler.add(generate("other", 3, start=9))
    run.finish()
    assert [run.rows[f"s{n}"][0].cached_tokens for n in range(3)] == [0, 20, 20]
    assert run.rows["other"][0].cached_tokens == 0
    first_steps = [plan.lengths.tolist() for plan in run.plans[:3]]
    assert first_steps[0] == [8]
    assert sum(map(sum, first_steps)) <= 21 + 3 + 2 + 2


def test_a_sibling_runs_when_the_one_it_waits_for_is_aborted() -> None:
    run = Run(chunked_prefill_size=4)
    for n in range(2):
        run.scheduler.add(Generate(f"s{n}", [*generate("", 20).token_ids, n], 2, ignore_eos=True))
    run.step()
    run.scheduler.abort("s0")
    run.finish()
    assert run.answer("s1")[1] == "length"
    assert run.rows["s1"][0].cached_tokens == 4, "what the first one had computed"


def test_abort_frees_pages_at_once_in_every_state() -> None:
    run = Run(chunked_prefill_size=8, max_running_requests=2)
    run.scheduler.add(generate("decoding", 6, new=50, ignore_eos=True))
    run.step()
    run.scheduler.add(generate("prefilling", 40, start=2))
    run.scheduler.add(generate("waiting", 40, start=4))
    run.step()
    assert (run.scheduler.load().running, run.scheduler.load().waiting) == (2, 1)
    for rid in ("waiting", "prefilling", "decoding"):
        before = run.scheduler.load().used_tokens
        run.scheduler.abort(rid)
        run.scheduler.abort(rid)
        run.scheduler.check_integrity()
        assert run.scheduler.load().used_tokens < before or rid == "waiting"
    assert run.scheduler.load().used_tokens == 0
    assert not run.scheduler.is_idle, "there are three answers to give"
    plan = run.step()
    assert len(plan) == 0
    assert [run.answer(rid)[1] for rid in ("waiting", "prefilling", "decoding")] == ["abort"] * 3
    assert run.scheduler.is_idle


def test_abort_of_an_unknown_request_says_nothing() -> None:
    run = Run()
    run.scheduler.abort("nobody")
    assert run.scheduler.is_idle


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (generate("r", 0), "the prompt is empty"),
        (generate("r", 80), "80 tokens, but the context length is 80"),
        (generate("r", 40), "40 tokens, but the KV pool holds 40"),
        (generate("r", 5, new=-1), "max_new_tokens must be at least 0"),
        (Generate("r", [3, VOCAB], 5), "token ids outside 0 ... 49"),
        (Generate("r", [3, -1], 5), "token ids outside 0 ... 49"),
    ],
)
def test_what_can_never_run_is_refused_at_once(message: Generate, said: str) -> None:
    run = Run(num_pages=10)
    run.scheduler.add(message)
    assert len(run.step()) == 0
    [row] = run.rows["r"]
    assert row.finish_reason == "error"
    assert said in (row.error or "")


def test_answers_are_cut_to_context_and_pool() -> None:
    for changes, room in (({"num_pages": 10}, 40), ({"context_length": 24}, 24)):
        run = Run(**changes)
        run.scheduler.add(generate("r", 20, new=10**9, ignore_eos=True))
        run.finish()
        tokens, reason = run.answer("r")
        assert (len(tokens), reason) == (room - 20, "length")


def test_two_of_one_name_are_a_mistake_of_the_caller() -> None:
    run = Run()
    run.scheduler.add(generate("r", 5))
    with pytest.raises(ValueError, match="'r' is running"):
        run.scheduler.add(generate("r", 5))


def test_retraction_takes_the_newest_and_loses_nothing() -> None:
    run = Run(num_pages=12)
    run.scheduler._ratio.value = 0.0
    messages = [generate(f"r{n}", 5, new=30, start=n, ignore_eos=True) for n in range(4)]
    for message in messages:
        run.scheduler.add(message)
    done: list[str] = []
    while not run.scheduler.is_idle:
        run.step()
        done += [rid for rid, rows in run.rows.items() if rows[-1].finish_reason and rid not in done]
    assert run.scheduler.retractions_total > 0
    assert done == ["r0", "r1", "r2", "r3"], "the oldest is never retracted for a newer one"
    for message in messages:
        assert run.answer(message.rid) == expected_answer(message, run.room)
        assert {row.cached_tokens for row in run.rows[message.rid]} == {0}, "its own pages are no hit"


def test_the_reserve_grows_with_retractions_and_shrinks_with_time() -> None:
    run = Run(num_pages=12)
    start = run.scheduler._ratio.value
    for _ in range(10):
        run.step()
    assert run.scheduler._ratio.value < start
    low = run.scheduler._ratio.value
    run.scheduler._ratio.retracted()
    assert run.scheduler._ratio.value > low


def test_first_come_first_served() -> None:
    """A short request does not overtake a long one that waits for pages."""
    run = Run(num_pages=20)
    run.scheduler.add(generate("running", 40, new=20, ignore_eos=True))
    run.step()
    run.scheduler.add(generate("long", 60, start=3))
    run.scheduler.add(generate("short", 3, start=6))
    run.step()
    assert run.scheduler.load().waiting == 2
    run.finish()
    assert list(run.rows) == ["running", "long", "short"]


def test_flush_only_when_idle() -> None:
    run = Run()
    run.scheduler.add(generate("r", 9))
    refused = run.scheduler.flush(1)
    assert (refused.id, refused.ok) == (1, False)
    assert "1 requests are running or waiting" in refused.message
    run.finish()
    assert run.scheduler.flush(2).ok
    run.scheduler.add(generate("again", 9))
    run.finish()
    assert run.rows["again"][0].cached_tokens == 0
    assert run.scheduler.load().evicted_tokens_total == 0


def test_load_counts_what_is_held_and_what_waits() -> None:
    run = Run(num_pages=20, max_running_requests=1)
    run.scheduler.add(generate("a", 10, new=20, ignore_eos=True))
    run.scheduler.add(generate("b", 7, start=3))
    run.step()
    load = run.scheduler.load()
    assert (load.running, load.waiting) == (1, 1)
    assert (load.used_tokens, load.total_tokens) == (12, 80)
    assert load.waiting_uncached_tokens == 7


def test_a_client_seed_is_the_seed_and_others_differ() -> None:
    run = Run()
    for rid, seed in (("a", 5), ("b", None), ("c", None), ("d", -1)):
        run.scheduler.add(generate(rid, 3, start=ord(rid), sampling=Sampling(seed=seed)))
    plan = run.step()
    seeds = plan.sampling.seeds.tolist()
    assert seeds[0] == 5
    assert seeds[3] == 2**64 - 1
    assert len(set(seeds)) == 4
    assert plan.positions.tolist() == [3, 3, 3, 3]
    assert run.step().positions.tolist() == [4, 4, 4, 4]


def test_overhead_per_step_at_64_running() -> None:
    """No benchmark but a guard against something quadratic: 0.15 ms measured, the bound is for a busy machine."""
    run = Run(num_pages=4000, context_length=1000, max_running_requests=64, chunked_prefill_size=-1)
    for n in range(64):
        run.scheduler.add(generate(f"r{n}", 20, new=400, start=n, ignore_eos=True))
    run.step()
    run.step()
    best = 1.0
    for _ in range(30):
        started = time.perf_counter()
        plan = run.scheduler.schedule()
        run.scheduler.apply([1] * len(plan))
        best = min(best, time.perf_counter() - started)
    assert best < 0.004


def begun(policy: str) -> list[str]:
    """The order in which waiting requests begin to run: one row, a warm prefix, and a stranger before its friends."""
    run = Run(max_running_requests=1, schedule_policy=policy)
    warm = list(range(20))
    run.scheduler.add(Generate("first", warm, 1))
    run.finish()
    run.scheduler.add(Generate("stranger", [40, 41, 42, 43, 44, 45, 46, 47, 48], 1))
    run.scheduler.add(Generate("near", [*warm[:8], 30, 31, 32, 33], 1))
    run.scheduler.add(Generate("nearest", [*warm, 30, 31], 1))
    run.finish()
    return [rid for rid in run.rows if rid != "first"]


def test_policies_order_who_waits() -> None:
    assert begun("fcfs") == ["stranger", "near", "nearest"]
    assert begun("lpm") == ["nearest", "near", "stranger"]


def test_with_lpm_everybody_is_answered_all_the_same() -> None:
    generator = random.Random(5)
    run = Run(num_pages=24, schedule_policy="lpm")
    sent = {}
    for number in range(60):
        start = generator.choice([[1, 2, 3, 4, 5, 6, 7, 8], [9] * 6, []])
        message = Generate(str(number), start + [generator.randrange(VOCAB) for _ in range(9)], 20)
        sent[message.rid] = message
        run.scheduler.add(message)
        run.step()
    run.finish()
    for rid, message in sent.items():
        assert run.answer(rid) == expected_answer(message, run.room)


def test_a_conservative_scheduler_retracts_less() -> None:
    def retractions(conservativeness: float) -> int:
        run = Run(num_pages=30, schedule_conservativeness=conservativeness)
        for number in range(12):
            run.scheduler.add(Generate(str(number), [number] * 6, 40, ignore_eos=True))
        run.finish()
        return run.scheduler.retractions_total

    assert retractions(0.05) > retractions(10.0) == 0


def test_a_step_that_failed_is_done_again() -> None:
    run = Run()
    for n in range(3):
        run.scheduler.add(generate(f"r{n}", 20 + n, 8, start=n))
    for step in range(200):
        if run.scheduler.is_idle:
            break
        if step in (0, 3, 4):
            run.executor.execute(run.scheduler.schedule())
            run.scheduler.fail()
            run.scheduler.check_integrity()
        else:
            run.step()
    for n in range(3):
        message = generate(f"r{n}", 20 + n, 8, start=n)
        assert run.answer(f"r{n}") == expected_answer(message, run.room)
    assert run.cache.num_available == run.cache.num_pages


def test_batches_under_way_are_of_equal_size() -> None:
    """Two stages, six requests that were prefilled together: from then on three decode in each plan."""
    run = Run(depth=2, chunked_prefill_size=64)
    for n in range(6):
        run.scheduler.add(generate(f"r{n}", 5, 12, start=n, ignore_eos=True))
    for _ in range(12):
        run.step()
    assert [len(plan) for plan in run.plans[8:]] == [3] * len(run.plans[8:])


def test_priorities_are_admitted_first() -> None:
    def order(priorities: bool) -> list[str]:
        run = Run(max_running_requests=1, priorities=priorities)
        for n, priority in enumerate((0, 5, -1, 5)):
            run.scheduler.add(generate(f"r{n}", 10, 3, start=n, ignore_eos=True, priority=priority))
        run.finish()
        return list(run.rows)

    assert order(False) == ["r0", "r1", "r2", "r3"]
    assert order(True) == ["r1", "r3", "r0", "r2"]


def test_all_can_be_retracted_and_the_cache_emptied() -> None:
    run = Run()
    for n in range(4):
        run.scheduler.add(generate(f"r{n}", 20 + n, 10, start=n))
    for _ in range(5):
        run.step()
    run.scheduler.retract_all()
    run.scheduler.check_integrity()
    assert run.scheduler.load().used_tokens == 0
    run.finish()
    for n in range(4):
        assert run.answer(f"r{n}") == expected_answer(generate(f"r{n}", 20 + n, 10, start=n), run.room)


def test_steps_that_never_fit_are_refused_in_the_end() -> None:
    run = Run(num_pages=30)
    run.scheduler.add(generate("r", 40, 4))
    sizes = []
    for _ in range(3):
        sizes.append(int(run.scheduler.schedule().lengths.sum()))
        run.scheduler.fail()
        run.scheduler.halve_chunks()
    assert sizes == [16, 8, 4]
    run.scheduler.schedule()
    run.scheduler.fail("the step ran out of memory: really")
    [row] = run.scheduler.report().rows
    assert (row.finish_reason, row.error) == ("error", "the step ran out of memory: really")
    assert run.scheduler.is_idle
    assert run.cache.num_available == run.cache.num_pages


def test_decode_steps_follow_each_other_until_something_must_be_decided() -> None:
    run = Run()
    run.scheduler.add(generate("a", 5, 12, ignore_eos=True, sampling=GREEDY))
    assert run.step(8).more == 0, "the first token goes out at once"
    assert run.step(8).more == 7
    assert len(run.rows["a"][-1].token_ids) == 8
    assert run.step(8).more == 2, "it ends there"
    assert run.scheduler.is_idle
    load = run.scheduler.load()
    assert (load.decode_passes_total, load.decoded_tokens_total, load.generation_tokens_total) == (11, 11, 12)
    assert run.answer("a") == expected_answer(generate("a", 5, 12, ignore_eos=True), run.room)


@pytest.mark.parametrize(
    "other",
    [
        {"sampling": Sampling(temperature=1)},
        {"sampling": Sampling(temperature=0, logprobs=0)},
        {"sampling": Sampling(temperature=0, frequency_penalty=0.5)},
        {"sampling": Sampling(temperature=0, logit_bias=((3, 1.0),))},
        {"sampling": Sampling(temperature=0, min_new_tokens=3)},
    ],
)
def test_steps_go_one_by_one_where_tokens_are_drawn_with_care(other: dict[str, Any]) -> None:
    run = Run()
    run.scheduler.add(generate("a", 5, 12, ignore_eos=True, sampling=GREEDY))
    run.step(8)
    run.scheduler.add(generate("b", 5, 4, start=9, ignore_eos=True, **other))
    run.step(8)
    for _ in range(3):
        assert run.step(8).more == 0
    assert "b" not in run.scheduler._requests
    assert run.step(8).more > 0


def test_nothing_follows_a_step_with_a_prompt() -> None:
    run = Run(chunked_prefill_size=4)
    run.scheduler.add(generate("a", 2, 40, ignore_eos=True, sampling=GREEDY))
    run.step(8)
    run.scheduler.add(generate("b", 12, 40, start=9, ignore_eos=True, sampling=GREEDY))
    assert [run.step(8).more for _ in range(4)] == [0, 0, 0, 7]


def test_steps_take_pages_that_nobody_needs_next() -> None:
    """Of 18 pages four requests have 3 each after their first token, and need their next 4 soon. The 2 others are not
    taken for steps that two of them could do and the others could not."""
    run = Run(num_pages=18, chunked_prefill_size=-1, schedule_conservativeness=0.01)
    for rid in "abcd":
        run.scheduler.add(generate(rid, 8, 20, start=ord(rid), ignore_eos=True, sampling=GREEDY))
    run.step(8)
    plan = run.step(8)
    assert plan.more == 3, "to the end of the pages that their next tokens need anyway"
    assert run.cache.num_available == 6
    run.finish()
    assert all(run.answer(rid)[1] == "length" for rid in "abcd")


def test_pages_of_steps_that_have_not_been_go_to_who_needs_them() -> None:
    """`a` has pages for 16 steps, of which it does one."""
    run = Run(num_pages=10, chunked_prefill_size=-1, schedule_conservativeness=0.01)
    run.scheduler.add(generate("a", 15, 17, ignore_eos=True, sampling=GREEDY))
    run.step(8)
    assert run.step(17, most=0).more == 15
    assert run.cache.num_available == 10 - 8
    b = generate("b", 15, 2, start=9, ignore_eos=True, sampling=GREEDY)
    run.scheduler.add(b)
    run.step()
    assert run.cache.num_available == 10 - 5 - 4
    run.finish()
    assert run.scheduler.retractions_total == 0
    assert all(run.answer(rid)[1] == "length" for rid in "ab")


def test_pages_of_steps_that_have_not_been_go_to_who_grows() -> None:
    """`a` and `b` have a page too many each when `c` needs its third and there is none."""
    run = Run(num_pages=10, chunked_prefill_size=-1, schedule_conservativeness=0.01)
    for rid in "ab":
        run.scheduler.add(generate(rid, 7, 20, start=ord(rid), ignore_eos=True, sampling=GREEDY))
    run.step(9)
    assert run.step(9, most=0).more == 8
    run.scheduler.add(generate("c", 7, 20, start=3, ignore_eos=True, sampling=GREEDY))
    run.step()
    run.step()
    assert run.cache.num_available == 0
    run.step()
    assert run.scheduler.load().retractions_total == 0
    assert run.cache.num_available == 1
    run.finish()
    assert all(run.answer(rid)[1] == "length" for rid in "abc")


def test_a_step_that_draws_for_some_only_is_followed_by_none() -> None:
    """What `b` had said is computed again, token by token: that is no prefill, and yet nothing is drawn for it."""
    run = Run(chunked_prefill_size=1)
    a = generate("a", 2, 40, ignore_eos=True, sampling=GREEDY)
    b = generate("b", 2, 20, start=9, ignore_eos=True, sampling=GREEDY)
    for message in (a, b):
        run.scheduler.add(message)
    while len(run.rows.get("b", [])) < 6:
        run.step()
    run.scheduler._retract(run.scheduler._running[-1])
    run.scheduler._cache.flush()
    some_only = 0
    while not run.scheduler.is_idle:
        plan = run.step(8)
        some_only += 0 < plan.sampled.sum() < len(plan)
    assert some_only > 4
    for message in (a, b):
        assert run.answer(message.rid) == expected_answer(message, run.room)


def test_a_token_that_ends_a_request_ends_the_steps() -> None:
    message = generate("a", 5, 40, ignore_eos=True, sampling=GREEDY)
    answer, _ = expected_answer(message, 80)
    stop = answer[4]
    run = Run()
    run.scheduler.add(dataclasses.replace(message, stop_token_ids=[stop]))
    run.step(8)
    plan = run.step(8)
    assert plan.stop_ids.tolist() == [stop]
    assert run.answer("a") == (answer[: answer.index(stop) + 1], "stop")
    assert run.cache.num_available == run.cache.num_pages
