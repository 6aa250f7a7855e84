"""The tensors of the KV pool."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

LARGE = 64 << 20
"""Bytes of a pool from which on it is in large pages: attention reads it from one end of memory to the other."""


class KvPool:
    """What is cached of every token, [layers, parts, slots, heads, dim]; slot = page * page_size + offset.

    Two parts: keys and values. One: latent rows, of which both are made.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        kv_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Room for `num_pages` and the padding page 0; `kv_shape`: parts, heads, dim."""
        parts, heads, dim = kv_shape
        shape = (num_layers, parts, (num_pages + 1) * page_size, heads, dim)
        self.data = _zeros(shape, dtype, device)
        self.page_size = page_size
        # Views made once: slicing the pool for each layer of each step would cost more than the store itself.
        self.keys = [self.data[layer, 0] for layer in range(num_layers)]
        self.values = [self.data[layer, 1] for layer in range(num_layers)] if parts == 2 else []
        self.pages = [self.data[layer].view(parts, num_pages + 1, -1) for layer in range(num_layers)]
        """Per layer [parts, pages, page_size * heads * dim]: what attention gathers from, a page at a time."""


def page_bytes(num_layers: int, page_size: int, kv_shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """Bytes of one page over all layers."""
    return num_layers * page_size * math.prod(kv_shape) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Zero pages of the kernel cost nothing until they are written; torch.zeros writes them all. They must be zero and
    # not just empty: padding is masked by a weight of 0, and 0 * NaN is NaN.
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for a KV pool of {size} bytes: {error}") from error
    if size >= LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a wish
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
