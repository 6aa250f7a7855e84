"""What the ranks say of themselves, read from the memory they share: nobody is asked, nobody is disturbed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from warmroute_worker._native import Region
    from warmroute_worker.topology import Nodes

OPERATIONS = ("all_reduce", "gather", "broadcast", "barrier", "reduce_scatter", "all_to_all")


class RankStatuses:
    """For whoever only looks."""

    def __init__(self, nodes: Nodes, region: Region) -> None:
        """Of ranks on other nodes the region has what their supervisors said a moment ago."""
        self._nodes, self._layout, self._region = nodes, nodes.layout, region

    def read(self) -> list[dict[str, Any]]:
        """By rank: its coordinates, what it holds, what it did. Bytes of an all-reduce: of vectors, not of slots."""
        ranks = []
        for rank in range(self._layout.world_size):
            place, status = self._layout.place(rank), self._region.status(rank)
            collectives = {
                op: {"calls": status.pop(f"{op}_calls"), "bytes": status.pop(f"{op}_bytes")} for op in OPERATIONS
            }
            coordinates = {
                "rank": rank,
                "node": self._nodes.node_of(rank),
                "tp_rank": place.tp_rank,
                "pp_rank": place.pp_rank,
                "dp_rank": place.dp_rank,
                "ep_rank": place.ep_rank,
            }
            ranks.append({**coordinates, **status, "collectives": collectives})
        return ranks
