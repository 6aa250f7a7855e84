"""Everything that connects one rank with the others: its tensor groups, the plans, its neighbours, and what it tells.

For a worker of one rank all of it is empty, so that nothing above has to ask.
"""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from warmroute_worker._native import CollectiveError, Region
from warmroute_worker.comm.tensor_group import Alone, SharedMemoryGroup
from warmroute_worker.comm.wires import OtherNodes, SpanningGroup, Watch, Wire
from warmroute_worker.topology import Nodes

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from warmroute_worker._native import Group
    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.topology import Layout, Place

__all__ = ["CollectiveError", "OtherNodes", "RankLinks"]

TWO_STAGES_FROM = 64 << 10
"""Larger vectors of more than two ranks are summed in two stages, unless SGLANG_USE_1STAGE_ALLREDUCE is 1: each rank
then reads 2/N of what it reads in one. The bits are the same."""

_CHECKS = 200

SPIN_US = 500
"""How long a rank waits awake before it sleeps, where each rank has a core; after the first 20 us it lets others go
first. With 50 us, which the gap between two steps exceeds, a step of 2 ranks took 0.3 to 0.6 ms longer
(bench/bench_ranks.py)."""


@dataclass(frozen=True)
class Groups:
    """Among whom tensors are divided."""

    stage: TensorGroup
    """All ranks of the stage: MLPs, experts, vocabulary."""
    attention: TensorGroup
    """Those that share the heads, and the pool, of one data-parallel rank; without DP attention the same ones."""
    experts: TensorGroup
    """All ranks of the stage again, for the thread that sends rows to experts."""


class RankLinks:
    """Use on one thread, but for `groups.experts`, which is for the one with the collectives in the background.

    Calls that wait raise CollectiveError when a rank is gone or does not come in time.
    """

    def __init__(
        self,
        place: Place,
        region: Region | None,
        timeout: float,
        cores: int,
        torch_backend: str | None = None,
        others: OtherNodes | None = None,
    ) -> None:
        """`region`: None for one rank without anybody who watches. `timeout`: seconds within which others must come.

        `torch_backend`: gloo or nccl, to add up over torch.distributed instead of through shared memory. `others`: with
        several nodes.
        """
        self.place, self._region, self._others = place, region, others
        layout = place.layout
        self._nodes = Nodes(layout) if others is None else others.nodes
        on_host = None if others is None else others.links.ranks_on_host
        self.ranks_on_host = layout.world_size if on_host is None else on_host
        """How many ranks share the cores and the memory."""
        self.local_rank = place.rank - self._nodes.local_ranks.start
        self._spin_us = SPIN_US if self.ranks_on_host <= cores else 0
        self._timeout = timeout
        self.groups = Groups(Alone(), Alone(), Alone())
        self._all = self._plans = self._drivers = self._before = self._after = self._tokens = None
        if region is None:
            assert layout.world_size == 1
            return
        self._all = self._open("all")
        self._plans = self._open(f"plans of dp {place.dp_rank}")
        self._drivers = self._open("drivers") if place.is_driver else None
        if torch_backend is not None:
            self.groups = self._torch_groups(torch_backend)
        elif others is None:
            self.groups = self._shared_memory_groups()
        else:
            self.groups = self._groups_of_nodes(others)
        if not place.is_first_stage:
            self._before = self._open(f"from rank {place.rank - layout.tp_size} to {place.rank}")
        if not place.is_last_stage:
            self._after = self._open(f"from rank {place.rank} to {place.rank + layout.tp_size}")
        if place.is_driver or place.samples:
            self._tokens = self._open(f"tokens of dp {place.dp_rank}")

    def _open(self, name: str) -> Group | SpanningGroup | None:
        local = self._open_local(name)
        if self._others is None or (by_node := self._nodes.wired().get(name)) is None:
            return local
        assert self._region is not None
        watch, own = Watch(self._region, self.place.rank), self._nodes.own
        wires = {}
        if by_node[own][0] == self.place.rank:
            fds = self._others.links.wires[name]
            wires = {node: Wire(fds[node], f"node {node}", watch) for node in by_node if node != own}
        return SpanningGroup(by_node, own, local, wires, watch, self._timeout)

    def _open_local(self, name: str) -> Group | None:
        """Its ranks on this node."""
        assert self._region is not None
        index = self._nodes.local_group_index(name)
        if index is None:
            return None
        one_stage = os.environ.get("SGLANG_USE_1STAGE_ALLREDUCE") == "1"
        return self._region.group(
            index, self.place.rank, self._spin_us, self._timeout, None if one_stage else TWO_STAGES_FROM
        )

    def _shared_memory_groups(self) -> Groups:
        def group(name: str, rank: int, size: int) -> TensorGroup:
            found = self._open_local(name)
            return Alone() if found is None else SharedMemoryGroup(found, rank, size)

        return self._divided(group)

    def _groups_of_nodes(self, others: OtherNodes) -> Groups:
        """Those on one node by shared memory, the others by it and over the network."""
        from warmroute_worker.comm import node_groups

        assert self._region is not None
        watch = Watch(self._region, self.place.rank)
        try:
            node_groups.connect(self.place, others, self.exchange, self._timeout)
            groups = node_groups.NodeGroups(self.place, others, self._open_local, watch, self._timeout)
        except CollectiveError:
            raise
        except RuntimeError as error:
            words = str(error).partition("\n")[0]
            raise watch.lost(f"{self.place} found no way to other nodes over gloo: {words}") from error
        return self._divided(groups.group)

    def _divided(self, group: Callable[[str, int, int], TensorGroup]) -> Groups:
        """`group`: what makes one, of a name, this rank's place in it, and its size."""
        place = self.place
        layout = place.layout
        stage = group(f"tp of {place.stage_name}", place.tp_rank, layout.tp_size)
        attention = stage
        if layout.dp_attention:
            name = f"attention of dp {place.dp_rank}, {place.stage_name}"
            attention = group(name, place.attention_tp_rank, layout.attention_tp_size)
        experts = group(f"experts of {place.stage_name}", place.tp_rank, layout.tp_size)
        return Groups(stage, attention, experts)

    def _torch_groups(self, backend: str) -> Groups:
        """The driver chooses a port; everybody joins it there, within the time-out."""
        from warmroute_worker.comm import torch_groups

        layout, rank = self.place.layout, self.place.rank
        if layout.world_size == 1:
            return self.groups
        host = torch_groups.HOST if self._others is None else self._others.links.address
        torch_groups.meet(host, backend, rank, layout.world_size, self._timeout, self.exchange)
        by_stage: dict[str, list[int]] = {}
        by_attention: dict[tuple[str, int], list[int]] = {}
        for place in layout.places():
            by_stage.setdefault(place.stage_name, []).append(place.rank)
            by_attention.setdefault((place.stage_name, place.dp_rank), []).append(place.rank)
        made = [
            torch_groups.group(list(members), rank, backend, self._timeout)
            for members in (by_stage.values(), by_attention.values(), by_stage.values())
        ]
        return Groups(*(group if group.size > 1 else Alone() for group in made))

    def measure_reach(self) -> str:
        """Whether every rank reads what the others write, and how fast; a line for the operator."""
        if self._all is None:
            return "p2p check: there is one rank, so there are no peers"
        began = time.perf_counter()
        for _ in range(_CHECKS):
            self._all.barrier()
        latency = (time.perf_counter() - began) / _CHECKS
        ranks = self.place.layout.world_size
        # Each writes its number where the others read it.
        if self.exchange(str(self.place.rank)) != [str(rank) for rank in range(ranks)]:
            raise CollectiveError(f"peer access is not supported between these two devices: rank {self.place.rank}")
        what = "each other's memory" if self._others is None else f"each other on {self._nodes.count} nodes"
        return f"p2p check: {ranks} ranks reach {what}; a barrier takes {latency * 1e6:.0f} us"

    def exchange(self, text: str) -> list[str]:
        """What every rank says, by rank; all must say something."""
        if self._all is None:
            return [text]
        # This one has a deadline; messages have none.
        self._all.barrier()
        own = text.encode()
        ranks = range(self.place.layout.world_size)
        return [self._all.message(own if rank == self.place.rank else None, rank).decode() for rank in ranks]

    def exchange_records(self, record: bytes) -> list[bytes]:
        """What the drivers of all data-parallel ranks say before a step, all of them as many bytes."""
        if self._drivers is None:
            return [record]
        size, own = len(record), self.place.dp_rank
        source, target = bytearray(record), bytearray(size * self.place.layout.dp_size)
        sizes = [size] * self.place.layout.dp_size
        wanted = [(0, size)] * len(sizes)
        self._drivers.exchange("gather", address(source), sizes, own, wanted, address(target))
        return [bytes(target[at : at + size]) for at in range(0, len(target), size)]

    def send_plan(self, data: bytes) -> None:
        if self._plans is not None:
            self._plans.message(data, 0)

    def take_plan(self) -> bytes:
        """The driver's next plan, after however long."""
        assert self._plans is not None
        return self._plans.message(None, 0)

    def order_obeyed(self) -> None:
        """Returns when all who follow the same plans have done what the last one, which was no step, asked for."""
        if self._plans is not None:
            self._plans.barrier()

    def hand_on(self, x: torch.Tensor) -> None:
        """Vectors for the next stage."""
        assert self._after is not None
        host = x.contiguous().cpu()
        self._after.broadcast(host.data_ptr(), host.nbytes, 0)

    def take(self, x: torch.Tensor) -> None:
        """Fill `x` with what the stage before hands on."""
        assert self._before is not None
        host = x if x.device.type == "cpu" else x.cpu()
        self._before.broadcast(host.data_ptr(), host.nbytes, 0)
        if host is not x:
            x.copy_(host)

    def send_tokens(self, data: bytes) -> None:
        assert self._tokens is not None
        self._tokens.message(data, 1)

    def take_tokens(self) -> bytes:
        assert self._tokens is not None
        return self._tokens.message(None, 1)

    @property
    def comm_ns(self) -> int:
        """Nanoseconds spent in collectives so far."""
        return 0 if self._region is None else self._region.get(self.place.rank, "comm_ns")

    def say(self, **numbers: int) -> None:
        """Facts about this rank, for whoever looks."""
        if self._region is not None:
            for name, value in numbers.items():
                self._region.set(self.place.rank, name, value)

    def stepped(self, busy_ns: int, mode: str, steps: int) -> None:
        """So many steps were done, in which the rank was in `mode`: prefill, decode or idle."""
        if self._region is not None:
            self._region.add(self.place.rank, "steps", steps)
            self._region.add(self.place.rank, f"{mode}_steps", steps)
            self._region.add(self.place.rank, "busy_ns", busy_ns)
            self.beat()

    def was_active(self, nanoseconds: int) -> None:
        """So long some plan was under way."""
        if self._region is not None:
            self._region.add(self.place.rank, "active_ns", nanoseconds)

    def beat(self) -> None:
        """Show that this rank lives. Raises CollectiveError when the ranks are to stop."""
        if self._region is not None:
            self._region.add(self.place.rank, "heartbeat", 1)
            reason = self._region.aborted()
            if reason is not None:
                raise CollectiveError(reason)

    def abort(self, reason: str) -> None:
        """Stop all ranks, for this reason if there is none yet."""
        if self._region is not None:
            self._region.abort(reason)


def alone(layout: Layout) -> RankLinks:
    """The links of the only rank, watched by nobody."""
    return RankLinks(layout.place(0), None, 0.0, 1)


def address(buffer: bytearray) -> int:
    """Where its bytes stand, as long as it is neither resized nor freed."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
