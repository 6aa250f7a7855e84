"""A stage's decode step as one native call, from token ids to logits (float32 on CPU, families without experts).

The same kernels in the same order as the single operations, so the same bits; what is saved is the way between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from warmroute_worker import _native
from warmroute_worker.comm.tensor_group import SharedMemoryGroup
from warmroute_worker.layers.mlp import GatedMlp
from warmroute_worker.layers.native import Matrix
from warmroute_worker.models.self_attention import GroupedAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.layers.attention import PagedAttention
    from warmroute_worker.layers.linear import Embedding, Head, RmsNorm
    from warmroute_worker.layers.rope import RotaryEmbedding
    from warmroute_worker.step_plan import StepPlan


class WholeDecoder:
    """The layers of a stage with what stands before and behind them; weights are those of its parts."""

    def __init__(
        self,
        layers: Sequence[_native.Layer],
        hidden: int,
        embedding: Embedding | None,
        rope: RotaryEmbedding,
        end: tuple[RmsNorm, Head] | None,
        attention: PagedAttention,
        group: TensorGroup,
    ) -> None:
        """`end`: of a last stage whose head is a `native.Matrix`."""
        assert can_sum(group)
        self._group = group.native if isinstance(group, SharedMemoryGroup) else None
        self._hidden = hidden
        self._width = None if end is None else sum(end[1].widths)
        self._attention = attention
        self._parts = embedding, rope, end
        """What the addresses below belong to."""
        self._room = 0
        """Tokens that there is memory for."""
        self._all_x = self._x = torch.empty((0, hidden))
        self._all_logits: torch.Tensor | None = None
        self._logits: torch.Tensor | None = None
        self._addresses: tuple[int, int | None] = 0, None
        (cos, sin), table, pool = rope.tables, attention.page_table, attention.pool
        self._native = _native.Decoder(
            layers,
            hidden,
            None if embedding is None else embedding.place(),
            None if end is None else (end[0].weight.tolist(), end[0].eps, _packed(end[1].product), end[1].widths),
            (cos.data_ptr(), sin.data_ptr(), len(cos)),
            (table.ctypes.data, *table.shape),
            pool.page_size,
            (pool.data.data_ptr(), pool.data.numel()),
        )

    @property
    def makes_logits(self) -> bool:
        return self._width is not None

    @property
    def is_all(self) -> bool:
        """It goes from token ids to logits."""
        return self.makes_logits and self._parts[0] is not None

    def __call__(
        self, plan: StepPlan, before: Callable[[torch.Tensor], None] | None, threads: int, *, samples: bool
    ) -> torch.Tensor | None:
        """[tokens, hidden], or [tokens, vocab] logits at ranks that draw and None at others, if this makes logits.
        Valid until the next call.

        `before` fills in the vectors, where this is not the first stage.
        """
        self._attention.update(plan)
        if len(self._x) != len(plan):
            self._make_room(len(plan), samples)
        if before is not None:
            before(self._x)
        self._native.decode(plan.token_ids, plan.rows, plan.starts, *self._addresses, threads, self._group)
        return self._x if self._width is None else self._logits

    def decode_on(
        self, plan: StepPlan, seconds: float, messages: int | None, threads: int, *, samples: bool
    ) -> list[int]:
        """`plan` and the steps that may follow it, those that fit in so many seconds, as long as nothing comes at the
        descriptor `messages`: the tokens of all, one step behind the other, at every rank. Only if this `is_all`."""
        self._attention.update(plan)
        if len(self._x) != len(plan):
            self._make_room(len(plan), samples)
        return self._native.decode_on(
            plan.token_ids,
            plan.rows,
            plan.starts,
            plan.stop_ids,
            1 + plan.more,
            seconds,
            self._addresses[0],
            threads,
            self._group,
            messages,
        )

    def _make_room(self, tokens: int, samples: bool) -> None:
        """For what comes out. It only grows: logits of many tokens would be mapped and unmapped in every step."""
        if tokens > self._room:
            self._set_room(0, samples)  # before there is more
            self._set_room(tokens, samples)
        self._x = self._all_x[:tokens]
        self._logits = None if self._all_logits is None else self._all_logits[:tokens]

    def _set_room(self, tokens: int, samples: bool) -> None:
        # If there is no memory, there is no room: the next step asks for it again.
        self._room, self._x = 0, torch.empty((0, self._hidden))
        self._all_logits = self._logits = None
        self._all_x = torch.empty((tokens, self._hidden))
        if self._width is not None and samples:
            self._all_logits = torch.empty((tokens, self._width))
        logits = None if self._all_logits is None else self._all_logits.data_ptr()
        self._addresses = self._all_x.data_ptr(), logits
        self._room = tokens


def is_whole(plan: StepPlan) -> bool:
    """Every token decodes and every sequence gets one, and no trace is made, which shows the single operations."""
    if not 0 < len(plan.token_ids) == len(plan) or plan.logit_rows is not None:
        return False
    return not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def can_sum(group: TensorGroup) -> bool:
    """Whether the native call can add up what the ranks of the group have."""
    return group.size == 1 or isinstance(group, SharedMemoryGroup)


def native_layer(attention_norm: RmsNorm, attention: object, mlp_norm: RmsNorm, mlp: object) -> _native.Layer | None:
    """None: the layer has something that there is no native call for."""
    if not (isinstance(attention, GroupedAttention) and isinstance(mlp, GatedMlp)):
        return None
    products = [linear.product for linear in (attention.qkv, attention.output, mlp.gate_up, mlp.down)]
    packed = [product.packed for product in products if isinstance(product, Matrix)]
    if len(packed) < len(products):
        return None
    head_norms = attention.head_norms
    return _native.Layer(
        packed,
        (attention_norm.weight.tolist(), mlp_norm.weight.tolist()),
        None if head_norms is None else (head_norms[0].weight.tolist(), head_norms[1].weight.tolist()),
        attention_norm.eps,
        attention.head_dim**-0.5,
        (attention.num_heads, attention.num_kv_heads, attention.head_dim),
    )


def _packed(product: object) -> _native.Matrix:
    assert isinstance(product, Matrix)
    return product.packed
