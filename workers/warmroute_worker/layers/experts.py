"""MLPs: an ordinary one, and a choice of experts.

`Experts` is the whole interface that grouped kernels would have to offer: rows, whom each goes to, with what weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from warmroute_worker.layers.linear import Linear, silu_and_multiply

if TYPE_CHECKING:
    from warmroute_worker.model_config import MoeConfig
    from warmroute_worker.weights.source import WeightSource


class GatedMlp:
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, source: WeightSource, name: str, hidden: int, intermediate: int, bias: bool) -> None:
        self._gate_up = Linear(source, [f"{name}.gate_proj", f"{name}.up_proj"], hidden, [intermediate] * 2, bias)
        self._down = Linear(source, [f"{name}.down_proj"], intermediate, [hidden], bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> the same"""
        return self._down(silu_and_multiply(self._gate_up(x)))


class Experts:
    """Gated MLPs of one size, stacked: [experts, 2 * intermediate, hidden] and [experts, hidden, intermediate]."""

    def __init__(self, source: WeightSource, name: str, hidden: int, config: MoeConfig) -> None:
        gate, up, down = config.projections
        size = config.intermediate_size

        def of(expert: int, projection: str, shape: tuple[int, int]) -> torch.Tensor:
            return source.tensor(f"{name}.{expert}.{projection}.weight", shape)

        experts = range(config.num_experts)
        self._gate_up = torch.stack(
            [torch.cat([of(e, gate, (size, hidden)), of(e, up, (size, hidden))]) for e in experts]
        )
        self._down = torch.stack([of(e, down, (hidden, size)) for e in experts])

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] rows, [tokens, k] experts and weights -> [tokens, hidden] weighted sums."""
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
                inner = silu_and_multiply(functional.linear(rows[own], self._gate_up[expert]))
                outputs[own] = functional.linear(inner, self._down[expert])
                begin += count
        outputs *= weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, tokens, outputs)


class MixtureOfExperts:
    """Each token goes through the experts that a softmax over all of them likes best, and through the shared one."""

    def __init__(self, source: WeightSource, name: str, hidden: int, config: MoeConfig) -> None:
        self._config = config
        self._router = Linear(source, [f"{name}.gate"], hidden, [config.num_experts], bias=False)
        self._experts = Experts(source, f"{name}.experts", hidden, config)
        self._shared: GatedMlp | None = None
        if config.shared_intermediate_size:
            size = config.shared_intermediate_size
            self._shared = GatedMlp(source, f"{name}.shared_expert", hidden, size, bias=False)
            self._shared_gate = Linear(source, [f"{name}.shared_expert_gate"], hidden, [1], bias=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> the same"""
        weights, chosen = self._route(x)
        output = self._experts(x, chosen, weights.to(x.dtype))
        if self._shared is not None:
            output += torch.sigmoid(self._shared_gate(x)) * self._shared(x)
        return output

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, k] weights in float32, and experts."""
        shares = functional.softmax(self._router(x), dim=-1, dtype=torch.float32)
        weights, chosen = shares.topk(self._config.experts_per_token, dim=-1)
        if self._config.normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen
