"""Rows on their way to experts on other ranks, and back: an all-to-all without capacity, so that nothing is dropped.

Of each row a rank sends the numbers, the slots it is for and their weights. Usually it is sent once to each rank that
has some of its experts, which adds up what they make of it; with `row_per_expert` once for each of its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.layers.expert_map import ExpertMap


@dataclass
class Statistics:
    """Of all layers of a rank, since the start."""

    sent_rows: int = 0
    """Rows on their way to experts, those that stay on the rank too."""
    expert_rows: int = 0
    """Rows computed by the rank's own experts."""
    overlap_ns: int = 0
    """How long rows were on their way while the other half of a step was computed."""


class ExpertExchange:
    """Of one layer."""

    def __init__(self, group: TensorGroup, placed: ExpertMap) -> None:
        self._group, self._map = group, placed

    def packed(
        self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """What is sent: bytes of each row, by receiver; which rows they are; how many each receiver gets."""
        owners = self._map.owners[slots]
        receivers = torch.arange(self._group.size, device=x.device)
        meant = owners.unsqueeze(0) == receivers[:, None, None]
        receiver, rows = meant.any(dim=2).nonzero(as_tuple=True)
        # All its slots, of which the receiver takes its own.
        parts = [x[rows], slots[rows].to(torch.int32), weights[rows].float()]
        data = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        return data, rows, torch.bincount(receiver, minlength=self._group.size).tolist()

    def send(self, data: torch.Tensor, to: list[int]) -> tuple[list[list[int]], torch.Tensor]:
        """How many rows go from whom to whom, and those that are for this rank."""
        own = torch.tensor([to], device=data.device)
        counts = self._group.gather_rows(own, [1] * self._group.size).tolist()
        return counts, self._group.exchange_rows(data, counts)

    def unpacked(
        self, data: torch.Tensor, like: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, slots and weights of what `packed` made; `like`: rows of the same width and dtype."""
        width = like.shape[1] * like.itemsize
        pieces = torch.split(data, [width, 4 * k, 4 * k], dim=1)
        rows, slots, weights = (piece.contiguous() for piece in pieces)
        return rows.view(like.dtype), slots.view(torch.int32).long(), weights.view(torch.float32)

    def send_back(self, results: torch.Tensor, counts: list[list[int]]) -> torch.Tensor:
        """What came of the rows that this rank sent, in the order in which it sent them."""
        back = [list(column) for column in zip(*counts, strict=True)]
        return self._group.exchange_rows(results, back)
