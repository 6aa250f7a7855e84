"""Matrix products, and the norm in front of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker.weights.source import WeightSource


class Linear:
    """y = x W^T + b. Matrices with the same input may be stacked into one product (q, k and v; gate and up)."""

    def __init__(
        self, source: WeightSource, names: Sequence[str], in_features: int, out_features: Sequence[int], bias: bool
    ) -> None:
        """`names[i]` (without `.weight`) gives `out_features[i]` rows."""
        pairs = list(zip(names, out_features, strict=True))
        self.weight = _stacked([source.tensor(f"{name}.weight", (rows, in_features)) for name, rows in pairs])
        self.bias = _stacked([source.tensor(f"{name}.bias", (rows,)) for name, rows in pairs]) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in_features] -> [tokens, sum(out_features)]"""
        return functional.linear(x, self.weight, self.bias)


class Embedding:
    """A row per token id; `logits` is the same matrix used as output head."""

    def __init__(self, source: WeightSource, name: str, rows: int, features: int) -> None:
        self.weight = source.tensor(f"{name}.weight", (rows, features))

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, features]"""
        return functional.embedding(token_ids, self.weight)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, features] -> [tokens, rows]"""
        return functional.linear(x, self.weight)


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, source: WeightSource, name: str, features: int, eps: float) -> None:
        self.weight = source.tensor(f"{name}.weight", (features,))
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self._eps)


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """[tokens, 2n] -> [tokens, n]: SiLU of the first half times the second."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
