"""The seam between deciding and computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from warmroute_worker.messages import TokenLogprobs
    from warmroute_worker.step_plan import StepPlan

    Drawn = tuple[list[int], Mapping[int, TokenLogprobs]]
    """The sampled tokens of a plan, in its order, step by step, and the logprobs that were asked for, by place in that
    order; prompt tokens have the places after the last."""


@dataclass(frozen=True)
class ExecutorFacts:
    """What an executor found and chose while it started."""

    context_length: int
    num_pages: int
    """Pages of the KV pool that the scheduler may give away."""
    dtype: str
    device: str
    weight_bytes: int
    """Of all ranks together, as is the next."""
    kv_pool_bytes: int
    load_seconds: float
    attention_backend: str
    collectives: str
    """What carries sums between ranks."""
    depth: int
    """Plans that may be under way at once: with fewer, some rank has nothing to do."""
    goes_on: bool = False
    """Decode steps may follow each other in one plan."""


class StepOutOfMemoryError(Exception):
    """A step did not run, and nothing of it counts."""


class Executor(Protocol):
    """Runs plans in the order they are given."""

    @property
    def facts(self) -> ExecutorFacts: ...

    def submit(self, plan: StepPlan) -> None:
        """Begin a step. Raises StepOutOfMemoryError."""
        ...

    def collect(self) -> Drawn:
        """What the oldest plan brought that has not been collected."""
        ...

    def heed(self, descriptor: int) -> None:
        """Let no step follow another in the same plan while there is something to read there."""
        ...

    def exchange_records(self, record: bytes) -> list[bytes]:
        """What the drivers of all data-parallel ranks say."""
        ...

    def profile(self, folder: str | None) -> tuple[bool, str]:
        """Begin a trace of every rank into `folder`, or with None end it; whether it could, and a line for the user."""
        ...

    def order(self, text: str) -> tuple[bool, str]:
        """Let every rank `start experts`, `stop experts` or `dump experts:FOLDER` (count for how many rows each is
        chosen, and write that down); whether it could, and a line for the user."""
        ...

    def close(self) -> None:
        """No plan will follow."""
        ...
