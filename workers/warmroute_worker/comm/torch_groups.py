"""Groups over torch.distributed: gloo on CPU, NCCL on CUDA. Imported only where they are asked for."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from warmroute_worker import topology

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker.comm.tensor_group import TensorGroup

HOST = "127.0.0.1"


def serve(world_size: int, timeout: float) -> TCPStore:
    """Where the ranks meet, on a free port."""
    return TCPStore(HOST, 0, world_size, True, datetime.timedelta(seconds=timeout), wait_for_workers=False)


def join(port: int, world_size: int, timeout: float) -> TCPStore:
    """The same, from the other ranks."""
    return TCPStore(HOST, port, world_size, False, datetime.timedelta(seconds=timeout), wait_for_workers=False)


def connect(
    store: TCPStore, backend: str, rank: int, world_size: int, stages: Sequence[Sequence[int]], timeout: float
) -> TensorGroup:
    """The group of `rank`'s stage. Every rank makes the groups of all stages, as torch demands."""
    limit = datetime.timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    groups = [dist.new_group(list(members), timeout=limit) for members in stages]
    own = next(group for group, members in zip(groups, stages, strict=True) if rank in members)
    assert isinstance(own, dist.ProcessGroup)
    return TorchGroup(own, backend)


class TorchGroup:
    """See `TensorGroup`. Sums are the same on all ranks; how they are rounded is the library's business."""

    def __init__(self, group: dist.ProcessGroup, name: str) -> None:
        self._group = group
        self.name = name
        self.rank, self.size = group.rank(), group.size()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x

    def join_columns(self, x: torch.Tensor, total: int) -> torch.Tensor | None:
        # Neither library gathers parts of different widths: the widest is what everybody sends.
        widths = [len(topology.share(total, rank, self.size)) for rank in range(self.size)]
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[1]))
        parts = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(parts, padded, group=self._group)
        if self.rank:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
