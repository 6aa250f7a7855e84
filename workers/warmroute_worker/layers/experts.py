"""MLPs: an ordinary one, and a choice of experts.

`Experts` is the whole interface that grouped kernels would have to offer: rows, whom each goes to, with what weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from warmroute_worker import topology
from warmroute_worker.layers.linear import Linear, product, silu_and_multiply
from warmroute_worker.weights.source import Part

if TYPE_CHECKING:
    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.model_config import MoeConfig
    from warmroute_worker.weights.source import WeightSource


class GatedMlp:
    """down(silu(gate(x)) * up(x)), of which each rank computes its share of the inner numbers."""

    def __init__(
        self, source: WeightSource, name: str, hidden: int, intermediate: int, bias: bool, group: TensorGroup
    ) -> None:
        own = topology.share(intermediate, group.rank, group.size)
        inner = [f"{name}.gate_proj", f"{name}.up_proj"]
        self.gate_up = Linear(source, inner, hidden, [intermediate] * 2, bias, [Part.of_rows(own)] * 2)
        self.down = Linear(source, [f"{name}.down_proj"], intermediate, [hidden], bias, [Part(columns=own)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> this rank's part of the sum, [tokens, hidden]"""
        return self.down(silu_and_multiply(self.gate_up(x)))


class Experts:
    """Gated MLPs of one size. Each rank has its share of every expert's inner numbers."""

    def __init__(self, source: WeightSource, name: str, hidden: int, config: MoeConfig, group: TensorGroup) -> None:
        gate, up, down = config.projections
        size = config.intermediate_size
        own = topology.share(size, group.rank, group.size)

        def of(expert: int, projection: str, shape: tuple[int, int], part: Part) -> torch.Tensor:
            return source.tensor(f"{name}.{expert}.{projection}.weight", shape, part=part)

        experts, rows = range(config.num_experts), Part.of_rows(own)
        self._gate_up = [
            product(source.packing, torch.cat([of(e, projection, (size, hidden), rows) for projection in (gate, up)]))
            for e in experts
        ]
        self._down = [product(source.packing, of(e, down, (hidden, size), Part(columns=own))) for e in experts]

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] rows, [tokens, k] experts and weights -> [tokens, hidden] own part of the weighted sums."""
        per_token = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        tokens = order // per_token
        rows = x[tokens]
        counts = torch.bincount(chosen.flatten(), minlength=len(self._down)).tolist()
        outputs = torch.empty_like(rows)
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                own = slice(begin, begin + count)
                outputs[own] = self._down[expert](silu_and_multiply(self._gate_up[expert](rows[own])))
                begin += count
        outputs *= weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, tokens, outputs)


class MixtureOfExperts:
    """Each token goes through the experts that the router likes best, and through the shared one.

    Every rank routes every token, to the same experts: what it routes by is the same to the bit.
    """

    def __init__(self, source: WeightSource, name: str, hidden: int, config: MoeConfig, group: TensorGroup) -> None:
        self._config = config
        # Which experts are chosen must not depend on how numbers are rounded.
        router_dtype = torch.float32 if config.float32_router else None
        router = source.tensor(f"{name}.gate.weight", (config.num_experts, hidden), router_dtype)
        self._logits, self._router_dtype = product(source.packing, router), router.dtype
        self._score_bias: torch.Tensor | None = None
        if config.score_bias:
            bias_name = f"{name}.gate.e_score_correction_bias"
            self._score_bias = source.tensor(bias_name, (config.num_experts,), torch.float32)
        self._experts = Experts(source, f"{name}.experts", hidden, config, group)
        self._shared: GatedMlp | None = None
        self._shared_gate: Linear | None = None
        if config.shared_intermediate_size:
            size = config.shared_intermediate_size
            self._shared = GatedMlp(source, f"{name}.{config.shared_module}", hidden, size, False, group)
            if config.shared_gated:
                self._shared_gate = Linear(source, [f"{name}.{config.shared_module}_gate"], hidden, [1], bias=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> this rank's part of the sum, [tokens, hidden]"""
        weights, chosen = self._route(x)
        output = self._experts(x, chosen, weights.to(x.dtype))
        if self._shared is not None:
            shared = self._shared(x)
            output += shared if self._shared_gate is None else torch.sigmoid(self._shared_gate(x)) * shared
        return output

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, k] weights in float32, and experts."""
        config = self._config
        logits = self._logits(x.to(self._router_dtype))
        if config.scores == "sigmoid":
            scores = logits.float().sigmoid()
        else:
            scores = functional.softmax(logits, dim=-1, dtype=torch.float32)
        worth = scores if self._score_bias is None else scores + self._score_bias
        if config.groups > 1:
            worth = self._of_the_best_groups(worth)
        chosen = worth.topk(config.experts_per_token, dim=-1).indices
        weights = scores.gather(1, chosen)
        if config.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * config.weight_factor, chosen

    def _of_the_best_groups(self, worth: torch.Tensor) -> torch.Tensor:
        """[tokens, experts] -> the same, -inf in the groups that are not chosen."""
        config = self._config
        grouped = worth.view(len(worth), config.groups, -1)
        of_group = grouped.topk(config.best_of_group, dim=-1).values.sum(dim=-1)
        best = of_group.topk(config.chosen_groups, dim=-1).indices
        open_groups = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~open_groups.unsqueeze(-1), -torch.inf).flatten(1)
