"""Each symptom in the guide's table: it is made, and what is said is what the guide says, with the remedy."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING

import pytest

from tests.processes import REPOSITORY
from tests.worker.engine_fixtures import load_engine, make_model
from tests.worker.test_engine_controls import failing
from tests.worker.test_engine_ranks import ranks
from warmroute_worker import metrics, topology
from warmroute_worker._native import Region
from warmroute_worker.args import WorkerArgs
from warmroute_worker.child_process import ending
from warmroute_worker.comm.rank_links import CollectiveError, RankLinks
from warmroute_worker.executor.ranks import RankExecutor
from warmroute_worker.messages import Generate
from warmroute_worker.model_config import ModelError, check_layout, read
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from warmroute_worker.step_plan import StepPlan

GUIDE = (REPOSITORY / "docs" / "worker.md").read_text().partition("## Troubleshooting")[2]
ROWS = [line.split("|")[1:3] for line in GUIDE.splitlines() if line.startswith("| ") and "what you see" not in line]


def _sleep() -> None:
    time.sleep(60)


def _deadlock_at_start(folder: Path, _: pytest.LogCaptureFixture) -> str:
    with (
        pytest.raises(CollectiveError) as error,
        ranks(folder, 2, prepare=_sleep, watchdog_timeout=0.5),
    ):
        pass
    return str(error.value).replace("0.5 s", "305 s")


def _heads(folder: Path, _: pytest.LogCaptureFixture) -> str:
    with pytest.raises(ModelError) as error, ranks(folder, 3):
        pass
    return str(error.value)


def _constraint(folder: Path, _: pytest.LogCaptureFixture) -> str:
    with pytest.raises(ValueError, match="can be 1, 2, 4") as error:
        WorkerArgs(str(folder), "m", tp_size=4, dp_size=3, enable_dp_attention=True)
    return str(error.value)


def _dp_attention_off(folder: Path, _: pytest.LogCaptureFixture) -> str:
    args = WorkerArgs(str(folder), "m", tp_size=2, enable_dp_attention=True)
    assert args.effective()["enable_dp_attention"] is False
    return "\n".join(args.remarks())


def _no_experts(folder: Path, _: pytest.LogCaptureFixture) -> str:
    with pytest.raises(ModelError) as error:
        check_layout(read(folder), topology.Layout(tp_size=2, ep_size=2))
    return str(error.value)


def _peers(folder: Path, _: pytest.LogCaptureFixture) -> str:
    """Two mappings of different memory: what one writes, the other does not see."""
    del folder
    layout = topology.Layout(tp_size=2)
    region = Region(Region.memory_file(2, layout.groups()), 2, layout.groups())
    links = RankLinks(layout.place(0), region, 5.0, 2)
    links._all = _Deaf()  # type: ignore[assignment]
    with pytest.raises(CollectiveError) as error:
        links.measure_reach()
    return str(error.value)


class _Deaf:
    def barrier(self) -> None: ...

    def message(self, message: bytes | None, root: int) -> bytes:
        del root
        return b"?" if message is None else message


def _no_room(folder: Path, _: pytest.LogCaptureFixture) -> str:
    with pytest.raises(StartupError) as error:
        load_engine(folder, mem_fraction_static=1e-6)
    return str(error.value)


def _step_without_memory(folder: Path, log: pytest.LogCaptureFixture) -> str:
    engine = load_engine(folder)
    assert isinstance(engine.executor, RankExecutor)
    failing(1, MemoryError())(engine.executor)
    engine.scheduler.add(Generate("r", [1, 2, 3], 2))
    with log.at_level(logging.WARNING):
        while not engine.is_idle:
            engine.step()
    return log.text


def _killed(folder: Path, _: pytest.LogCaptureFixture) -> str:
    del folder  # test_rank_failures.py kills real ones
    return f"rank 1 (tp 1), pid 17, {ending(-9)}"


def _hung(folder: Path, _: pytest.LogCaptureFixture) -> str:
    del folder  # test_rank_failures.py stops real ones
    from warmroute_worker.watchdog import Watchdog

    watchdog = Watchdog(topology.Layout(tp_size=2), 300)
    watchdog.observe([{"heartbeat": 1, "pid": 16}, {"heartbeat": 1, "pid": 17}], 0)
    return str(watchdog.observe([{"heartbeat": 2, "pid": 16}, {"heartbeat": 1, "pid": 17}], 300))


def _slow_sums(folder: Path, _: pytest.LogCaptureFixture) -> str:
    with ranks(folder, 2) as (engine, region):
        engine.scheduler.add(Generate("r", [1, 2, 3], 8))
        while not engine.is_idle:
            engine.step()
        assert all(region.status(rank)[name] > 0 for rank in (0, 1) for name in ("comm_ns", "busy_ns"))
    return "tensor parallelism makes it slower"


def _bubbles(folder: Path, _: pytest.LogCaptureFixture) -> str:
    """One request keeps one of two stages busy at a time, many keep both."""

    def run(requests: int) -> tuple[float, int]:
        """The metric, and how many plans were under way at most."""
        most = 0
        with ranks(folder, 1, 2) as (engine, region):
            submit = engine.executor.submit

            def counted(plan: StepPlan) -> None:
                nonlocal most
                submit(plan)
                most = max(most, engine._under_way + 1)

            engine.executor.submit = counted  # type: ignore[method-assign]
            for n in range(requests):
                engine.scheduler.add(Generate(str(n), [n, 2, 3], 64, ignore_eos=True))
            while not engine.is_idle:
                engine.step()
            statuses = [{"tp_rank": 0, **region.status(rank)} for rank in (0, 1)]
            ratio = metrics.bubble_ratio(statuses)
            assert ratio is not None
            return ratio, most

    alone, one_plan = run(1)
    assert alone > 0.45
    assert one_plan == 1
    # How much less the second stage waits then depends on who else uses the machine; that it has work does not.
    together, two_plans = run(16)
    assert 0 < together < 1
    assert two_plans == 2
    return "warmroute_worker_pp_bubble_ratio"


CASES: list[tuple[str, Callable[[Path, pytest.LogCaptureFixture], str], str]] = [
    ("did not come to barrier", _deadlock_at_start, "--watchdog-timeout"),
    ("does not divide the model's 4 attention heads", _heads, "1, 2, 4"),
    ("Constraint tp_size % dp_size == 0 not satisfied", _constraint, "sizes that the line names"),
    ("DP attention changes nothing", _dp_attention_off, "`--dp-size` above 1"),
    ("the model has no routed experts", _no_experts, "leave `--ep-size` out"),
    ("peer access is not supported between these two devices", _peers, "--disable-custom-all-reduce"),
    ("not enough memory", _no_room, "--mem-fraction-static"),
    ("a step ran out of memory", _step_without_memory, "--chunked-prefill-size"),
    ("was killed by SIGKILL", _killed, "--mem-fraction-static"),
    ("has shown no life", _hung, "computes something endless"),
    ("tensor parallelism makes it slower", _slow_sums, "--pp-size"),
    ("pp_bubble_ratio", _bubbles, "as many requests at once as it has stages"),
]


def test_the_table_and_the_cases_are_the_same() -> None:
    assert len(ROWS) == len(CASES)
    for (symptom, _), (words, _, _) in zip(ROWS, CASES, strict=True):
        assert words in symptom


@pytest.mark.parametrize(
    ("words", "make", "remedy"),
    [
        pytest.param(*case, id=case[0], marks=pytest.mark.slow if case[1] is _deadlock_at_start else ())
        for case in CASES
    ],
)
def test_a_symptom(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    words: str,
    make: Callable[[Path, pytest.LogCaptureFixture], str],
    remedy: str,
) -> None:
    make_model(tmp_path, "Llama")
    said = make(tmp_path, caplog)
    [(symptom, advice)] = [row for row in ROWS if words in row[0]]
    assert remedy in symptom + advice
    for quoted in re.findall("`([^`]*)`", symptom):
        for part in quoted.split(" ... "):
            assert part.removesuffix(" ...") in said, (part, said)
