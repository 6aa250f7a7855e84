"""--enable-torch-compile: the same tokens, really compiled, all of it at start; and what stands in its way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.worker.engine_fixtures import GREEDY, greedy, load_engine, make_llama, make_model, make_reference
from tests.worker.worker_process import worker_process
from warmroute_worker import offline
from warmroute_worker.args import WorkerArgs
from warmroute_worker.executor.ranks import RankExecutor
from warmroute_worker.layers import compiled_mlp
from warmroute_worker.layers.compiled_mlp import CompiledMlp
from warmroute_worker.messages import Generate
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Compiling, on a busy machine.
pytestmark = pytest.mark.timeout(300)


class Counted:
    """The compiled function, and how often it was called."""

    def __init__(self, real: Callable[..., torch.Tensor]) -> None:
        self._real = real
        self.rows: list[int] = []

    def __call__(self, x: torch.Tensor, *weights: Any) -> torch.Tensor:
        self.rows.append(len(x))
        return self._real(x, *weights)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    function = Counted(compiled_mlp.compiled())
    monkeypatch.setattr(compiled_mlp, "compiled", lambda: function)
    return function


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("Llama", {"mlp_bias": True}), ("DeepseekV3", {}), ("Qwen2Moe", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_same_tokens_and_nothing_is_compiled_later(
    tmp_path: Path, counted: Counted, family: str, changes: dict[str, Any]
) -> None:
    reference = make_reference(tmp_path, family=family, **changes)
    engine = load_engine(reference.folder, enable_torch_compile=True, threads=2)
    executor = engine.executor
    assert isinstance(executor, RankExecutor)
    mlps = executor.rank.runner.model.compiled_mlps()
    assert len(mlps) == 3
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    counted.rows.clear()
    # Also steps that several threads compute.
    for single_thread_tokens in (10**6, 0):
        executor.rank.runner._single_thread_tokens = single_thread_tokens
        for prompts in (reference.prompts, reference.prompts[5:6]):
            engine.scheduler.flush(1)
            steps = executor.rank._steps
            calls = len(counted.rows)
            rows = greedy(engine, prompts)
            assert [row.token_ids for row in rows] == [
                answer for prompt, answer in zip(reference.prompts, reference.answers, strict=True) if prompt in prompts
            ]
            assert len(counted.rows) - calls == 3 * (executor.rank._steps - steps), "every layer, in every step"
    assert {1, 8} < set(counted.rows)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "requests do not wait for the compiler"


@pytest.mark.slow
def test_on_two_ranks(tmp_path: Path) -> None:
    reference = make_reference(tmp_path)
    args = WorkerArgs(
        str(tmp_path), "tiny", device="cpu", threads=1, max_total_tokens=4096, tp_size=2, enable_torch_compile=True
    )
    with offline.ranks(args) as (engine, _):
        assert [row.token_ids for row in greedy(engine, reference.prompts)] == reference.answers


def test_a_layer_is_computed_with_the_compiled_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither our own products nor the native decode step hide it. Nothing is compiled here."""
    make_llama(tmp_path)
    plain = load_engine(tmp_path, num_continuous_decode_steps=1)
    function = Counted(compiled_mlp._gated_mlp)
    monkeypatch.setattr(compiled_mlp, "compiled", lambda: function)
    engine = load_engine(tmp_path, enable_torch_compile=True)
    assert sorted(set(function.rows)) == [1, 2], "before it is ready"
    function.rows.clear()
    answers = []
    for each in (plain, engine):
        each.scheduler.add(Generate("r", [5, 17, 99], 4, sampling=GREEDY))
        rows = []
        while not each.is_idle:
            rows += each.step().rows
        answers.append([row.token_ids for row in rows])
    assert answers[0] == answers[1]
    assert function.rows == [3] * 3 + [1] * 9
    executor = engine.executor
    assert isinstance(executor, RankExecutor)
    [first, *_] = executor.rank.runner.model.compiled_mlps()
    assert isinstance(first, CompiledMlp)
    assert first(torch.zeros(0, 64)).shape == (0, 64)


def test_the_log_says_what_compiling_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_llama(tmp_path)
    monkeypatch.setattr(compiled_mlp, "warm_up", lambda mlps, threads: 22.04)
    load_engine(tmp_path, enable_torch_compile=True)
    [warning] = [record.message for record in caplog.records if "torch-compile" in record.message]
    assert "compiling took 22.0 s; on a CPU steps are usually slower" in warning
    assert WorkerArgs("m", "m", enable_torch_compile=True).effective()["enable_torch_compile"] is True


@pytest.mark.slow
def test_without_a_compiler_the_worker_says_what_is_missing(tmp_path: Path) -> None:
    make_llama(tmp_path)
    flags = ["--model-path", str(tmp_path), "--device", "cpu", "--max-total-tokens", "256", "--port", "0"]
    (tmp_path / "tokenizer.json").write_text(TOKENIZER)
    cache = str(tmp_path / "cache")
    with worker_process(
        *flags, "--enable-torch-compile", CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=cache
    ) as worker:
        assert worker.wait(120) != 0
    [line] = worker.stderr
    assert "--enable-torch-compile: torch cannot compile here (" in line
    assert "No working C++ compiler found" in line
    assert line.endswith("install a C++ compiler (g++, or another one that CXX names), or remove the flag\n")


TOKENIZER = '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_a_model_without_anything_to_compile_is_refused(tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family)
    with pytest.raises(StartupError, match="has neither; remove it"):
        load_engine(tmp_path, enable_torch_compile=True)
