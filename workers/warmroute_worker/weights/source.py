"""What a layer asks for its weights: one interface over checkpoints and dummy weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Part:
    """What of a tensor a rank wants. None: all of that dimension."""

    rows: tuple[range, ...] | None = None
    """One after the other; a run may stand twice."""
    columns: range | None = None

    @classmethod
    def of_rows(cls, *rows: range) -> Part:
        return cls(rows=rows)

    @classmethod
    def of_heads(cls, heads: Sequence[int], dim: int) -> Part:
        """The `dim` rows of each of `heads`."""
        return cls(rows=tuple(range(head * dim, (head + 1) * dim) for head in heads))

    def runs(self, shape: tuple[int, ...]) -> list[tuple[range, range | None]]:
        """The rows of each piece, and its columns, in a tensor of `shape`."""
        rows = (range(shape[0]),) if self.rows is None else self.rows
        if len(shape) == 1:
            return [(run, None) for run in rows]
        columns = range(shape[1]) if self.columns is None else self.columns
        return [(run, columns) for run in rows]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is wanted, in a tensor of `shape`."""
        runs = self.runs(shape)
        columns = runs[0][1]
        rows = sum(len(run) for run, _ in runs)
        return (rows,) if columns is None else (rows, len(columns), *shape[2:])

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part, of a whole tensor; itself if nothing is left out."""
        if self == WHOLE:
            return tensor
        pieces = [
            tensor[run.start : run.stop]
            if columns is None
            else tensor[run.start : run.stop, columns.start : columns.stop]
            for run, columns in self.runs(tuple(tensor.shape))
        ]
        # A copy, so that what was left out can be freed.
        return torch.cat(pieces)


WHOLE = Part()


@dataclass(frozen=True)
class Packing:
    """Which matrices are kept in oneDNN's order on CPU, of those that `native.Matrix` is not for: 16-bit numbers, and
    float32 on a CPU without AVX2.

    A call costs 10 us more then, and the product itself less than half of what MKL takes on an AMD EPYC (2816 x 512,
    float32, one thread: 1 row 169 us for 392, 8 rows 254 for 628, 512 rows 6.7 ms for 15.5). What comes out of a row
    does not depend on the others, either, which of MKL's routines cannot be said.
    """

    smallest: int = 1 << 16
    """Numbers of a matrix."""
    plain_for_one_row: bool = False
    """Keep the usual order as well, for single rows: for models that fit into the cache, whose products take no longer
    than a call."""
    compiled_mlps: bool = False
    """Torch compiles ordinary MLPs, whose matrices stay as they are for that."""
    keeps_bfloat16: bool = False
    """The engine computes in float32, and a matrix that a checkpoint has in bfloat16 is kept so: `native.Matrix` widens
    numbers as it reads them, which is exact. It takes half the memory, and half the time where memory is the limit."""

    def of_matrix(self, checkpoint: torch.dtype, engine: torch.dtype) -> torch.dtype:
        """What a matrix is kept in."""
        return checkpoint if self.keeps_bfloat16 and checkpoint == torch.bfloat16 else engine


DEFAULT_PACKING = Packing()


class WeightSource(Protocol):
    """Named tensors in the dtype and on the device the engine runs with.

    A layer names what it needs and the shape it expects, so a checkpoint that contradicts its config.json is refused by
    the layer's own words.
    """

    dtype: torch.dtype
    device: torch.device
    packing: Packing

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, part: Part = WHOLE
    ) -> torch.Tensor:
        """`part` of the tensor `name`, which as a whole has `shape`; only the part is read. `dtype`: not the engine's.

        Raises ModelError if it is absent or of another shape.
        """
        ...

    def matrix_dtype(self, name: str) -> torch.dtype:
        """What to ask for of a matrix that `linear.product` is for: the engine's dtype, or see `keeps_bfloat16`.

        Raises ModelError if it is absent.
        """
        ...


class MeasuredWeights:
    """A `WeightSource` without numbers: building a model from it tells what its weights will weigh."""

    def __init__(self, real: WeightSource) -> None:
        self.num_bytes = self.num_weights = 0
        self.packing = real.packing
        self.dtype, self.device = real.dtype, torch.device("meta")
        self.matrix_dtype = real.matrix_dtype

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, part: Part = WHOLE
    ) -> torch.Tensor:
        del name
        tensor = torch.empty(part.shape(shape), dtype=dtype or self.dtype, device="meta")
        self.num_bytes += tensor.nbytes
        self.num_weights += tensor.numel()
        return tensor
