"""Tensors between nodes: what the ranks that speak for their nodes in a group do together, over gloo.

Gloo's own time-outs leave its connections unusable, and it says nothing of why a peer is gone; so each operation is
waited for in naps, between which the rank looks whether everybody stops.
"""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from warmroute_worker._native import CollectiveError
from warmroute_worker.comm.wires import NAP_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from warmroute_worker.comm.wires import Watch

IN_PARTS_FROM = 16 << 10
"""Numbers from which a vector of more than two nodes is summed in parts, each by one of them."""

_NAP = datetime.timedelta(seconds=NAP_SECONDS)


class NodeExchange:
    """Of one group; nodes are numbered by their place in it. All tensors are on the CPU."""

    def __init__(self, group: dist.ProcessGroup, name: str, watch: Watch, timeout: float) -> None:
        self._group, self._name, self._watch, self._timeout = group, name, watch, timeout
        self.node, self.size = group.rank(), group.size()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Of all nodes' vectors, in the order of the nodes: the same bits on each of them."""
        flat = x.reshape(-1)
        if self.size == 2 or len(flat) < IN_PARTS_FROM:
            return added(list(self._gather(flat))).view(x.shape)
        length = -(-len(flat) // self.size)
        padded = torch.nn.functional.pad(flat, (0, length * self.size - len(flat)))
        parts = torch.empty_like(padded)
        self._do(
            lambda: dist.all_to_all_single(parts, padded, group=self._group, async_op=True),
            x.itemsize * length * (self.size - 1),
        )
        own = added(list(parts.view(self.size, length)))
        return self._gather(own).view(-1)[: len(flat)].view(x.shape)

    def gather(self, x: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """The rows of each node; `counts`: how many it has."""
        if len(set(counts)) == 1:
            # A sum over int64, or over a byte, would not do.
            return [part.view(x.dtype).view(x.shape) for part in self._gather(_bytes(x))]
        return self.exchange([x] * self.size, counts)

    def exchange(self, parts: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
        """Rows for each node -> those from each, `counts[node]` of them. What is for the own node stays as it is."""
        like = parts[self.node]
        row = like.itemsize * like.shape[1:].numel()
        data = [_bytes(part) if node != self.node else _bytes(part[:0]) for node, part in enumerate(parts)]
        sizes = [count * row if node != self.node else 0 for node, count in enumerate(counts)]
        source, target = torch.cat(data), torch.empty(sum(sizes), dtype=torch.uint8)
        splits = [len(part) for part in data]
        self._do(
            lambda: dist.all_to_all_single(target, source, sizes, splits, group=self._group, async_op=True), len(source)
        )
        found = [part.clone().view(like.dtype).view(-1, *like.shape[1:]) for part in torch.split(target, sizes)]
        found[self.node] = like
        return found

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """[nodes, ...]"""
        parts = x.new_empty((self.size, *x.shape))
        self._do(
            lambda: dist.all_gather_into_tensor(parts.view(-1), x.contiguous(), group=self._group, async_op=True),
            x.nbytes * (self.size - 1),
        )
        return parts

    def _do(self, operation: Callable[[], dist.Work | None], sent_bytes: int) -> None:
        began = time.perf_counter_ns()
        try:
            work = operation()
            assert work is not None
            self._wait(work)
        except RuntimeError as error:
            if isinstance(error, CollectiveError):
                raise
            raise self._watch.lost(f"another node of {self._name} is gone") from error
        self._watch.count(began, sent_bytes)

    def _wait(self, work: dist.Work) -> None:
        began = time.monotonic()
        while True:
            try:
                work.wait(_NAP)
            except RuntimeError:
                if work.is_completed():  # it failed; else it only takes longer
                    raise
                self._watch.look()
                if time.monotonic() - began >= self._timeout:
                    raise self._watch.lost(
                        f"another node did not come to {self._name} within {self._timeout:g} s"
                    ) from None
            else:
                return


def added(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """From left to right; 16-bit numbers in single precision, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
