"""The ranks among which tensors are divided: one interface, whatever carries the numbers.

`Alone` is a group of one, `SharedMemoryGroup` is for ranks on one host; `torch_groups.py` has gloo and NCCL.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Protocol

import torch

from warmroute_worker import topology

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    def sum_rows(self, x: torch.Tensor, wanted: Sequence[range]) -> torch.Tensor:
        """Of the sum of all ranks' [rows, width], the rows that this rank wants; `wanted`: of each rank."""
        ...

    def gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The rows of all ranks, one after the other; each has as many as `counts` says."""
        ...

    def exchange_rows(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        """What all ranks have for this one, by source. `counts[a][b]`: rows from a to b; a rank's rows stand in the
        order of those whom they are for."""
        ...

    def join_columns(self, x: torch.Tensor, total: int, wanted: range | None) -> torch.Tensor | None:
        """[rows, own share of `total`] of all ranks side by side: of the rows this rank wants, if it wants any."""
        ...


class Alone:
    """One rank needs nobody."""

    rank = 0
    size = 1
    name = "none"

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def sum_rows(self, x: torch.Tensor, wanted: Sequence[range]) -> torch.Tensor:
        return x[wanted[0].start : wanted[0].stop]

    def gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        del counts
        return x

    def exchange_rows(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        del counts
        return x

    def join_columns(self, x: torch.Tensor, total: int, wanted: range | None) -> torch.Tensor | None:
        del total
        if wanted is None:
            return None
        # All rows, in most steps, as they are.
        return x if len(wanted) == len(x) else x[wanted.start : wanted.stop]


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
                self.native.all_reduce(host.data_ptr(), host.nbytes, DTYPES[host.dtype])
        else:
            self.native.all_reduce(host.data_ptr(), host.nbytes, DTYPES[host.dtype])
        return host if host.device == x.device else host.to(x.device)

    def sum_rows(self, x: torch.Tensor, wanted: Sequence[range]) -> torch.Tensor:
        host, own = x.contiguous().cpu(), wanted[self.rank]
        size = host[:1].nbytes if len(host) else 0
        with torch.profiler.record_function("reduce_scatter"):
            self.native.reduce_scatter(
                host.data_ptr(), host.nbytes, (own.start * size, own.stop * size), DTYPES[host.dtype]
            )
        return host[own.start : own.stop].to(x.device)

    def gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        wanted = [range(count) for count in counts]
        return self._exchange("gather", x, counts, wanted)

    def exchange_rows(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        firsts = [sum(of_source[: self.rank]) for of_source in counts]
        wanted = [range(first, first + row[self.rank]) for first, row in zip(firsts, counts, strict=True)]
        return self._exchange("all_to_all", x, [sum(row) for row in counts], wanted)

    def join_columns(self, x: torch.Tensor, total: int, wanted: range | None) -> torch.Tensor | None:
        host, itemsize = x.contiguous().cpu(), x.itemsize
        widths = [len(topology.share(total, rank, self.size)) for rank in range(self.size)]
        rows = range(0) if wanted is None else wanted
        parts = torch.empty(len(rows) * total, dtype=x.dtype)
        self.native.exchange(
            "gather",
            host.data_ptr(),
            [len(x) * width * itemsize for width in widths],
            self.rank,
            [(rows.start * width * itemsize, rows.stop * width * itemsize) for width in widths],
            parts.data_ptr(),
        )
        if wanted is None:
            return None
        if len(rows) == 1:
            return parts.view(1, total).to(x.device)
        shares = torch.split(parts, [len(rows) * width for width in widths])
        joined = torch.cat([part.view(len(rows), width) for part, width in zip(shares, widths, strict=True)], dim=1)
        return joined.to(x.device)

    def _exchange(self, kind: str, x: torch.Tensor, counts: Sequence[int], wanted: Sequence[range]) -> torch.Tensor:
        """`wanted`: which of each rank's rows."""
        host = x.contiguous().cpu()
        assert len(host) == counts[self.rank]
        out = torch.empty((sum(map(len, wanted)), *host.shape[1:]), dtype=host.dtype)
        size = host.itemsize * host.shape[1:].numel()
        with torch.profiler.record_function(kind):
            self.native.exchange(
                kind,
                host.data_ptr(),
                [count * size for count in counts],
                self.rank,
                [(rows.start * size, rows.stop * size) for rows in wanted],
                out.data_ptr(),
            )
        return out.to(x.device)


def row_ranges(counts: Sequence[int]) -> list[range]:
    """Of rows that stand one after the other, which belong to whom."""
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
