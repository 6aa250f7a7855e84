"""The other nodes of the worker, as a supervisor sees them while they run. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from warmroute_worker._native import Region
    from warmroute_worker.lifecycle import Actions, Lifecycle
    from warmroute_worker.node_lifecycle import NodeLifecycle
    from warmroute_worker.node_line import Line
    from warmroute_worker.topology import Nodes

BEAT_SECONDS = 1.0


class Peers:
    """Node 0 has all others, the others have node 0. What they say is decided about by the lifecycle."""

    def __init__(
        self,
        nodes: Nodes,
        lines: Mapping[int, Line],
        hosts: list[str],
        region: Region,
        lifecycle: Lifecycle | NodeLifecycle,
        timeout: float,
        now: float,
    ) -> None:
        """`timeout`: seconds after which a node that says nothing hangs."""
        self._nodes, self._lines, self._hosts = nodes, dict(lines), hosts
        self._region, self._lifecycle, self._timeout = region, lifecycle, timeout
        self._heard = dict.fromkeys(lines, now)
        self._beaten = now
        self._told_drain = self._told_failure = False
        for line in lines.values():
            line.notice_silence()

    def lines(self) -> list[tuple[int, Line]]:
        """Of the nodes that have not ended."""
        return list(self._lines.items())

    def hear(self, node: int, now: float) -> Iterator[Actions]:
        """What `node` has said."""
        line = self._lines.get(node)
        if line is None:
            return
        self._heard[node] = now
        try:
            messages = line.receive()
        except ValueError:
            messages = None
        if messages is None:
            yield self._ended(node, f"{self._name(node)} is gone: its connection ended", now)
        for message in messages or ():
            match message:
                case {"end": cause}:
                    yield self._ended(node, None if cause is None else f"{self._name(node)} ends: {cause}", now)
                    return
                case {"failed": str(cause)}:
                    yield self._lifecycle.node_ended(f"{self._name(node)} ends: {cause}", now)
                case {"ready": str(text)}:
                    yield self._lifecycle.ready(text)
                case {"drain": _}:
                    yield self._lifecycle.told_to_drain(now)
                case {"statuses": dict(statuses)}:
                    self._note(node, statuses)
                case _:
                    pass

    def tell(self, message: dict[str, Any]) -> None:
        """All of them."""
        for _, line in self.lines():
            line.send(message)

    def look(self, now: float) -> Iterator[Actions]:
        """What has to be said from time to time, and who has said nothing for too long."""
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            statuses = {str(rank): self._region.status_words(rank) for rank in self._nodes.local_ranks}
            for _, line in self.lines():
                line.flush()
                if not line.is_busy:
                    line.send({"statuses": statuses})
        if self._lifecycle.is_draining and not self._told_drain:
            self._told_drain = True
            self.tell({"drain": True})
        # While node 0 drains, what looks like an error may turn out to be none: then it says so at its end.
        is_certain = self._nodes.own != 0 or not self._lifecycle.is_draining
        if self._lifecycle.cause is not None and is_certain and not self._told_failure:
            self._told_failure = True
            self.tell({"failed": self._lifecycle.cause})
        for node, _ in self.lines():
            if now - self._heard[node] >= self._timeout:
                text = f"{self._name(node)} has shown no life for {self._timeout:g} s (--watchdog-timeout)"
                yield self._ended(node, text, now)

    def close(self) -> None:
        """This node ends now."""
        self.tell({"end": self._lifecycle.cause})
        for _, line in self.lines():
            line.close()

    def _ended(self, node: int, words: str | None, now: float) -> Actions:
        del self._lines[node]  # closed by who waits for it
        return self._lifecycle.node_ended(words, now)

    def _note(self, node: int, statuses: Mapping[str, Any]) -> None:
        """What the ranks there say of themselves, for whoever looks here."""
        for rank in self._nodes.ranks_of(node):
            words = statuses.get(str(rank))
            if isinstance(words, list):
                self._region.set_status_words(rank, words)

    def _name(self, node: int) -> str:
        return f"node {node} ({self._hosts[node]})"
