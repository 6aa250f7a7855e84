"""What the supervisor tells the ranks of its node about other nodes. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

NO_DESCRIPTOR = -1
"""In the place of a driver that is on another node."""


@dataclass(frozen=True)
class NodeLinks:
    """Of a worker on one node everything is empty."""

    wires: dict[str, dict[int, int]] = field(default_factory=dict)
    """By group and node: connected sockets, for the rank that speaks for this node in the group."""
    address: str = ""
    """Where other nodes reach this one."""
    ranks_on_host: int | None = None
    """Ranks that share this host's cores and memory, those of other nodes on it too; None: all there are."""

    def descriptors(self, groups: list[str] | None = None) -> list[int]:
        """The sockets of these groups, or of all."""
        wanted = self.wires if groups is None else groups
        return [fd for name in wanted for fd in self.wires.get(name, {}).values()]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> NodeLinks:
        values = json.loads(text)
        wires = {name: {int(node): fd for node, fd in ends.items()} for name, ends in values.pop("wires").items()}
        return cls(wires=wires, **values)
