"""Matrix products, and the norm in front of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from warmroute_worker import topology
from warmroute_worker.layers import native
from warmroute_worker.weights.source import WHOLE, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.weights.source import Packing, WeightSource


def product(
    packing: Packing, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> x W^T + b, for [tokens, in_features]. The weight may be kept in another order: nobody should look at it."""
    of_bfloat16 = packing.keeps_bfloat16 and weight.dtype == torch.bfloat16
    if native.Matrix.usable and native.usable(torch.float32 if of_bfloat16 else weight.dtype, weight.device):
        if len(weight) == 1:
            # What comes next would be computed in other vectors for each number of rows, if these stood side by side.
            widened = native.Matrix(*_widened(weight, bias))
            return lambda x: widened(x)[:, :1]
        return native.Matrix(weight, bias)
    packable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    enabled = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not packable or not enabled or weight.numel() < packing.smallest:
        return lambda x: functional.linear(x, weight, bias)
    outputs = len(weight)
    if outputs == 1:
        # A matrix of one row is multiplied as a vector, by another routine for each number of rows of x.
        weight, bias = _widened(weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    apply = torch.ops.mkldnn._linear_pointwise.default
    if outputs < len(weight):
        return lambda x: apply(x, packed, bias, "none", [], "")[:, :outputs]
    if packing.plain_for_one_row:
        return lambda x: functional.linear(x, weight, bias) if len(x) == 1 else apply(x, packed, bias, "none", [], "")
    return lambda x: apply(x, packed, bias, "none", [], "")


def matrix(source: WeightSource, name: str, shape: tuple[int, ...], part: Part = WHOLE) -> torch.Tensor:
    """A tensor for `product` (or `Embedding`), which may be kept in 16 bits. Raises ModelError as `source` does."""
    return source.tensor(name, shape, source.matrix_dtype(name), part)


def _widened(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """With 15 outputs more, of zeros."""
    return functional.pad(weight, (0, 0, 0, 15)), None if bias is None else functional.pad(bias, (0, 15))


class Linear:
    """y = x W^T + b, or a rank's part of it. Matrices with the same input may be stacked into one product (q, k and v;
    gate and up).

    Divided by rows, a rank makes some of the outputs. Divided by columns, it makes a part of each output's sum, and one
    rank only adds the bias: what comes out must be summed over the ranks.
    """

    def __init__(
        self,
        source: WeightSource,
        names: Sequence[str],
        in_features: int,
        out_features: Sequence[int],
        bias: bool,
        parts: Sequence[Part] | None = None,
        arrange: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """`names[i]` (without `.weight`) has `out_features[i]` rows, of which this rank takes `parts[i]`.

        `arrange`: may put the rows of weight and bias into another order, in place.
        """
        weight, biases = weight_and_bias(source, names, in_features, out_features, bias, parts, as_kept=True)
        if arrange is not None:
            for tensor in (weight, biases):
                if tensor is not None:
                    arrange(tensor)
        self.product = product(source.packing, weight, biases)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in_features] -> [tokens, out_features], of what this rank has of both"""
        return self.product(x)


def weight_and_bias(
    source: WeightSource,
    names: Sequence[str],
    in_features: int,
    out_features: Sequence[int],
    bias: bool,
    parts: Sequence[Part] | None = None,
    *,
    as_kept: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `Linear` multiplies with, and adds if it is this rank that adds it. `as_kept`: for `product`, else in the
    engine's dtype."""
    wanted = parts or [WHOLE] * len(names)
    tensors = list(zip(names, out_features, wanted, strict=True))
    read = functools.partial(matrix, source) if as_kept else source.tensor
    weight = _stacked([read(f"{name}.weight", (rows, in_features), part=part) for name, rows, part in tensors])
    if not bias or any(part.columns is not None and part.columns.start > 0 for part in wanted):
        return weight, None
    return weight, _stacked(
        [source.tensor(f"{name}.bias", (rows,), part=Part(rows=part.rows)) for name, rows, part in tensors]
    )


class Embedding:
    """A row per token id, divided among the ranks."""

    def __init__(self, source: WeightSource, name: str, rows: int, features: int, group: TensorGroup) -> None:
        own = topology.share(rows, group.rank, group.size)
        self._group = group
        self._first, self._count = own.start, len(own)
        self.weight = matrix(source, f"{name}.weight", (rows, features), Part.of_rows(own))
        self._native = native.usable(source.dtype, self.weight.device)

    def place(self) -> tuple[int, int, int, bool]:
        """Where the native call finds it: address, rows, the number of the first, whether it is bfloat16."""
        assert self.weight.is_contiguous()
        return self.weight.data_ptr(), len(self.weight), self._first, self.weight.dtype == torch.bfloat16

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, features]"""
        if self._native:
            return self._group.sum(native.rows_of(self.weight, self._first, token_ids))
        if self._group.size == 1:
            return functional.embedding(token_ids, self.weight)
        local = token_ids - self._first
        elsewhere = (local < 0) | (local >= self._count)
        found = functional.embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self._group.sum(found.masked_fill_(elsewhere.unsqueeze(1), 0))


class Head:
    """Vectors to logits: a row of the matrix per token id, divided among the ranks.

    With DP attention either among all ranks of the stage, who then need everybody's vectors, or among those that have
    the same vectors anyway.
    """

    def __init__(self, source: WeightSource, name: str, rows: int, features: int, group: TensorGroup) -> None:
        own = topology.share(rows, group.rank, group.size)
        self._rows, self._group = rows, group
        weight = matrix(source, f"{name}.weight", (rows, features), Part.of_rows(own))
        self.product = product(source.packing, weight)

    @classmethod
    def tied(cls, embedding: Embedding, rows: int, group: TensorGroup) -> Head:
        """With the embedding's own matrix, of which there is one copy only."""
        head = cls.__new__(cls)
        head._rows, head._group = rows, group
        head.product = lambda x: functional.linear(x, embedding.weight)
        return head

    def __call__(self, x: torch.Tensor, wanted: range | None) -> torch.Tensor | None:
        """[tokens, features] -> [wanted tokens, rows], or None if this rank wants none"""
        return self._group.join_columns(self.product(x), self._rows, wanted)

    @property
    def widths(self) -> list[int]:
        """How many logits each rank makes."""
        return [len(topology.share(self._rows, rank, self._group.size)) for rank in range(self._group.size)]


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32."""

    def __init__(self, source: WeightSource, name: str, features: int, eps: float) -> None:
        self.weight = source.tensor(f"{name}.weight", (features,))
        self.eps = eps
        self._native = native.usable(self.weight.dtype, self.weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, features] -> the same"""
        if self._native:
            return native.norm(x, None, self.weight, self.eps)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after_adding(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """The norm of x + delta, which x becomes."""
        if self._native:
            return native.norm(x, delta, self.weight, self.eps)
        x += delta
        return self(x)

    def of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, heads, features] -> each head's norm; x may be overwritten."""
        if self._native:
            return native.norm_heads(x, self.weight, self.eps)
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """[tokens, 2n] -> [tokens, n]: SiLU of the first half times the second."""
    if native.usable(x.dtype, x.device):
        return native.silu_and_multiply(x)
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
