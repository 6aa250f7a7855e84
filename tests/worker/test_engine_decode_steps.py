"""Decode steps that follow each other in one plan: the same tokens, and only as long as nobody must decide."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.worker.driver_fixtures import drivers
from tests.worker.engine_fixtures import GREEDY, greedy, load_engine, make_model, make_reference
from tests.worker.test_engine_deterministic import IN_ONE_CALL
from tests.worker.test_engine_ranks import answers, ranks
from warmroute_worker.executor import ranks as executor_ranks
from warmroute_worker.messages import Abort, Generate

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worker.engine_fixtures import Reference
    from warmroute_worker.engine import Engine

pytestmark = IN_ONE_CALL


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("llama"))


def sizes(engine: Engine, requests: list[Generate]) -> tuple[dict[str, list[int]], list[int]]:
    """All tokens, and of the first request how many came at a time."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.rid: [] for request in requests}
    at_a_time = []
    while not engine.is_idle:
        for row in engine.step().rows:
            assert row.error is None
            tokens[row.rid] += row.token_ids
            if row.rid == requests[0].rid:
                at_a_time.append(len(row.token_ids))
        engine.scheduler.check_integrity()
    return tokens, at_a_time


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tp": 2},
        pytest.param({"tp": 4}, marks=pytest.mark.slow),
        {"chunked_prefill_size": 17},
        {"max_total_tokens": 176, "schedule_conservativeness": 0.01},
        {"page_size": 1},
        pytest.param({"enable_deterministic_inference": True, "tp": 2}, marks=pytest.mark.slow),
        pytest.param({"threads": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_tokens(llama: Reference, changes: dict[str, Any]) -> None:
    with ranks(llama.folder, num_continuous_decode_steps=8, **changes) as (engine, region):
        steps = region.get(0, "steps")
        for _ in range(2):  # cold and warm
            assert answers(greedy(engine, llama.prompts)) == llama.answers
        if "max_total_tokens" in changes:
            assert engine.scheduler.retractions_total > 0
        else:
            load = engine.scheduler.load()
            assert load.prefill_passes_total + load.decode_passes_total == region.get(0, "steps") - steps
        [alone] = greedy(engine, llama.prompts[4:5])
        assert alone.token_ids == llama.answers[4]


@pytest.mark.parametrize("tp", [1, 2])
def test_how_many_come_at_a_time(llama: Reference, tp: int) -> None:
    requests = [Generate(str(n), llama.prompts[n], 16, sampling=GREEDY) for n in range(3)]
    with ranks(llama.folder, tp, num_continuous_decode_steps=6) as (engine, _):
        tokens, at_a_time = sizes(engine, requests)
    assert at_a_time == [1, 6, 6, 3]
    assert [tokens[str(n)] for n in range(3)] == [answer[:16] for answer in llama.answers[:3]]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_message_ends_them(llama: Reference, tp: int) -> None:
    """Also on the rank that cannot see it."""
    reader, writer = os.pipe()
    request = Generate("0", llama.prompts[3], 16, sampling=GREEDY)
    with ranks(llama.folder, tp, num_continuous_decode_steps=6) as (engine, region):
        engine.heed(reader)
        assert sizes(engine, [request]) == ({"0": llama.answers[3][:16]}, [1, 6, 6, 3])
        os.write(writer, b"x")
        assert sizes(engine, [request]) == ({"0": llama.answers[3][:16]}, [1] * 16)
        os.read(reader, 1)
        assert sizes(engine, [request]) == ({"0": llama.answers[3][:16]}, [1, 6, 6, 3])
        assert len({region.status(rank)["all_reduce_calls"] for rank in range(tp)}) == 1
    os.close(reader)
    os.close(writer)


def test_a_stop_token_of_one_ends_them_for_all(llama: Reference) -> None:
    long, short = llama.answers[3], llama.answers[4]
    at = next(place for place in range(2, 7) if short[place] not in short[:place] + long[: place + 1])
    requests = [
        Generate("long", llama.prompts[3], 20, sampling=GREEDY),
        Generate("short", llama.prompts[4], 20, stop_token_ids=[short[at]], sampling=GREEDY),
    ]
    with ranks(llama.folder, 2, num_continuous_decode_steps=8) as (engine, _):
        tokens, at_a_time = sizes(engine, requests)
        assert engine.cache.num_available == engine.cache.num_pages
    assert tokens == {"long": long[:20], "short": short[: at + 1]}
    assert at_a_time[:3] == [1, at, 8]


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_of_equal_logits_of_two_ranks_the_first_counts(tmp_path: Path, tp: int) -> None:
    """As in transformers, and with one rank."""
    make_model(tmp_path, "Llama")
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = torch.cat([head[:100], head[:100], head[:100], head[:20]])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    prompts = [[5, 250, 7], [1, 2, 3, 4]]
    alone = answers(greedy(load_engine(tmp_path, num_continuous_decode_steps=1), prompts))
    assert max(max(answer) for answer in alone) < 100
    with ranks(tmp_path, tp, num_continuous_decode_steps=8) as (engine, _):
        assert answers(greedy(engine, prompts)) == alone


@pytest.mark.parametrize(("steps", "times"), [(1, 0), (4, 31)])
def test_ranks_say_one_number_of_each_sequence_instead_of_its_logits(llama: Reference, steps: int, times: int) -> None:
    count = len(llama.prompts)
    with ranks(llama.folder, 2, num_continuous_decode_steps=steps) as (engine, region):
        before = region.get(0, "steps"), region.status(0)
        greedy(engine, llama.prompts)
        after = region.get(0, "steps"), region.status(0)
    moved = {key: after[1][key] - before[1][key] for key in after[1]}
    assert after[0] - before[0] == 32
    assert moved["all_reduce_calls"] == 32 * (2 * 3 + 1)
    # And in front of them whether to go on.
    assert moved["gather_bytes"] == (32 - times) * count * 320 // 2 * 4 + times * (count + 1) * 8


def test_a_driver_listens_while_steps_follow_each_other(llama: Reference) -> None:
    """Of 64 steps at a time some runs end early, for those who come and for one who goes."""
    with drivers(llama.folder, num_continuous_decode_steps=64) as engine:
        long = Generate("long", llama.prompts[3], 450, sampling=GREEDY)
        engine.send(0, long)
        for n in range(4):
            told = len(engine.rows["long"])
            engine.until(lambda told=told: len(engine.rows["long"]) > told)  # type: ignore[misc]
            time.sleep(0.002)  # of the 10 that 64 steps take
            engine.send(0, Generate(str(n), llama.prompts[n], 1, sampling=GREEDY))
        engine.until(engine.finished(["0", "1", "2", "3"]))
        engine.send(0, Abort("long"))
        engine.until(engine.finished(["long"]))
        said = [len(row.token_ids) for row in engine.rows["long"]]
        assert engine.rows["long"][-1].finish_reason == "abort"
        # The first, one with each of the four prompts, and what was ended early.
        assert sum(0 < count < 64 for count in said) > 1 + 4, said


def test_without_a_number_steps_have_a_limit_of_time(llama: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_ranks, "BURST_SECONDS", 0.0)
    with ranks(llama.folder, 1) as (engine, _):
        request = Generate("0", llama.prompts[3], 16, sampling=GREEDY)
        assert sizes(engine, [request]) == ({"0": llama.answers[3][:16]}, [1] * 16)
    monkeypatch.setattr(executor_ranks, "BURST_SECONDS", 100.0)
    with ranks(llama.folder, 1) as (engine, _):
        assert sizes(engine, [request]) == ({"0": llama.answers[3][:16]}, [1, 8, 7])


def test_it_is_said_where_steps_go_one_by_one(llama: Reference, caplog: pytest.LogCaptureFixture) -> None:
    engine = load_engine(llama.folder, num_continuous_decode_steps=4, dtype="bfloat16")
    assert "--num-continuous-decode-steps 4: steps go one by one, because" in caplog.text
    _, at_a_time = sizes(engine, [Generate("0", llama.prompts[3], 8, sampling=GREEDY)])
    assert at_a_time == [1] * 8
