"""Which rank does what: coordinates, groups, and shares of what is divided. Pure, and the only place where it is said.

A rank is one process. Ranks are numbered replica by replica, within it stage by stage, within a stage by
tensor-parallel rank. A data-parallel rank has one driver, which schedules, and the others do what it says.

Data-parallel ranks are either whole replicas, or, with DP attention, parts of one: the tensor-parallel ranks of a stage
are then divided among them for attention, and all of them together hold the MLPs and experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

GroupPlan = tuple[str, tuple[int, ...], int, int]
"""Name, ranks, slots of each rank, bytes of a slot: what `_native.Region` is made from."""

PLAN_SLOT_BYTES = 64 << 10
"""A decode step of 256 requests is 10 KB of plan; longer ones take several operations."""

TENSOR_SLOT_BYTES = 256 << 10
"""Sums of larger vectors are taken piece by piece, each of which stays in the cache of the core that wrote it."""

RECORD_SLOT_BYTES = 4 << 10
"""What the drivers tell each other before each step is 64 bytes; what ranks say at start is a line of text."""

RING = 16
"""Slots where a sender runs ahead of its receivers. A message takes two: 8 stages can have one under way each."""

TENSOR_GROUPS = ("tp", "experts", "attention")
"""How the names of groups begin that divide tensors."""


@dataclass(frozen=True)
class Layout:
    """The ranks of one worker."""

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    """Schedulers, each with a prefix cache and a pool of its own."""
    dp_attention: bool = False
    """The data-parallel ranks are parts of one replica."""
    ep_size: int = 1
    """Parts into which the experts of a layer are divided; what is left of the ranks divides each expert."""

    @property
    def num_replicas(self) -> int:
        return 1 if self.dp_attention else self.dp_size

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.num_replicas

    @property
    def attention_tp_size(self) -> int:
        """Ranks among which the heads of a layer are divided."""
        return self.tp_size // self.dp_size if self.dp_attention else self.tp_size

    @property
    def expert_tp_size(self) -> int:
        """Ranks among which each expert is divided."""
        return self.tp_size // self.ep_size

    def __str__(self) -> str:
        dp = "dp attention" if self.dp_attention else "dp"
        sizes = {"tp": self.tp_size, "pp": self.pp_size, dp: self.dp_size, "ep": self.ep_size}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)

    def place(self, rank: int) -> Place:
        """Where `rank` stands."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"there is no rank {rank} of {self.world_size}")
        replica, within = divmod(rank, self.tp_size * self.pp_size)
        return Place(self, rank, replica, *divmod(within, self.tp_size))

    def places(self) -> list[Place]:
        """All of them, by rank."""
        return [self.place(rank) for rank in range(self.world_size)]

    def driver(self, dp_rank: int) -> int:
        """The rank that schedules for a data-parallel rank."""
        return dp_rank * (self.attention_tp_size if self.dp_attention else self.tp_size * self.pp_size)

    def drivers(self) -> tuple[int, ...]:
        """By data-parallel rank."""
        return tuple(map(self.driver, range(self.dp_size)))

    def stage(self, replica: int, pp_rank: int) -> tuple[int, ...]:
        """The ranks of a stage, by tensor-parallel rank."""
        first = (replica * self.pp_size + pp_rank) * self.tp_size
        return tuple(range(first, first + self.tp_size))

    def groups(self) -> list[GroupPlan]:
        """All groups of more than one rank, in the same order on every rank."""
        groups: list[GroupPlan] = [("all", tuple(range(self.world_size)), 2, RECORD_SLOT_BYTES)]
        for dp_rank in range(self.dp_size):
            members = tuple(place.rank for place in self.places() if place.dp_rank == dp_rank)
            groups.append((f"plans of dp {dp_rank}", members, RING, PLAN_SLOT_BYTES))
        if self.dp_attention:
            groups.append(("drivers", self.drivers(), 2, RECORD_SLOT_BYTES))
        stages = [(replica, pp_rank) for replica in range(self.num_replicas) for pp_rank in range(self.pp_size)]
        for replica, pp_rank in stages:
            name, ranks = stage_name(replica, pp_rank), self.stage(replica, pp_rank)
            groups.append((f"tp of {name}", ranks, 2, TENSOR_SLOT_BYTES))
            if self.ep_size > 1:
                groups.append((f"experts of {name}", ranks, 2, TENSOR_SLOT_BYTES))
            if self.dp_attention:
                size = self.attention_tp_size
                for dp_rank in range(self.dp_size):
                    own = ranks[dp_rank * size : (dp_rank + 1) * size]
                    groups.append((f"attention of dp {dp_rank}, {name}", own, 2, TENSOR_SLOT_BYTES))
        for replica, pp_rank in stages:
            if pp_rank + 1 < self.pp_size:
                pairs = zip(self.stage(replica, pp_rank), self.stage(replica, pp_rank + 1), strict=True)
                groups += [(f"from rank {pair[0]} to {pair[1]}", pair, RING, TENSOR_SLOT_BYTES) for pair in pairs]
        if self.pp_size > 1:
            for dp_rank, driver in enumerate(self.drivers()):
                last = driver + (self.pp_size - 1) * self.tp_size
                groups.append((f"tokens of dp {dp_rank}", (driver, last), RING, PLAN_SLOT_BYTES))
        return [group for group in groups if len(group[1]) > 1]


@dataclass(frozen=True)
class Nodes:
    """Which ranks are on which node: as many on each, one after the other. A node is one launcher."""

    layout: Layout
    count: int = 1
    own: int = 0
    """The node whose view this is."""

    @property
    def local_ranks(self) -> range:
        return self.ranks_of(self.own)

    def ranks_of(self, node: int) -> range:
        each = self.layout.world_size // self.count
        return range(node * each, (node + 1) * each)

    def node_of(self, rank: int) -> int:
        return rank // (self.layout.world_size // self.count)

    def divided(self, members: Sequence[int]) -> dict[int, tuple[int, ...]]:
        """Members of a group, by node: those of a node stand together, since members are in the order of ranks."""
        found: dict[int, tuple[int, ...]] = {}
        for rank in members:
            found[self.node_of(rank)] = (*found.get(self.node_of(rank), ()), rank)
        return found

    def local_groups(self) -> list[GroupPlan]:
        """The groups, of this node's ranks only: what the memory that they share is made for."""
        groups = [
            (name, self.divided(members).get(self.own, ()), slots, slot_bytes)
            for name, members, slots, slot_bytes in self.layout.groups()
        ]
        return [group for group in groups if len(group[1]) > 1]

    def local_group_index(self, name: str) -> int | None:
        """Place of a group in `local_groups`; None if none or one of its ranks is here."""
        names = [group[0] for group in self.local_groups()]
        return names.index(name) if name in names else None

    def spanning(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """By name the groups with ranks on several nodes, divided by node. The first of a node's speaks for it."""
        groups = {name: self.divided(members) for name, members, *_ in self.layout.groups()}
        return {name: by_node for name, by_node in groups.items() if len(by_node) > 1}

    def wired(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Those of them that carry messages and hand vectors on; the others carry sums and rows of tensors."""
        return {name: by_node for name, by_node in self.spanning().items() if name.split()[0] not in TENSOR_GROUPS}


@dataclass(frozen=True)
class Place:
    """One rank's coordinates."""

    layout: Layout
    rank: int
    replica: int
    pp_rank: int
    tp_rank: int

    @property
    def dp_rank(self) -> int:
        """Whose plans it follows."""
        return self.tp_rank // self.layout.attention_tp_size if self.layout.dp_attention else self.replica

    @property
    def attention_tp_rank(self) -> int:
        return self.tp_rank % self.layout.attention_tp_size

    @property
    def ep_rank(self) -> int:
        return self.tp_rank // self.layout.expert_tp_size

    @property
    def expert_tp_rank(self) -> int:
        return self.tp_rank % self.layout.expert_tp_size

    @property
    def is_driver(self) -> bool:
        return self.is_first_stage and self.attention_tp_rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @cached_property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp_size - 1

    @cached_property
    def samples(self) -> bool:
        """Whether tokens are drawn here."""
        return self.is_last_stage and self.attention_tp_rank == 0

    @property
    def stage_name(self) -> str:
        return stage_name(self.replica, self.pp_rank)

    def __str__(self) -> str:
        """As errors and logs name it."""
        layout = self.layout
        known = [("tp", self.tp_rank, layout.tp_size), ("pp", self.pp_rank, layout.pp_size)]
        known += [("dp", self.dp_rank, layout.dp_size), ("ep", self.ep_rank, layout.ep_size)]
        parts = [f"{name} {own}" for name, own, size in known if size > 1]
        return f"rank {self.rank}" + (f" ({', '.join(parts)})" if parts else "")


def stage_name(replica: int, pp_rank: int) -> str:
    return f"stage {pp_rank} of replica {replica}"


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
