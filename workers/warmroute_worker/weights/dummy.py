"""Seeded random weights for `--load-format dummy`: benchmarks of a shape whose checkpoint nobody has at hand."""

from __future__ import annotations

import zlib

import torch

from warmroute_worker.weights.source import DEFAULT_PACKING, WHOLE, Packing, Part


class DummyWeights:
    """A `WeightSource` that draws every tensor from (seed, name) alone: the same ones in whatever order and layout."""

    def __init__(
        self,
        seed: int,
        std: float,
        dtype: torch.dtype,
        device: torch.device,
        packing: Packing = DEFAULT_PACKING,
        checkpoint: torch.dtype = torch.float32,
    ) -> None:
        """`checkpoint`: the dtype of the checkpoint that these stand for."""
        self.packing, self._checkpoint = packing, checkpoint
        self._seed, self._std = seed, std
        self.dtype, self.device = dtype, device

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, part: Part = WHOLE
    ) -> torch.Tensor:
        """See `WeightSource`. Vectors that scale (norms) are one, as in a fresh model."""
        if name.endswith("norm.weight"):
            return torch.ones(part.shape(shape), dtype=dtype or self.dtype, device=self.device)
        generator = torch.Generator().manual_seed((self._seed << 32 ^ zlib.crc32(name.encode())) & (1 << 63) - 1)
        drawn = part.take(torch.randn(shape, generator=generator))
        return drawn.mul_(self._std).to(self._checkpoint).to(self.device, dtype or self.dtype)

    def matrix_dtype(self, name: str) -> torch.dtype:
        """See `WeightSource`."""
        del name
        return self.packing.of_matrix(self._checkpoint, self.dtype)
