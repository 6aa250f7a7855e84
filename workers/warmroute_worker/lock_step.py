"""Data-parallel ranks that share MLPs and experts must step together: also who has nothing to do takes part in each.

Before each step the drivers exchange a record (how many tokens, what kind). When nobody has any, all sleep. Who gets
work then tells the others through the HTTP process (`messages.Wake`) in which round it waits for them; a word that
comes late, about a round that is over, wakes nobody.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from warmroute_worker.step_plan import RECORD_NUMBERS

if TYPE_CHECKING:
    from warmroute_worker.executor.executor import Executor
    from warmroute_worker.step_plan import StepPlan


class LockStep:
    """One driver's view."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.round = 0
        """Records exchanged so far."""
        self.is_awake = False
        """The others will come to the next round."""

    def joined(self, plan: StepPlan, under_way: int) -> StepPlan:
        """The plan, with what everybody does in its step. `under_way`: plans before it, as many at every driver."""
        records = self._executor.exchange_records(plan.record.encode())
        self.round += 1
        everybody = np.frombuffer(b"".join(records), np.int64).reshape(-1, RECORD_NUMBERS)
        plan = dataclasses.replace(plan, everybody=everybody)
        self.is_awake = not plan.is_idle or under_way > 0
        return plan

    def wake(self, round_: int) -> None:
        """Somebody waits in that round."""
        if round_ > self.round:
            self.is_awake = True
