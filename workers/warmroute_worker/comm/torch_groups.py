"""Groups over torch.distributed: gloo on CPU, NCCL on CUDA. Imported only where they are asked for."""

from __future__ import annotations

import datetime
import socket
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from warmroute_worker import topology
from warmroute_worker.comm.tensor_group import row_ranges

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from warmroute_worker.comm.tensor_group import TensorGroup

HOST = "127.0.0.1"


def meet(
    host: str, backend: str, rank: int, world_size: int, timeout: float, exchange: Callable[[str], list[str]]
) -> None:
    """Join all ranks in one library; `group` is for what they do together. Rank 0 opens a port on its `host` and tells
    the others, by `exchange`, which one."""
    limit = datetime.timedelta(seconds=timeout)

    def store(host: str, port: int, listen_fd: int | None) -> TCPStore:
        return TCPStore(host, port, world_size, rank == 0, limit, wait_for_workers=False, master_listen_fd=listen_fd)

    if rank == 0:
        # On this address only, not on all that the host has.
        with socket.create_server((host, 0)) as listener:
            port: int = listener.getsockname()[1]
            found = store(host, port, listener.detach())
        exchange(f"{host} {port}")
    else:
        where, number = exchange("")[0].split()
        found = store(where, int(number), None)
    dist.init_process_group(backend, store=found, rank=rank, world_size=world_size, timeout=limit)


def group(members: Sequence[Sequence[int]], rank: int, backend: str, timeout: float) -> TensorGroup:
    """The group of those `members` to whom `rank` belongs. Every rank makes the groups of all, as torch demands."""
    limit = datetime.timedelta(seconds=timeout)
    groups = [dist.new_group(list(ranks), timeout=limit) for ranks in members]
    own = next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
    assert isinstance(own, dist.ProcessGroup)
    return TorchGroup(own, backend)


class TorchGroup:
    """See `TensorGroup`. Sums are the same on all ranks; how they are rounded is the library's business.

    Neither library gathers parts of different sizes. Where those of the ranks differ little, all are padded to the
    largest (SGLang's MAX_LEN); where they differ much, a sum over vectors that are zero elsewhere (SUM_LEN) is less.
    """

    def __init__(self, group: dist.ProcessGroup, name: str) -> None:
        self._group = group
        self.name = name
        self.rank, self.size = group.rank(), group.size()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x

    def sum_rows(self, x: torch.Tensor, wanted: Sequence[range]) -> torch.Tensor:
        own, longest = wanted[self.rank], max(map(len, wanted))
        if not longest:
            return x[:0]
        if sums_are_less(list(map(len, wanted))):
            return self.sum(x)[own.start : own.stop]
        padded = x.new_zeros((self.size, longest, x.shape[1]))
        for part, rows in zip(padded, wanted, strict=True):
            part[: len(rows)] = x[rows.start : rows.stop]
        result = x.new_empty((longest, x.shape[1]))
        dist.reduce_scatter_tensor(result, padded.flatten(0, 1), group=self._group)
        return result[: len(own)]

    def gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        longest, places = max(counts), row_ranges(counts)
        if not longest:
            return x[:0]
        if sums_are_less(counts) and x.dtype.is_floating_point:
            everything = x.new_zeros((sum(counts), *x.shape[1:]))
            own = places[self.rank]
            everything[own.start : own.stop] = x
            return self.sum(everything)
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
        parts = x.new_empty((self.size * longest, *x.shape[1:]))
        dist.all_gather_into_tensor(parts, padded, group=self._group)
        return torch.cat([part[:count] for part, count in zip(torch.split(parts, longest), counts, strict=True)])

    def exchange_rows(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        incoming = [row[self.rank] for row in counts]
        result = x.new_empty((sum(incoming), *x.shape[1:]))
        dist.all_to_all_single(result, x.contiguous(), incoming, list(counts[self.rank]), group=self._group)
        return result

    def join_columns(self, x: torch.Tensor, total: int, wanted: range | None) -> torch.Tensor | None:
        widths = [len(topology.share(total, rank, self.size)) for rank in range(self.size)]
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1]))
        parts = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(parts, padded, group=self._group)
        if wanted is None:
            return None
        shares = [part[wanted.start : wanted.stop, :width] for part, width in zip(parts, widths, strict=True)]
        return torch.cat(shares, dim=1)


def sums_are_less(counts: Sequence[int]) -> bool:
    """Whether a sum over the rows of all moves less than padding everybody's to the longest: SGLang's rule."""
    return sum(counts) * 2 < max(counts) * len(counts)
