"""--enable-deterministic-inference: the same bits, alone or in company, cold or warm, whole or in chunks."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.worker.engine_fixtures import FAMILIES, GREEDY, VOCAB_SIZE, load_engine, make_model
from warmroute_worker.executor import model_runner
from warmroute_worker.executor.ranks import RankExecutor
from warmroute_worker.layers import native
from warmroute_worker.messages import Generate
from warmroute_worker.model_config import ModelError
from warmroute_worker.models.whole_decoder import WholeDecoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from warmroute_worker.engine import Engine
    from warmroute_worker.step_plan import StepPlan

PROMPTS = [[(7 * n + 3 * k * k + k) % VOCAB_SIZE for k in range(length)] for n, length in enumerate((1, 9, 33, 70))]
NEW = 6
IN_ONE_CALL = pytest.mark.skipif(
    not native.Matrix.usable, reason="without AVX2 steps are computed operation by operation"
)


class Recorded:
    """An engine, and the logits of every token it drew, by request and place."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        # One step after the other, or nobody sees the logits.
        self.engine: Engine = load_engine(folder, num_continuous_decode_steps=1, **changes)
        self.logits: dict[tuple[str, int], torch.Tensor] = {}
        executor = self.engine.executor
        assert isinstance(executor, RankExecutor)
        forward = executor.rank.runner.forward

        def recording(plan: StepPlan, before: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor | None:
            logits = forward(plan, before)
            if logits is not None:
                drawn = [chunk.request for chunk in self.engine.scheduler._under_way[-1] if chunk.samples]
                for request, row in zip(drawn, logits, strict=True):
                    self.logits[request.rid, request.num_new] = row.clone()
            return logits

        executor.rank.runner.forward = recording  # type: ignore[method-assign]

    def run(self, names: dict[str, list[int]]) -> dict[tuple[str, int], torch.Tensor]:
        for rid, prompt in names.items():
            self.engine.scheduler.add(Generate(rid, prompt, NEW, sampling=GREEDY))
        while not self.engine.is_idle:
            self.engine.step()
        return self.logits


def differing(folder: Path, **changes: Any) -> int:
    """In how many rows of logits any bit differs from those of a request alone, over all ways to compute it."""
    alone: dict[tuple[str, int], torch.Tensor] = {}
    for n, prompt in enumerate(PROMPTS):
        alone |= Recorded(folder, **changes).run({str(n): prompt})
    found = 0

    def compare(logits: dict[tuple[str, int], torch.Tensor]) -> None:
        nonlocal found
        for key, row in alone.items():
            found += not torch.equal(row, logits[key])

    everybody = {str(n): prompt for n, prompt in enumerate(PROMPTS)}
    draw = random.Random(0)
    company = {f"x{k}": [draw.randrange(VOCAB_SIZE) for _ in range(draw.randrange(1, 50))] for k in range(7)}
    for chunk in (-1, 16, 17, 64):
        recorded = Recorded(folder, chunked_prefill_size=chunk, **changes)
        compare(recorded.run(company | everybody))
        compare(recorded.run(everybody))  # warm
    compare(Recorded(folder, max_total_tokens=160, **changes).run(company | everybody))  # retracted
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_depends_on_company(tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family)
    assert differing(tmp_path, enable_deterministic_inference=True) == 0


def test_without_the_flag_bits_do_depend_on_company(tmp_path: Path) -> None:
    """So the test above can fail."""
    make_model(tmp_path, "Llama")
    assert differing(tmp_path) > 20


@IN_ONE_CALL
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_step_in_one_call_has_the_bits_of_its_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    make_model(tmp_path, family)
    everybody = {str(n): prompt for n, prompt in enumerate(PROMPTS)}
    steps = 0
    real = WholeDecoder.__call__

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        nonlocal steps
        steps += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(WholeDecoder, "__call__", counted)
    whole = Recorded(tmp_path).run(everybody)
    assert steps == NEW - 1
    monkeypatch.setattr(model_runner, "is_whole", lambda _: False)
    single = Recorded(tmp_path).run(everybody)
    assert steps == NEW - 1
    assert whole.keys() == single.keys()
    assert all(torch.equal(row, single[key]) for key, row in whole.items())


@IN_ONE_CALL
def test_without_memory_for_more_logits_a_step_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, "Llama")
    everybody = {str(n): prompt for n, prompt in enumerate(PROMPTS)}
    wanted = Recorded(tmp_path).run(everybody)
    empty, failures = torch.empty, iter([False, True])

    def refused(shape: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if shape == (len(PROMPTS), VOCAB_SIZE) and next(failures, False):
            raise RuntimeError("not enough memory: you tried to allocate logits")
        return empty(shape, *args, **kwargs)

    recorded = Recorded(tmp_path)
    monkeypatch.setattr(torch, "empty", refused)
    assert recorded.run(everybody).keys() == wanted.keys()
    assert next(failures, None) is None
    assert recorded.engine.scheduler.retractions_total > 0
    assert all(torch.allclose(row, wanted[key], atol=2e-4) for key, row in recorded.logits.items())


def test_it_is_refused_where_it_does_not_hold(tmp_path: Path) -> None:
    make_model(tmp_path, "Llama")
    with pytest.raises(ModelError, match="--enable-deterministic-inference is for float32 on CPU"):
        load_engine(tmp_path, enable_deterministic_inference=True, dtype="bfloat16")
