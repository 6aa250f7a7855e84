"""Logprobs of prompts against transformers' whole forward: cold, cached, in chunks, retracted, in company, on ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.worker.driver_fixtures import drivers
from tests.worker.engine_fixtures import GREEDY, VOCAB_SIZE, load_engine, make_model
from warmroute_worker import offline
from warmroute_worker.args import WorkerArgs
from warmroute_worker.messages import Generate, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from warmroute_worker.engine import Engine
    from warmroute_worker.messages import Row

LENGTHS = (1, 2, 17, 40, 77, 130)
TOP = 3
SENT = {"moe_a2a_backend": "deepep", "enable_two_batch_overlap": True, "enable_deterministic_inference": True}
"""In this mode the first half is filled up, and what stands behind it moves."""


@dataclass
class Model:
    folder: Path
    prompts: list[list[int]]
    shares: list[torch.Tensor]
    """Of each prompt [tokens, vocab]: how likely each token is behind it, as a logarithm."""


def make(folder: Path, family: str = "Llama", **changes: Any) -> Model:
    model = make_model(folder, family, **changes)
    draw = random.Random(5)
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    with torch.no_grad():
        shares = [torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1) for prompt in prompts]
    return Model(folder, prompts, shares)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make(tmp_path_factory.mktemp("llama"), initializer_range=0.12)


def asking(prompts: Sequence[list[int]], first: int = 1, new: int = 3) -> list[Generate]:
    sampling = Sampling(temperature=0, logprobs=TOP, prompt_logprobs_from=first)
    return [Generate(str(n), prompt, new, sampling=sampling) for n, prompt in enumerate(prompts)]


def run(engine: Engine, requests: Sequence[Generate]) -> dict[str, list[Row]]:
    for request in requests:
        engine.scheduler.add(request)
    rows: dict[str, list[Row]] = {}
    while not engine.is_idle:
        for row in engine.step().rows:
            rows.setdefault(row.rid, []).append(row)
        engine.scheduler.check_integrity()
    return rows


def check(model: Model, rows: dict[str, list[Row]], first: int = 1) -> None:
    for n, (prompt, shares) in enumerate(zip(model.prompts, model.shares, strict=True)):
        told, *later = [row.prompt_logprobs for row in rows[str(n)]]
        assert told is not None
        assert not any(later)
        assert len(told) == max(len(prompt) - first, 0)
        for place, entry in enumerate(told, first):
            expected = shares[place - 1]
            assert entry.own == pytest.approx(float(expected[prompt[place]]), abs=2e-4)
            best = expected.topk(TOP)
            assert [token for token, _ in entry.top] == best.indices.tolist()
            assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=2e-4)


@pytest.mark.parametrize("changes", [{}, {"chunked_prefill_size": 16}, {"chunked_prefill_size": -1}], ids=str)
@pytest.mark.parametrize("first", [1, 16, 17, 30])
def test_cold_and_cached(llama: Model, changes: dict[str, Any], first: int) -> None:
    """In company of each other and of one who does not ask; the answers are the same as without."""
    engine = load_engine(llama.folder, **changes)
    plain = [Generate(request.rid, request.token_ids, 3, sampling=GREEDY) for request in asking(llama.prompts)]
    expected = {rid: [token for row in rows for token in row.token_ids] for rid, rows in run(engine, plain).items()}
    engine.scheduler.flush(1)
    for _ in range(2):
        rows = run(engine, [*asking(llama.prompts, first), Generate("silent", [9] * 50, 3, sampling=GREEDY)])
        check(llama, rows, first)
        assert {rid: [token for row in rows[rid] for token in row.token_ids] for rid in expected} == expected
        assert all(row.prompt_logprobs is None for row in rows["silent"])
    cached = [rows[str(n)][0].cached_tokens for n in range(len(LENGTHS))]
    whole_pages = [(min(length - 1, first - 1) if first < length else length - 1) // 16 * 16 for length in LENGTHS]
    assert cached == whole_pages, "all but what must be computed to be told"


def test_of_prompts_that_want_no_answer(llama: Model) -> None:
    """The scorer's request, and the one that only warms the cache."""
    engine = load_engine(llama.folder)
    rows = run(engine, asking(llama.prompts, new=0))
    check(llama, rows)
    for [row] in rows.values():
        assert (row.token_ids, row.finish_reason, row.logprobs) == ([], "length", None)
    assert engine.scheduler.load().generation_tokens_total == 0
    warm = run(engine, [Generate("warm", llama.prompts[-1], 3, sampling=GREEDY)])["warm"]
    assert warm[0].cached_tokens == (LENGTHS[-1] - 1) // 16 * 16


def test_more_than_a_step_tells(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmroute_worker.scheduler.scheduler.MOST_TOLD", 50)
    check(llama, run(load_engine(llama.folder), asking(llama.prompts)))


@pytest.mark.parametrize("retract_after", [1, 3, 5, 9])
def test_retracted(llama: Model, retract_after: int) -> None:
    """In the middle of a prompt and behind it: nothing is told twice, and nothing is missing."""
    engine = load_engine(llama.folder, chunked_prefill_size=48)
    for request in asking(llama.prompts, new=20):
        engine.scheduler.add(request)
    rows: dict[str, list[Row]] = {}
    steps = 0
    while not engine.is_idle:
        for row in engine.step().rows:
            rows.setdefault(row.rid, []).append(row)
        steps += 1
        if steps == retract_after:
            engine.scheduler.retract_all()
    assert engine.scheduler.retractions_total > 0
    check(llama, rows)


def test_deterministic(llama: Model) -> None:
    """The same bits in any company: rows are filled up with others there."""
    found = []
    for alone in (True, False):
        engine = load_engine(llama.folder, enable_deterministic_inference=True, chunked_prefill_size=24)
        requests = asking(llama.prompts)
        if alone:
            rows = {rid: told for request in requests for rid, told in run(engine, [request]).items()}
        else:
            rows = run(engine, requests)
        check(llama, rows)
        found.append([rows[str(n)][0].prompt_logprobs for n in range(len(LENGTHS))])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("tp", "pp"), [pytest.param(2, 1, marks=pytest.mark.slow), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)]
)
def test_on_ranks(llama: Model, tp: int, pp: int) -> None:
    """With stages several chunks of a prompt are under way, and what is told comes from the last rank."""
    args = WorkerArgs(
        str(llama.folder),
        "tiny",
        device="cpu",
        threads=1,
        max_total_tokens=4096,
        tp_size=tp,
        pp_size=pp,
        chunked_prefill_size=32,
        watchdog_timeout=60.0,
    )
    with offline.ranks(args) as (engine, _):
        for _ in range(2):
            check(llama, run(engine, asking(llama.prompts)))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        pytest.param("Llama", {"enable_dp_lm_head": True}, marks=pytest.mark.slow),
        pytest.param("DeepseekV3", SENT, marks=pytest.mark.slow),
    ],
    ids=["", "dp lm head", "in halves"],
)
def test_with_dp_attention(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """Ranks want different numbers of rows of logits in a step, and some of them none."""
    model = make(tmp_path, family)
    settings: dict[str, Any] = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "chunked_prefill_size": 64}
    with drivers(model.folder, **settings, **changes) as worker:
        requests = [(n % 2, request) for n, request in enumerate(asking(model.prompts))]
        for _ in range(2):
            worker.answers(requests)
            check(model, worker.rows)
