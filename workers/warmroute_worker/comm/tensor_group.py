"""The ranks among which tensors are divided: one interface, whatever carries the numbers.

`Alone` is a group of one, `SharedMemoryGroup` is for ranks on one host; `torch_groups.py` has gloo and NCCL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from warmroute_worker import topology

if TYPE_CHECKING:
    from warmroute_worker._native import Group


class TensorGroup(Protocol):
    """What layers need. Every rank must make the same calls in the same order; CollectiveError: one is gone."""

    rank: int
    """Place in the group."""
    size: int
    name: str
    """What carries the numbers: `shared memory`, `gloo`, `nccl` or `none`."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each of them; `x` may be overwritten."""
        ...

    def join_columns(self, x: torch.Tensor, total: int) -> torch.Tensor | None:
        """[rows, own share of `total`] of all ranks side by side: [rows, total] at rank 0, None elsewhere."""
        ...


class Alone:
    """One rank needs nobody."""

    rank = 0
    size = 1
    name = "none"

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def join_columns(self, x: torch.Tensor, total: int) -> torch.Tensor | None:
        del total
        return x


class SharedMemoryGroup:
    """Ranks on one host. Tensors on a GPU go through the host's memory: correct on any number of devices, and slow."""

    name = "shared memory"

    def __init__(self, group: Group, rank: int, size: int) -> None:
        self.native = group
        self.rank, self.size = rank, size

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        host = x.contiguous() if x.device.type == "cpu" else x.cpu()
        if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            with torch.profiler.record_function("all_reduce"):
                self.native.all_reduce(host.data_ptr(), host.nbytes, _DTYPES[host.dtype])
        else:
            self.native.all_reduce(host.data_ptr(), host.nbytes, _DTYPES[host.dtype])
        return host if host.device == x.device else host.to(x.device)

    def join_columns(self, x: torch.Tensor, total: int) -> torch.Tensor | None:
        host = x.contiguous().cpu()
        widths = [len(topology.share(total, rank, self.size)) for rank in range(self.size)]
        sizes = [len(x) * width * x.itemsize for width in widths]
        if self.rank:
            self.native.gather(host.data_ptr(), sizes, self.rank, 0, None)
            return None
        parts = torch.empty(len(x) * total, dtype=x.dtype)
        self.native.gather(host.data_ptr(), sizes, 0, 0, parts.data_ptr())
        shares = torch.split(parts, [len(x) * width for width in widths])
        joined = torch.cat([part.view(len(x), width) for part, width in zip(shares, widths, strict=True)], dim=1)
        return joined.to(x.device)


_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
