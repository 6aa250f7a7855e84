"""Moves experts between ranks, between steps, when some have more to do than others (`--enable-eplb`).

All ranks of a stage do it after the same step, with the same counts, and so come to the same plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from warmroute_worker import expert_plan

if TYPE_CHECKING:
    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.layers.moe import MixtureOfExperts


WORTH_MOVING = 0.02
"""By how much a layer's balancedness must be better afterwards: loads change a little from look to look."""


class ExpertBalancer:
    """Of one rank's stage."""

    def __init__(self, layers: list[MixtureOfExperts], stage: TensorGroup, args: WorkerArgs) -> None:
        self._layers, self._stage = layers, stage
        self._interval = args.eplb_rebalance_num_iterations
        self._enough = args.eplb_min_rebalancing_utilization_threshold
        self._per_step = args.eplb_rebalance_layers_per_chunk or max(len(layers), 1)
        self._steps = 0
        self._seen = [0] * len(layers)
        self._to_place: list[tuple[MixtureOfExperts, list[int]]] = []
        self.moved_experts = 0
        """Whose weights this rank took over, so far."""
        self.balancedness = 1.0
        """Mean over layers, of the rows that experts computed between the last two looks."""
        self._routed = [layer.new_counter() for layer in layers]
        for layer, counter in zip(layers, self._routed, strict=True):
            layer.counters.append(counter)

    def counts(self) -> dict[str, int]:
        """For `/debug/ranks`."""
        return {"moved_experts": self.moved_experts, "balancedness_ppm": int(self.balancedness * 1e6)}

    @torch.inference_mode()
    def stepped(self) -> None:
        """After every step that was computed."""
        self._steps += 1
        if self._to_place:
            now, self._to_place = self._to_place[: self._per_step], self._to_place[self._per_step :]
            for layer, placed in now:
                self._move(layer, placed)
        elif self._steps % self._interval == 0:
            self._look()

    def _look(self) -> None:
        """Count, and decide."""
        layers, size = self._layers, self._stage.size
        rows = [layer.computed_rows - seen for layer, seen in zip(layers, self._seen, strict=True)]
        self._seen = [layer.computed_rows for layer in layers]
        device = self._routed[0].device
        by_rank = self._stage.gather_rows(torch.tensor([rows], device=device), [1] * size).tolist()
        shares = [expert_plan.balancedness(of_layer) for of_layer in zip(*by_rank, strict=True)]
        self.balancedness = sum(shares) / len(shares)
        routed = torch.stack(self._routed).float()
        for counter in self._routed:
            counter.zero_()
        # With rows that are sent a rank counts its own ones only.
        routed = self._stage.sum(routed) if layers[0].sends else routed
        if self.balancedness >= self._enough:
            return
        for layer, loads in zip(layers, routed.tolist(), strict=True):
            slots = [layer.map.layout.slots(layer.map.num_experts, rank) for rank in range(layer.map.layout.ep_size)]
            now = layer.map.expert_of
            placed = expert_plan.place(loads, slots, now)
            gain = expert_plan.expected(loads, slots, placed) - expert_plan.expected(loads, slots, now)
            if gain >= WORTH_MOVING:
                self._to_place.append((layer, placed))

    def _move(self, layer: MixtureOfExperts, placed: list[int]) -> None:
        experts, layout, now = layer.experts, layer.map.layout, layer.map.expert_of
        assert experts.weights is not None
        slots = [layout.slots(layer.map.num_experts, rank) for rank in range(layout.ep_size)]
        plan = expert_plan.moves(slots, now, placed)
        own = slots[layout.ep_rank]
        at = {now[slot]: slot - own.start for slot in own}
        outgoing = [expert for to in plan[layout.ep_rank] for expert in to]
        flat = [torch.cat([weight[at[expert]].flatten() for weight in experts.weights]) for expert in outgoing]
        width = sum(weight[0].numel() for weight in experts.weights)
        sent = torch.stack(flat) if flat else experts.weights[0].new_empty((0, width))
        arrived = self._stage.exchange_rows(sent, self._counts(plan, layout.tp_size))
        incoming = [expert for source in plan for expert in source[layout.ep_rank]]
        self.moved_experts += len(incoming)
        found = dict(zip(incoming, arrived, strict=True))
        for weight, part in zip(experts.weights, _parts(experts.weights), strict=True):
            old = weight.clone()
            for slot in own:
                if placed[slot] != now[slot]:
                    expert = placed[slot]
                    whole = old[at[expert]] if expert in at else found[expert][part].view(weight.shape[1:])
                    weight[slot - own.start] = whole
        layer.map.place(placed)

    def _counts(self, plan: list[list[list[int]]], tp_size: int) -> list[list[int]]:
        """Of all ranks of the stage: those with the same share of each expert send to each other."""
        return [
            [
                len(plan[source // tp_size][to // tp_size]) if source % tp_size == to % tp_size else 0
                for to in range(self._stage.size)
            ]
            for source in range(self._stage.size)
        ]


def _parts(weights: tuple[torch.Tensor, ...]) -> list[slice]:
    """Where each weight of an expert stands when all are one after the other."""
    parts, begin = [], 0
    for weight in weights:
        parts.append(slice(begin, begin + weight[0].numel()))
        begin += weight[0].numel()
    return parts
