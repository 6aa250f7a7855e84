"""Weights from the *.safetensors files of a model folder, single or sharded, dequantised on the way if need be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from warmroute_worker.model_config import ModelError
from warmroute_worker.weights.source import DEFAULT_PACKING, WHOLE, Packing, Part

if TYPE_CHECKING:
    from pathlib import Path


class SafetensorsReader:
    """A `WeightSource` over one folder. Files are mapped; of a tensor, only the part that is asked for is read."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        block: tuple[int, int],
        packing: Packing = DEFAULT_PACKING,
    ) -> None:
        """`block`: rows and columns of an fp8 weight that share a scale. Raises ModelError if there is no file, or one
        that is not safetensors."""
        self._block = block
        self.packing = packing
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{folder}: there are no .safetensors files in it")
        self._folder = folder
        self.dtype, self.device = dtype, device
        self._file_of: dict[str, Any] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: is not a readable safetensors file: {error}") from error
            self._file_of.update(dict.fromkeys(file.keys(), file))

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, part: Part = WHOLE
    ) -> torch.Tensor:
        """See `WeightSource`. Raises ModelError if the tensor is absent or has another shape."""
        stored = self._file(name).get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise ModelError(
                f"{self._folder}: {name} has shape {stored.get_shape()}, config.json makes it {list(shape)}"
            )
        pieces = [self._piece(name, stored, rows, columns) for rows, columns in part.runs(shape)]
        read = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(self.device, dtype or self.dtype)
        # Never a part of the mapped file, all of which would stay in memory, and change when somebody writes to it.
        return read.clone() if read.data_ptr() == pieces[0].data_ptr() else read

    def matrix_dtype(self, name: str) -> torch.dtype:
        """See `WeightSource`. Raises ModelError if the tensor is absent."""
        stored = torch.bfloat16 if self._file(name).get_slice(name).get_dtype() == "BF16" else self.dtype
        return self.packing.of_matrix(stored, self.dtype)

    def _piece(self, name: str, stored: Any, rows: range, columns: range | None) -> torch.Tensor:
        if columns is None:
            piece: torch.Tensor = stored[rows.start : rows.stop]
            return piece
        piece = stored[rows.start : rows.stop, columns.start : columns.stop]
        if piece.dtype == torch.int8:
            return _dequantised(piece, self._scale(name + "_scale").reshape(-1, 1)[rows.start : rows.stop])
        if piece.dtype == torch.float8_e4m3fn:
            # Each block of the weight has a scale; blocks may be cut, by the tensor's end or by the part's.
            scales = self._scale(name + "_scale_inv")
            of_rows = torch.arange(rows.start, rows.stop) // self._block[0]
            of_columns = torch.arange(columns.start, columns.stop) // self._block[1]
            return _dequantised(piece, scales[of_rows][:, of_columns])
        return piece

    def _scale(self, name: str) -> torch.Tensor:
        scale: torch.Tensor = self._file(name).get_tensor(name)
        return scale.to(torch.float32)

    def _file(self, name: str) -> Any:
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self._folder}: no tensor {name} in its .safetensors files")
        return file


def _dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each number times the scale at its place."""
    return weight.to(torch.float32) * scale
