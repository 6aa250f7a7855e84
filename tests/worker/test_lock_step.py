"""Who is awake, of data-parallel ranks that go in step: `LockStep` without processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from warmroute_worker.lock_step import LockStep
from warmroute_worker.scheduler.batch import step_plan
from warmroute_worker.step_plan import DECODE, IDLE, NO_SAMPLING, Record

if TYPE_CHECKING:
    from warmroute_worker.executor.executor import Executor

NOTHING = Record(0, 0, IDLE)


class _Others:
    """An executor whose second rank does what the test says."""

    def __init__(self) -> None:
        self.other = NOTHING

    def exchange_records(self, record: bytes) -> list[bytes]:
        return [record, self.other.encode()]


def test_who_is_awake() -> None:
    others = _Others()
    ranks = LockStep(cast("Executor", others))
    idle = step_plan([], [], NO_SAMPLING)
    others.other = Record(1, 1, DECODE)
    plan = ranks.joined(idle, 0)
    assert (plan.is_idle, ranks.is_awake, ranks.round) == (False, True, 1)

    others.other = NOTHING
    assert ranks.joined(idle, 1).is_idle
    assert ranks.is_awake, "of the plan before there is something left to do"
    ranks.joined(idle, 0)
    assert (ranks.is_awake, ranks.round) == (False, 3)


def test_a_word_about_a_round_that_is_over_wakes_nobody() -> None:
    """Nobody else would come to the next one."""
    ranks = LockStep(cast("Executor", _Others()))
    for _ in range(2):
        ranks.joined(step_plan([], [], NO_SAMPLING), 0)
    for over in (1, 2):
        ranks.wake(over)
        assert not ranks.is_awake
    ranks.wake(3)
    assert ranks.is_awake
