"""Where the experts of a layer are: which slot holds which expert, and which rank holds which slots.

Usually expert e is in slot e. With redundant experts (`--ep-num-redundant-experts`) there are more slots than experts,
and popular experts stand in several; the map changes when experts are moved (executor/expert_balancing.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from warmroute_worker import topology

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of every layer are divided, and what computes them."""

    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    """Of the ranks that divide each expert of this part."""
    tp_size: int = 1
    sent: bool = False
    """Rows are sent to the ranks of their experts; without it every rank has all rows already."""
    row_per_expert: bool = False
    """A row is sent once for each of its experts, not once for each rank that has some of them."""
    redundant: int = 0
    """Slots beyond one per expert."""
    movable: bool = False
    """Weights are kept so that they can be handed to another rank."""
    grouped: bool = False
    """All experts of a rank in one product."""
    by_token: bool = False
    """Of several copies of an expert, which one is used depends on the token, not only on who asks."""

    def num_slots(self, num_experts: int) -> int:
        return num_experts + self.redundant

    def slots(self, num_experts: int, rank: int | None = None) -> range:
        """The slots of this part, or of another."""
        return topology.share(self.num_slots(num_experts), self.ep_rank if rank is None else rank, self.ep_size)


class ExpertMap:
    """Of one layer; the same on all ranks."""

    def __init__(self, num_experts: int, layout: ExpertLayout, device: torch.device) -> None:
        self.num_experts, self.layout, self._device = num_experts, layout, device
        self.num_slots = layout.num_slots(num_experts)
        self._owners = [rank for rank in range(layout.ep_size) for _ in layout.slots(num_experts, rank)]
        self.owners = torch.tensor(self._owners, device=device)
        """[slots] -> part that holds it."""
        self._turn = 0
        self.expert_of: list[int] = []
        self.place([slot % num_experts for slot in range(self.num_slots)])

    def place(self, expert_of: Sequence[int]) -> None:
        """From now on slot s holds expert `expert_of[s]`; every expert must be somewhere."""
        self.expert_of = list(expert_of)
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(expert_of):
            slots[expert].append(slot)
        copies = [len(of_expert) for of_expert in slots]
        assert min(copies) > 0, "an expert is nowhere"
        self._is_identity = self.expert_of == list(range(self.num_experts))
        self._copies = torch.tensor(copies, device=self._device)
        padded = [of_expert + [of_expert[0]] * (max(copies) - len(of_expert)) for of_expert in slots]
        self._slots = torch.tensor(padded, device=self._device)
        me = self.layout.ep_rank
        # Static: the copy of this rank, if it has one; else one that depends on who asks.
        near = [
            next((s for s in of_expert if self._owners[s] == me), of_expert[me % len(of_expert)]) for of_expert in slots
        ]
        self._near = torch.tensor(near, device=self._device)

    def slots_for(self, chosen: torch.Tensor) -> torch.Tensor:
        """[tokens, k] experts -> [tokens, k] slots."""
        if self._is_identity:
            return chosen
        if self.layout.sent and not self.layout.by_token:
            return self._near[chosen]
        # In turn: rows of a step, and steps, since a step may have one row only. The same on all ranks that share rows.
        self._turn += 1
        first = self._turn + (self.layout.ep_rank if self.layout.sent else 0)
        numbers = torch.arange(first, first + len(chosen), device=chosen.device).unsqueeze(1)
        return self._slots[chosen, numbers % self._copies[chosen]]
