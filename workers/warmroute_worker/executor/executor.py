"""The seam between deciding and computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from warmroute_worker.messages import TokenLogprobs
    from warmroute_worker.step_plan import StepPlan


@dataclass(frozen=True)
class ExecutorFacts:
    """What an executor found and chose while it started."""

    context_length: int
    num_pages: int
    """Pages of the KV pool that the scheduler may give away."""
    dtype: str
    device: str
    weight_bytes: int
    kv_pool_bytes: int


class Executor(Protocol):
    """Runs plans in the order they are given. One in this process now; a group of ranks can stand behind it later."""

    @property
    def facts(self) -> ExecutorFacts: ...

    def execute(self, plan: StepPlan) -> tuple[Sequence[int], Mapping[int, TokenLogprobs]]:
        """The sampled tokens of a plan, in its order, and the logprobs that were asked for, by place in that order."""
        ...
