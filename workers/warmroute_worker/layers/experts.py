"""The experts that a rank holds, and what computes them.

`Experts` is the whole interface that other grouped kernels would have to offer: rows, ordered by slot, and how many
each slot has.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from warmroute_worker import topology
from warmroute_worker.layers.linear import matrix, product, silu_and_multiply
from warmroute_worker.weights.source import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from warmroute_worker.layers.expert_map import ExpertMap
    from warmroute_worker.model_config import MoeConfig
    from warmroute_worker.weights.source import WeightSource

    Product = Callable[[torch.Tensor], torch.Tensor]


class Experts:
    """Gated MLPs of one size: whole ones, or of each this rank's share of the inner numbers.

    Their weights are two tensors, [slots, 2 * inner, hidden] and [slots, hidden, inner], if all are computed in one
    product or may be moved; else each expert's are kept in the order in which one product is fastest.
    """

    def __init__(self, source: WeightSource, name: str, hidden: int, config: MoeConfig, placed: ExpertMap) -> None:
        gate, up, down = config.projections
        size, layout = config.intermediate_size, placed.layout
        own = topology.share(size, layout.tp_rank, layout.tp_size)
        self.slots = layout.slots(config.num_experts)
        """Of all slots, which are this rank's."""

        together = layout.grouped or layout.movable
        read = source.tensor if together else functools.partial(matrix, source)

        def of(slot: int, projection: str, shape: tuple[int, int], part: Part) -> torch.Tensor:
            return read(f"{name}.{placed.expert_of[slot]}.{projection}.weight", shape, part=part)

        def gate_up(slot: int) -> torch.Tensor:
            return torch.cat([of(slot, projection, (size, hidden), Part.of_rows(own)) for projection in (gate, up)])

        self._grouped = layout.grouped
        self._products: list[tuple[Product, Product]] = []
        self.weights: tuple[torch.Tensor, torch.Tensor] | None = None
        """Of all slots of this rank, if they are kept together."""
        columns = Part(columns=own)
        if together:
            ups = torch.stack([gate_up(slot) for slot in self.slots])
            downs = torch.stack([of(slot, down, (hidden, size), columns) for slot in self.slots])
            self.weights = ups, downs
            return
        for slot in self.slots:
            last = product(source.packing, of(slot, down, (hidden, size), columns))
            self._products.append((product(source.packing, gate_up(slot)), last))

    def weighted_sums(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, int]:
        """[tokens, hidden] rows, [tokens, k] slots (of any rank) and weights -> [tokens, hidden] sums over what
        is here, and how many rows were computed for them."""
        flat = slots.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.slots.stop).tolist()
        first = sum(counts[: self.slots.start])
        own_counts = counts[self.slots.start : self.slots.stop]
        number = sum(own_counts)
        order = order[first : first + number]
        tokens = order // slots.shape[1]
        outputs = self._run(x[tokens], own_counts)
        outputs *= weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, tokens, outputs), number

    def _run(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """[rows, hidden], ordered by slot, of which each slot has `counts` -> [rows, hidden]"""
        if self._grouped and len(rows):
            return self._run_grouped(rows, counts)
        outputs = torch.empty_like(rows)
        begin = 0
        for slot, count in enumerate(counts):
            if count:
                own = slice(begin, begin + count)
                up, down = self._product(slot)
                outputs[own] = down(silu_and_multiply(up(rows[own])))
                begin += count
        return outputs

    def _product(self, slot: int) -> tuple[Product, Product]:
        if self.weights is None:
            return self._products[slot]
        up, down = self.weights[0][slot], self.weights[1][slot]
        return lambda x: functional.linear(x, up), lambda x: functional.linear(x, down)

    def _run_grouped(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        assert self.weights is not None
        up, down = self.weights
        ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
        inner = silu_and_multiply(functional.grouped_mm(rows, up.transpose(1, 2), offs=ends))
        return functional.grouped_mm(inner, down.transpose(1, 2), offs=ends)
