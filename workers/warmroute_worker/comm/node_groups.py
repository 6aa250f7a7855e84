"""The tensor groups of a worker on several nodes. Imported only there."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import torch.distributed as dist

from warmroute_worker.comm import torch_groups
from warmroute_worker.comm.hierarchical import HierarchicalGroup
from warmroute_worker.comm.node_exchange import NodeExchange
from warmroute_worker.comm.tensor_group import Alone, SharedMemoryGroup
from warmroute_worker.topology import TENSOR_GROUPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute_worker._native import Group
    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.comm.wires import OtherNodes, Watch
    from warmroute_worker.topology import Place


def connect(place: Place, others: OtherNodes, exchange: Callable[[str], list[str]], timeout: float) -> None:
    """All ranks of all nodes."""
    torch_groups.meet(others.links.address, "gloo", place.rank, place.layout.world_size, timeout, exchange)


class NodeGroups:
    """After `connect`. Every rank makes the groups of all, as torch demands."""

    def __init__(
        self,
        place: Place,
        others: OtherNodes,
        open_local: Callable[[str], Group | None],
        watch: Watch,
        timeout: float,
    ) -> None:
        self._place, self._nodes, self._open_local = place, others.nodes, open_local
        self._spanning = {
            name: by_node for name, by_node in others.nodes.spanning().items() if name.split()[0] in TENSOR_GROUPS
        }
        limit = datetime.timedelta(seconds=timeout)
        self._between: dict[str, NodeExchange] = {}
        for name, by_node in self._spanning.items():
            speakers = [ranks[0] for ranks in by_node.values()]
            made = dist.new_group(speakers, timeout=limit)
            if place.rank in speakers:
                assert isinstance(made, dist.ProcessGroup)
                self._between[name] = NodeExchange(made, name, watch, timeout)

    def group(self, name: str, rank: int, size: int) -> TensorGroup:
        """This rank's end of a group of its own."""
        local, by_node = self._open_local(name), self._spanning.get(name)
        if by_node is None:
            return Alone() if local is None else SharedMemoryGroup(local, rank, size)
        node = list(by_node).index(self._nodes.own)
        index = by_node[self._nodes.own].index(self._place.rank)
        return HierarchicalGroup(
            [len(ranks) for ranks in by_node.values()], node, local, index, self._between.get(name)
        )
