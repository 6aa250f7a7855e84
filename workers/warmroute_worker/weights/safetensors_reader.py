"""Weights from the *.safetensors files of a model folder, single or sharded, dequantised on the way if need be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from warmroute_worker.model_config import ModelError

if TYPE_CHECKING:
    from pathlib import Path


class SafetensorsReader:
    """A `WeightSource` over one folder. Files are mapped; a tensor is read when it is asked for."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, block: tuple[int, int]) -> None:
        """`block`: rows and columns of an fp8 weight that share a scale. Raises ModelError if there is no file, or one
        that is not safetensors."""
        self._block = block
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{folder}: there are no .safetensors files in it")
        self._folder, self._dtype, self._device = folder, dtype, device
        self._file_of: dict[str, Any] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: is not a readable safetensors file: {error}") from error
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `WeightSource`. Raises ModelError if the tensor is absent or has another shape."""
        stored = self._read(name)
        if tuple(stored.shape) != shape:
            raise ModelError(
                f"{self._folder}: {name} has shape {list(stored.shape)}, config.json makes it {list(shape)}"
            )
        if stored.dtype == torch.int8:
            stored = _dequantised(stored, self._read(name + "_scale"))
        elif stored.dtype == torch.float8_e4m3fn:
            stored = _block_dequantised(stored, self._read(name + "_scale_inv"), self._block)
        return stored.to(self._device, dtype or self._dtype)

    def _read(self, name: str) -> torch.Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self._folder}: no tensor {name} in its .safetensors files")
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _block_dequantised(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """fp8 as DeepSeek-V3 ships it: each block of the weight times its scale. Blocks at the edges may be cut."""
    rows, columns = weight.shape
    scales = scale.to(torch.float32).repeat_interleave(block[0], 0)[:rows]
    return weight.to(torch.float32) * scales.repeat_interleave(block[1], 1)[:, :columns]


def _dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8_per_channel: row r of the weight is its int8 row times scale[r]."""
    return weight.to(torch.float32) * scale.to(torch.float32).reshape(-1, 1)
