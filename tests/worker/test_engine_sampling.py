"""Penalties, biases, bans, min-p and several answers: against numpy and transformers, and through the whole engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.worker.engine_fixtures import GREEDY, VOCAB_SIZE, last_logits, load_engine, make_llama, run_all
from warmroute_worker.executor.sampler import sample
from warmroute_worker.messages import Generate, Sampling
from warmroute_worker.step_plan import NO_CHANGES, Int64s, LogitChanges, SamplingColumns

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PROMPT = [5, 17, 99, 17, 230, 4, 4, 61]
NEW = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    # A small deviation, so that logits lie close together and a penalty changes what is said.
    return folder, make_llama(folder, initializer_range=0.12)


def reference(model: Any, change: Callable[[Any, list[int]], Any]) -> list[int]:
    """Greedy, with the logits changed as `change(logits, answer so far)` says."""
    answer: list[int] = []
    for _ in range(NEW):
        logits = last_logits(model, PROMPT + answer).double().numpy().copy()
        answer.append(int(change(logits, answer).argmax()))
    return answer


def repetition(logits: Any, answer: list[int]) -> Any:
    seen = sorted({*PROMPT, *answer})
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.4, logits[seen] * 1.4)
    return logits


def frequency(logits: Any, answer: list[int]) -> Any:
    for token in answer:
        logits[token] -= 0.7
    return logits


def presence(logits: Any, answer: list[int]) -> Any:
    logits[sorted(set(answer))] -= 1.5
    return logits


def bias(logits: Any, answer: list[int]) -> Any:
    logits[7] += 1.25
    logits[158] -= 100
    return logits


def everything(logits: Any, answer: list[int]) -> Any:
    return bias(presence(frequency(repetition(logits, answer), answer), answer), answer)


BIAS = ((7, 1.25), (158, -100.0))
CASES: dict[str, tuple[dict[str, Any], Callable[[Any, list[int]], Any]]] = {
    "repetition": ({"repetition_penalty": 1.4}, repetition),
    "frequency": ({"frequency_penalty": 0.7}, frequency),
    "presence": ({"presence_penalty": 1.5}, presence),
    "bias": ({"logit_bias": BIAS}, bias),
    "everything": (
        {"repetition_penalty": 1.4, "frequency_penalty": 0.7, "presence_penalty": 1.5, "logit_bias": BIAS},
        everything,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_with_changed_logits(model: tuple[Path, Any], case: str) -> None:
    """Alone, and in a batch with a request that has none of it and with itself in chunks."""
    folder, transformers = model
    fields, change = CASES[case]
    expected, plain = reference(transformers, change), reference(transformers, lambda logits, answer: logits)
    assert expected != plain, "the case changes nothing"
    for chunk in (-1, 3):
        engine = load_engine(folder, chunked_prefill_size=chunk)
        requests = [
            Generate("plain", PROMPT, NEW, sampling=GREEDY),
            Generate("changed", PROMPT, NEW, sampling=replace(GREEDY, **fields)),
        ]
        answers = run_all(engine, requests)
        assert answers["changed"].token_ids == expected
        assert answers["plain"].token_ids == plain


def test_repetition_penalty_is_that_of_transformers(model: tuple[Path, Any]) -> None:
    folder, transformers = model
    settings = {"repetition_penalty": 1.3, "do_sample": False, "max_new_tokens": NEW}
    expected = transformers.generate(torch.tensor([PROMPT]), **settings)[0, len(PROMPT) :].tolist()
    request = Generate("r", PROMPT, NEW, sampling=replace(GREEDY, repetition_penalty=1.3))
    assert run_all(load_engine(folder), [request])["r"].token_ids == expected


def test_penalties_survive_retraction(model: tuple[Path, Any]) -> None:
    folder, transformers = model
    expected = reference(transformers, frequency)
    engine = load_engine(folder, max_total_tokens=160)
    engine.scheduler._ratio.value = 0.0
    sampling = replace(GREEDY, frequency_penalty=0.7)
    requests = [Generate(str(n), PROMPT, NEW, sampling=sampling) for n in range(6)]
    answers = run_all(engine, requests)
    assert engine.scheduler.retractions_total > 0
    assert [answers[str(n)].token_ids for n in range(6)] == [expected] * 6


def test_nothing_ends_an_answer_before_its_least_length(model: tuple[Path, Any]) -> None:
    folder, transformers = model
    plain = reference(transformers, lambda logits, answer: logits)
    stop = plain[2]
    sampling = replace(GREEDY, min_new_tokens=10)
    stops = [stop, 10**6]  # the second is an id that the model does not have
    row = run_all(load_engine(folder), [Generate("r", PROMPT, NEW, stop_token_ids=stops, sampling=sampling)])["r"]
    assert stop not in row.token_ids[:10]
    short = run_all(load_engine(folder), [Generate("r", PROMPT, NEW, stop_token_ids=stops, sampling=GREEDY)])["r"]
    assert short.token_ids == plain[: plain.index(stop) + 1]


def columns(rows: int, **changes: Any) -> SamplingColumns:
    settings: dict[str, Any] = {
        "temperatures": np.ones(rows, np.float32),
        "top_ks": np.full(rows, -1, np.int32),
        "top_ps": np.ones(rows, np.float32),
        "min_ps": np.zeros(rows, np.float32),
        "seeds": np.arange(rows, dtype=np.uint64),
        "logprobs": np.full(rows, -1, np.int32),
    }
    return SamplingColumns(**(settings | changes))


def test_min_p_leaves_out_the_unlikely_and_keeps_the_proportions() -> None:
    logits = torch.log(torch.tensor([0.5, 0.26, 0.14, 0.06, 0.04]))
    rows = 20_000
    drawn = sample(
        logits.expand(rows, -1).contiguous(),
        columns(rows, min_ps=np.full(rows, 0.25, np.float32)),
        lambda: np.zeros(rows, np.int64),
    )
    counts = np.bincount(drawn, minlength=5)
    assert counts[3:].tolist() == [0, 0]
    shares = np.array([0.5, 0.26, 0.14]) / 0.9
    expected = shares * rows
    assert ((counts[:3] - expected) ** 2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def never() -> Int64s:
    raise AssertionError("nothing is left to chance")


def test_changes_touch_their_own_row_only() -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 3] = 1.0
    added = LogitChanges(np.array([1, 1]), np.array([3, 3]), np.array([-0.6, -0.6], np.float32))
    scaled = LogitChanges(np.array([2]), np.array([3]), np.array([2.0], np.float32))
    greedy = {"temperatures": np.zeros(3, np.float32)}
    assert sample(logits, columns(3, **greedy), never).tolist() == [3, 3, 3]
    tokens = sample(logits, columns(3, **greedy, added=added, scaled=scaled), never)
    assert tokens[0] == 3
    assert tokens[1] != 3, "what is added twice counts twice"
    assert tokens[2] == 3, "halved, and still the largest"
    assert float(logits[1, 3]) == 1.0, "the logits themselves stay"
    assert len(NO_CHANGES) == 0


def test_several_answers_differ_and_are_reproducible(model: tuple[Path, Any]) -> None:
    folder, _ = model
    sampling = Sampling(temperature=1.0, seed=3)
    requests = [Generate(str(n), PROMPT, 12, sampling=replace(sampling, seed=3 + n)) for n in range(3)]
    first = run_all(load_engine(folder), requests)
    second = run_all(load_engine(folder), requests[::-1])
    answers = [first[str(n)].token_ids for n in range(3)]
    assert answers == [second[str(n)].token_ids for n in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3


def test_logprobs_are_those_of_transformers(model: tuple[Path, Any]) -> None:
    """Of the model as it is, whatever penalties and temperature do to the choice; and only for those who ask."""
    folder, transformers = model
    asking = Sampling(temperature=0.9, seed=1, frequency_penalty=0.5, logprobs=3)
    requests = [
        Generate("asks", PROMPT, 8, sampling=asking),
        Generate("silent", PROMPT, 8, sampling=replace(asking, logprobs=None)),
        Generate("own", PROMPT, 8, sampling=replace(asking, logprobs=0)),
    ]
    engine = load_engine(folder)
    for request in requests:
        engine.scheduler.add(request)
    rows: dict[str, list[Any]] = {}
    while not engine.is_idle:
        for row in engine.step().rows:
            rows.setdefault(row.rid, []).append(row)
    tokens = {rid: [row.token_ids[0] for row in own] for rid, own in rows.items()}
    assert tokens["asks"] == tokens["silent"] == tokens["own"], "who asks gets no other answer"
    assert all(row.logprobs is None for row in rows["silent"])
    assert all(row.logprobs.top == [] for row in rows["own"])
    for place, row in enumerate(rows["asks"]):
        expected = torch.log_softmax(last_logits(transformers, PROMPT + tokens["asks"][:place]).double(), -1)
        assert row.logprobs.own == pytest.approx(float(expected[row.token_ids[0]]), abs=2e-4)
        best = expected.topk(3)
        assert [token for token, _ in row.logprobs.top] == best.indices.tolist()
        assert [logprob for _, logprob in row.logprobs.top] == pytest.approx(best.values.tolist(), abs=2e-4)
