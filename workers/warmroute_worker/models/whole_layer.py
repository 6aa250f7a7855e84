"""A decoder layer as one native call, for steps in which every token decodes (float32 on CPU).

The same kernels in the same order as the layer's own operations, so the same bits; what is saved is the way between
them. A step of 8 layers with hardly any weights, one sequence: 0.50 ms before there was this, 0.15 ms with it (least of
a few thousand steps).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from warmroute_worker import _native
from warmroute_worker.comm.tensor_group import SharedMemoryGroup
from warmroute_worker.layers.mlp import GatedMlp
from warmroute_worker.layers.native import Matrix
from warmroute_worker.models.self_attention import GroupedAttention

if TYPE_CHECKING:
    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.layers.attention import AttentionBatch, PagedAttention
    from warmroute_worker.layers.linear import RmsNorm
    from warmroute_worker.models.self_attention import CosSin


class DecodeStep(NamedTuple):
    """What all layers have in common, by address; valid as long as what it was made of."""

    tokens: int
    turn: tuple[int, int]
    seen: tuple[int, int, int]
    table: tuple[int, int, int, int]
    threads: int

    @classmethod
    def of(cls, cos_sin: CosSin, batch: AttentionBatch) -> DecodeStep | None:
        """None: not every token decodes, or a trace is made, which shows the single operations."""
        seen, (cos, sin), tokens = batch.seen, cos_sin, batch.positions.shape[0]
        if seen is None or batch.prefills or len(seen.rows) < tokens:
            return None
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            return None
        assert cos.shape[0] == sin.shape[0] == batch.slots.shape[0] == tokens
        table = seen.page_table
        return cls(
            tokens,
            (cos.data_ptr(), sin.data_ptr()),
            (batch.slots.data_ptr(), seen.rows.ctypes.data, seen.visible.ctypes.data),
            (table.ctypes.data, *table.shape, seen.page_size),
            seen.threads,
        )


class WholeLayer:
    """Attention and MLP with their norms and sums; weights are those of the layer itself."""

    def __init__(self, native: _native.Layer, index: int, group: _native.Group | None, first: _native.Matrix) -> None:
        self._native, self._index, self._group = native, index, group
        self.first = first
        """What it reads first."""
        self.behind: _native.Matrix | None = None
        """What is read behind it, for ranks that wait for others to call for meanwhile."""

    @classmethod
    def of(
        cls, attention_norm: RmsNorm, attention: object, mlp_norm: RmsNorm, mlp: object, group: TensorGroup
    ) -> WholeLayer | None:
        """None: the layer has something that this cannot do."""
        if not (isinstance(attention, GroupedAttention) and isinstance(mlp, GatedMlp)):
            return None
        products = [linear.product for linear in (attention.qkv, attention.output, mlp.gate_up, mlp.down)]
        packed = [product.packed for product in products if isinstance(product, Matrix)]
        if len(packed) < len(products) or not (group.size == 1 or isinstance(group, SharedMemoryGroup)):
            return None
        norms, head_norms = (attention_norm, mlp_norm), attention.head_norms
        of_heads = None if head_norms is None else (head_norms[0].weight.tolist(), head_norms[1].weight.tolist())
        native = _native.Layer(
            packed,
            (norms[0].weight.tolist(), norms[1].weight.tolist()),
            of_heads,
            attention_norm.eps,
            attention.head_dim**-0.5,
            (attention.num_heads, attention.num_kv_heads, attention.head_dim),
        )
        return cls(native, attention.index, group.native if isinstance(group, SharedMemoryGroup) else None, packed[0])

    def __call__(self, x: torch.Tensor, step: DecodeStep, attention: PagedAttention) -> None:
        """[tokens, hidden] x becomes what it is after the layer."""
        assert x.shape[0] == step.tokens
        assert x.is_contiguous()
        keys, values = attention.pool.keys[self._index], attention.pool.values[self._index]
        pool = keys.data_ptr(), values.data_ptr(), keys.shape[0]
        self._native.decode(
            x.data_ptr(), step.tokens, step.turn, pool, step.seen, step.table, step.threads, self._group, self.behind
        )
