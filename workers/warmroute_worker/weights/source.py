"""What a layer asks for its weights: one interface over checkpoints and dummy weights."""

from __future__ import annotations

from typing import Protocol

import torch


class WeightSource(Protocol):
    """Named tensors in the dtype and on the device the engine runs with.

    A layer names what it needs and the shape it expects, so a checkpoint that contradicts its config.json is refused by
    the layer's own words. Sharded layers will ask for a range of rows or columns here.
    """

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`; `dtype`: not the engine's. Raises ModelError if it is absent or of another shape."""
        ...


class MeasuredWeights:
    """A `WeightSource` without numbers: building a model from it tells what its weights will weigh."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.num_bytes = 0
        self._dtype = dtype

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        del name
        tensor = torch.empty(shape, dtype=dtype or self._dtype, device="meta")
        self.num_bytes += tensor.nbytes
        return tensor
