"""What is done to a running engine: pauses, traces; and what happens when memory runs out. Real model, real ranks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.worker.engine_fixtures import GREEDY, greedy, load_engine, make_reference
from tests.worker.test_engine_ranks import answers, ranks
from warmroute_worker.executor import model_runner
from warmroute_worker.executor.ranks import RankExecutor, failure
from warmroute_worker.messages import Generate
from warmroute_worker.model_config import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.worker.engine_fixtures import Reference
    from warmroute_worker.step_plan import StepPlan


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("retract", [False, True], ids=["in place", "retract"])
@pytest.mark.parametrize("pp", [1, 2])
def test_a_pause_changes_no_token(llama: Reference, retract: bool, pp: int) -> None:
    with ranks(llama.folder, 1, pp, num_continuous_decode_steps=2) as (engine, _):
        for n, prompt in enumerate(llama.prompts):
            engine.scheduler.add(Generate(str(n), prompt, 32, sampling=GREEDY))
        said: dict[str, list[int]] = {}

        def hear(outputs: list[Any]) -> None:
            for row in (row for output in outputs for row in output.rows):
                said.setdefault(row.rid, []).extend(row.token_ids)

        hear([engine.step() for _ in range(6)])
        engine.is_paused = True
        while not engine.is_settled:
            hear([engine.step()])
        if retract:
            engine.scheduler.retract_all()
        engine.scheduler.check_integrity()
        assert (engine.scheduler.load().running == 0) is retract
        if retract:
            engine.cache.flush()  # nobody holds a page
            assert engine.cache.num_available == engine.cache.num_pages
        engine.is_paused = False
        while not engine.is_idle:
            hear([engine.step()])
        assert [said[str(n)] for n in range(len(llama.prompts))] == llama.answers


def failing(times: int, error: BaseException) -> Callable[[RankExecutor], list[int]]:
    """Let the next steps of an executor fail; gives the sizes of all steps."""

    def install(executor: RankExecutor) -> list[int]:
        forward, sizes = executor.rank.runner.forward, list[int]()

        def short(plan: StepPlan, before: Any = None) -> torch.Tensor | None:
            sizes.append(len(plan.token_ids))
            if len(sizes) <= times:
                raise error
            return forward(plan, before)

        executor.rank.runner.forward = short  # type: ignore[method-assign]
        return sizes

    return install


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    ],
    ids=["numpy", "cpu", "cuda"],
)
def test_a_step_without_memory_is_done_again_with_less(llama: Reference, error: BaseException) -> None:
    engine = load_engine(llama.folder, chunked_prefill_size=128)
    executor = engine.executor
    assert isinstance(executor, RankExecutor)
    sizes = failing(2, error)(executor)
    assert answers(greedy(engine, llama.prompts)) == llama.answers
    assert sizes[:2] == [128 + 1, 64 + 1]  # the first prompt is one token, which counts as decoding
    assert max(sizes[2:]) <= 32 + len(llama.prompts)
    engine.scheduler.check_integrity()


def test_what_never_fits_is_refused_and_the_worker_lives(llama: Reference) -> None:
    engine = load_engine(llama.folder)
    executor = engine.executor
    assert isinstance(executor, RankExecutor)
    failing(8, MemoryError())(executor)
    [row] = greedy(engine, llama.prompts[-1:])
    assert row.finish_reason == "error"
    assert row.error is not None
    assert "the step ran out of memory" in row.error
    assert answers(greedy(engine, llama.prompts)) == llama.answers


def test_another_error_is_not_taken_for_that(llama: Reference) -> None:
    engine = load_engine(llama.folder)
    executor = engine.executor
    assert isinstance(executor, RankExecutor)
    failing(1, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))(executor)
    with pytest.raises(RuntimeError, match="mat1"):
        greedy(engine, llama.prompts)


def test_a_trace_of_every_rank(llama: Reference, tmp_path: Path) -> None:
    """It parses, and the sums are in it on both."""
    with ranks(llama.folder, 2) as (engine, _):
        assert engine.profile(None) == (False, "there is no trace to end")
        assert engine.profile(str(tmp_path / "traces")) == (True, f"tracing every rank into {tmp_path}/traces")
        assert engine.profile(str(tmp_path)) == (False, "a trace is being made already")
        assert answers(greedy(engine, llama.prompts[:2])) == llama.answers[:2]
        done, said = engine.profile(None)
        assert done, said
        assert "written: " in said
        assert answers(greedy(engine, llama.prompts[:2])) == llama.answers[:2]
    traces = sorted((tmp_path / "traces").iterdir())
    assert [path.name[:5] for path in traces] == ["rank0", "rank1"]
    for path in traces:
        names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
        steps = sum(name.startswith("step ") for name in names)
        assert steps >= 32
        assert names.count("all_reduce") == steps * (2 * 3 + 1)


@pytest.mark.parametrize("name", ["xpu", "npu"])
def test_devices_that_this_torch_does_not_have(llama: Reference, name: str) -> None:
    with pytest.raises(ModelError, match=f"--device {name}: torch.{name} is not available in this build"):
        load_engine(llama.folder, device=name)


@pytest.mark.parametrize(
    ("asked", "effective"), [("auto", "native"), ("torch_native", "torch_native"), ("fa3", "torch_native")]
)
def test_attention_backends(llama: Reference, asked: str, effective: str) -> None:
    engine = load_engine(llama.folder, attention_backend=asked)
    assert engine.ready.attention_backend == effective
    assert answers(greedy(engine, llama.prompts)) == llama.answers


def test_with_several_ranks_a_step_without_memory_ends_the_worker_with_advice(llama: Reference) -> None:
    """The others wait for this rank's sums, so it cannot be done again."""
    with ranks(llama.folder, 2) as (engine, _):
        executor = engine.executor
        assert isinstance(executor, RankExecutor)
        failing(1, MemoryError("12 GiB"))(executor)
        with pytest.raises(MemoryError) as error:
            greedy(engine, llama.prompts[:1])
        assert failure(error.value).startswith("MemoryError: 12 GiB; start with a lower --mem-fraction-static")
        executor.links.abort("over")


def test_threads_are_woken_where_it_pays() -> None:
    """What was measured: see `model_runner.SINGLE_THREAD_MULTIPLICATIONS`."""
    demo = model_runner.single_thread_tokens(12 << 20, 3 << 20, 16)
    assert 64 <= demo <= 192
    medium = model_runner.single_thread_tokens(96 << 20, 24 << 20, 32)
    assert 8 <= medium <= 32
    assert model_runner.single_thread_tokens(380 << 20, 95 << 20, 32) < 8
    assert model_runner.single_thread_tokens(16 << 30, 4 << 30, 128) == 0
