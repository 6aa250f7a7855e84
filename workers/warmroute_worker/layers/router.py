"""Which experts a token goes to, and how much each of them counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from warmroute_worker.layers.linear import product

if TYPE_CHECKING:
    from warmroute_worker.model_config import MoeConfig
    from warmroute_worker.weights.source import WeightSource


class Router:
    """Every rank routes the same way: what it routes by is the same to the bit."""

    def __init__(self, source: WeightSource, name: str, hidden: int, config: MoeConfig) -> None:
        self._config = config
        # Which experts are chosen must not depend on how numbers are rounded.
        router_dtype = torch.float32 if config.float32_router else None
        router = source.tensor(f"{name}.weight", (config.num_experts, hidden), router_dtype)
        self._logits, self._router_dtype = product(source.packing, router), router.dtype
        self._score_bias: torch.Tensor | None = None
        if config.score_bias:
            bias_name = f"{name}.e_score_correction_bias"
            self._score_bias = source.tensor(bias_name, (config.num_experts,), torch.float32)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, hidden] -> [tokens, k] weights in float32, and experts."""
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
        grouped = worth.view(len(worth), config.groups, worth.shape[1] // config.groups)
        of_group = grouped.topk(config.best_of_group, dim=-1).values.sum(dim=-1)
        best = of_group.topk(config.chosen_groups, dim=-1).indices
        open_groups = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best, True)
        return grouped.masked_fill(~open_groups.unsqueeze(-1), -torch.inf).flatten(1)
