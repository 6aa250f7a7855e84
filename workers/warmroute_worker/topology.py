"""Which rank does what: coordinates, groups, and shares of what is divided. Pure, and the only place where it is said.

A rank is one process. Ranks are numbered stage by stage, within a stage by tensor-parallel rank. Rank 0 is the driver:
it schedules, the others do what it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GroupPlan = tuple[str, tuple[int, ...], int, int]
"""Name, ranks, slots of each rank, bytes of a slot: what `_native.Region` is made from."""

PLAN_SLOT_BYTES = 64 << 10
"""A decode step of 256 requests is 10 KB of plan; longer ones take several operations."""

TENSOR_SLOT_BYTES = 256 << 10
"""Sums of larger vectors are taken piece by piece, each of which stays in the cache of the core that wrote it."""

RING = 16
"""Slots where a sender runs ahead of its receivers. A message takes two: 8 stages can have one under way each."""


@dataclass(frozen=True)
class Layout:
    """The ranks of one worker."""

    tp_size: int = 1
    pp_size: int = 1

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def __str__(self) -> str:
        sizes = {"tp": self.tp_size, "pp": self.pp_size}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"there is no rank {rank} of {self.world_size}")
        return Place(self, rank, rank // self.tp_size, rank % self.tp_size)

    def stage(self, pp_rank: int) -> tuple[int, ...]:
        """The ranks of a stage, by tensor-parallel rank."""
        return tuple(range(pp_rank * self.tp_size, (pp_rank + 1) * self.tp_size))

    def groups(self) -> list[GroupPlan]:
        """All groups, in the same order on every rank."""
        groups: list[GroupPlan] = [("plans", tuple(range(self.world_size)), RING, PLAN_SLOT_BYTES)]
        groups += [(f"tp of stage {n}", self.stage(n), 2, TENSOR_SLOT_BYTES) for n in range(self.pp_size)]
        for stage in range(self.pp_size - 1):
            pairs = zip(self.stage(stage), self.stage(stage + 1), strict=True)
            name = f"stage {stage} to {stage + 1}, tp"
            groups += [(f"{name} {tp_rank}", pair, RING, TENSOR_SLOT_BYTES) for tp_rank, pair in enumerate(pairs)]
        if self.pp_size > 1:
            groups.append(("tokens", (0, self.world_size - self.tp_size), RING, PLAN_SLOT_BYTES))
        return groups

    def group_index(self, name: str) -> int:
        """Place of a group in `groups`."""
        return [group[0] for group in self.groups()].index(name)


@dataclass(frozen=True)
class Place:
    """One rank's coordinates."""

    layout: Layout
    rank: int
    pp_rank: int
    tp_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp_size - 1

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn here."""
        return self.is_last_stage and self.tp_rank == 0

    def __str__(self) -> str:
        """As errors and logs name it."""
        parts = [f"tp {self.tp_rank}"] if self.layout.tp_size > 1 else []
        if self.layout.pp_size > 1:
            parts.append(f"pp {self.pp_rank}")
        return f"rank {self.rank}" + (f" ({', '.join(parts)})" if parts else "")


def share(total: int, rank: int, size: int) -> range:
    """What of `total` things belongs to `rank` of `size`: a run each, of lengths that differ by one at most."""
    return range(total * rank // size, total * (rank + 1) // size)


def kv_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> list[int]:
    """The KV heads that `rank` caches, one per equally long run of its query heads.

    With as many ranks as KV heads or fewer each rank has its own; with more, ranks share one; where query groups do not
    fall on the borders of ranks, a head may stand twice. `size` must divide `num_heads`.
    """
    per_rank, per_group = num_heads // size, num_heads // num_kv_heads
    run = math.gcd(per_rank, per_group)
    return [(rank * per_rank + first) // per_group for first in range(0, per_rank, run)]
