"""Seeded random weights for `--load-format dummy`: benchmarks of a shape whose checkpoint nobody has at hand."""

from __future__ import annotations

import zlib

import torch


class DummyWeights:
    """A `WeightSource` that draws every tensor from (seed, name) alone: the same ones in whatever order."""

    def __init__(self, seed: int, std: float, dtype: torch.dtype, device: torch.device) -> None:
        self._seed, self._std, self._dtype, self._device = seed, std, dtype, device

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `WeightSource`. Vectors that scale (norms) are one, as in a fresh model."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype or self._dtype, device=self._device)
        generator = torch.Generator().manual_seed((self._seed << 32 ^ zlib.crc32(name.encode())) & (1 << 63) - 1)
        return (torch.randn(shape, generator=generator) * self._std).to(self._device, dtype or self._dtype)
