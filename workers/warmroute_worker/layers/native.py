"""Small operations on float32 tensors of the CPU, in Rust (`workers/cpu_kernels`): one call each, in place if possible.

torch needs 8 to 25 us for each of them however small the batch: of a decode step of the demo model that was half.
Whoever calls asks `usable` first; what is checked here are sizes, since below there are only addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from warmroute_worker import _native

if TYPE_CHECKING:
    from warmroute_worker.step_plan import Int64s


def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these functions can be used at all."""
    return device.type == "cpu" and dtype == torch.float32


def norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of [rows, width] x, to which `delta` is added before, in place."""
    rows, width = x.shape
    x_, out = _dense(x), torch.empty_like(x)
    assert weight.shape == (width,)
    added = 0
    if delta is not None:
        delta = _dense(delta)
        assert delta.shape == x.shape
        assert x_ is x, "x is changed"
        added = delta.data_ptr()
    _native.add_and_norm(x_.data_ptr(), added, weight.data_ptr(), out.data_ptr(), rows, width, eps)
    return out


def norm_heads(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each head of [rows, heads, dim], in place; rows may stand apart."""
    rows, heads, dim = x.shape
    assert weight.shape == (dim,)
    assert stands_in_rows(x)
    _native.norm_heads(x.data_ptr(), rows, x.stride(0), heads, weight.data_ptr(), dim, eps)
    return x


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each head of [rows, heads, dim], in place; cos and signed sin are [rows, 1, dim]."""
    rows, heads, dim = x.shape
    assert cos.shape == sin.shape == (rows, 1, dim)
    assert stands_in_rows(x)
    _native.rotate(x.data_ptr(), rows, x.stride(0), heads, dim, cos.data_ptr(), sin.data_ptr())
    return x


def silu_and_multiply(x: torch.Tensor) -> torch.Tensor:
    """[rows, 2n] -> [rows, n]: SiLU of the first half times the second."""
    x = _dense(x)
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype)
    _native.silu_and_multiply(x.data_ptr(), out.data_ptr(), rows, width)
    return out


def rows_of(weight: torch.Tensor, first: int, ids: torch.Tensor) -> torch.Tensor:
    """[rows, width], [n] int64 -> [n, width]: weight[ids[i] - first], zeros where there is no such row. `weight`:
    float32 or bfloat16."""
    assert weight.is_contiguous()
    bfloat16 = _is_bfloat16(weight)
    assert ids.is_contiguous()
    assert ids.dtype == torch.int64
    rows, width = weight.shape
    out = torch.empty((len(ids), width), dtype=torch.float32)
    _native.rows_of(weight.data_ptr(), rows, width, first, ids.data_ptr(), len(ids), out.data_ptr(), bfloat16)
    return out


def likeliest(logits: torch.Tensor) -> Int64s:
    """[rows, vocab] -> where in each row the largest number stands: the first of equal ones."""
    assert logits.dtype == torch.float32
    rows, width = logits.shape
    found = np.empty(rows, np.int64)
    _native.likeliest(_dense(logits).data_ptr(), rows, width, found)
    return found


def store(x: torch.Tensor, slots: torch.Tensor, pool: torch.Tensor) -> None:
    """pool[slots[i]] = x[i], of [rows, heads, dim] and [slots, heads, dim]."""
    rows, heads, dim = x.shape
    assert pool.shape[1:] == (heads, dim)
    assert pool.is_contiguous()
    assert slots.shape == (rows,)
    x = x if stands_in_rows(x) else x.contiguous()
    _native.store(x.data_ptr(), rows, x.stride(0), heads * dim, slots.data_ptr(), pool.data_ptr(), len(pool))


class Matrix:
    """x -> x W^T + b, for [rows, inputs] x. Holds a copy of W and b, in an order of its own.

    W in bfloat16 is kept in 16 bits and multiplied as the same numbers in float32 would be, to the bit.

    One copy of W serves any number of rows, a row's bits do not depend on the others, and a call costs 1 us. oneDNN's
    product takes as long, but 10 us more for each call, which a step of hidden 512 x 8 layers makes 33 times. Us of
    one thread on an AMD EPYC, W in the cache, ours and oneDNN's (least of many, in turn): 2816 x 512, 2 rows 60 and 75,
    8 rows 118 and 133, 128 rows 1924 and 1925; 512 x 1408, 1 row 30 and 47, 512 rows 3530 and 3700; 512 x 256, 1 row
    8.5 and 18.5.
    """

    usable = _native.products_are_fast()

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._outputs, self._inputs = outputs, inputs = weight.shape
        weight = _dense(weight)
        assert bias is None or (bias.shape == (outputs,) and bias.is_contiguous() and bias.dtype == torch.float32)
        biases = 0 if bias is None else bias.data_ptr()
        self.packed = _native.Matrix(weight.data_ptr(), outputs, inputs, biases, _is_bfloat16(weight))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, inputs = x.shape
        assert inputs == self._inputs
        x, out = _dense(x), torch.empty((rows, self._outputs))
        self.packed.multiply(x.data_ptr(), rows, out.data_ptr(), torch.get_num_threads())
        return out


class Seen(NamedTuple):
    """What each of the first `len(rows)` queries of a step sees."""

    rows: Int64s
    """Its sequence's row in the page table."""
    visible: Int64s
    """How many tokens it sees."""
    page_table: np.ndarray
    """[rows, pages] int64"""
    page_size: int
    threads: int


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, value_dim: int, scale: float, seen: Seen
) -> torch.Tensor:
    """[rows, heads, dim] queries over a layer's pool -> [len(seen.rows), heads * value_dim].

    `keys`, `values`: [slots, KV heads, dim], of a value the first `value_dim` numbers count; they may be the same.
    """
    count = len(seen.rows)
    _, heads, dim = queries.shape
    slots, kv_heads, _ = keys.shape
    assert stands_in_rows(queries)
    assert count <= len(queries)
    assert keys.shape[2] == dim
    assert heads % kv_heads == 0
    assert keys.is_contiguous()
    assert values.is_contiguous()
    table = seen.page_table
    assert seen.rows.dtype == seen.visible.dtype == table.dtype == "int64"
    out = torch.empty((count, heads * value_dim), dtype=queries.dtype)
    _native.attend(
        (queries.data_ptr(), count, queries.stride(0), heads),
        (keys.data_ptr(), values.data_ptr(), slots, kv_heads, dim, values.shape[2], value_dim, seen.page_size),
        (table.ctypes.data, *table.shape),
        seen.rows.ctypes.data,
        seen.visible.ctypes.data,
        scale,
        out.data_ptr(),
        seen.threads,
    )
    return out


def stands_in_rows(x: torch.Tensor) -> bool:
    """Whether the heads of each row of [rows, heads, dim] stand side by side."""
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def _is_bfloat16(weight: torch.Tensor) -> bool:
    assert weight.dtype in (torch.float32, torch.bfloat16)
    return weight.dtype == torch.bfloat16


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_contiguous() else x.contiguous()
