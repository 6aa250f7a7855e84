"""Messages and vectors between ranks on different nodes: over sockets, from one rank of each node to those of others.

On its node that rank hands them on through shared memory. Imports no torch.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from warmroute_worker._native import CollectiveError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from warmroute_worker._native import Group, Region
    from warmroute_worker.node_links import NodeLinks
    from warmroute_worker.topology import Nodes

NAP_SECONDS = 0.2
"""How long a rank waits before it looks whether everybody stops, and shows that it lives."""

WORDS_SECONDS = 2.0
"""When a connection breaks, the supervisor soon knows which node is gone; so long its words are waited for."""

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class OtherNodes:
    """What a rank knows of them."""

    nodes: Nodes
    links: NodeLinks


class Watch:
    """What a rank does while it waits for another node."""

    def __init__(self, region: Region, rank: int) -> None:
        self._region, self._rank = region, rank

    def look(self) -> None:
        """Shows that the rank lives. Raises CollectiveError when the ranks are to stop."""
        self._region.add(self._rank, "heartbeat", 1)
        reason = self._region.aborted()
        if reason is not None:
            raise CollectiveError(reason)

    def lost(self, what: str) -> CollectiveError:
        """A connection is broken: who knows why says so first, in a moment."""
        deadline = time.monotonic() + WORDS_SECONDS
        while self._region.aborted() is None and time.monotonic() < deadline:
            time.sleep(NAP_SECONDS / 10)
        self._region.abort(what)
        return CollectiveError(self._region.aborted() or what)

    def count(self, since_ns: int, sent_bytes: int) -> None:
        """Something was exchanged with other nodes since then."""
        self._region.add(self._rank, "comm_ns", time.perf_counter_ns() - since_ns)
        self._region.add(self._rank, "node_bytes", sent_bytes)


class Wire:
    """A socket to another node's rank. Calls that wait raise CollectiveError; `timeout` None: they wait for ever."""

    def __init__(self, fd: int, name: str, watch: Watch) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)
        self._name, self._watch = name, watch

    def send(self, data: bytes | memoryview, timeout: float | None) -> None:
        rest, began = memoryview(data), time.monotonic()
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, began, timeout)
            except OSError as error:
                raise self._watch.lost(f"{self._name} is gone") from error

    def receive_into(self, buffer: memoryview, timeout: float | None) -> None:
        """As many bytes as it holds."""
        rest, began = buffer, time.monotonic()
        while rest:
            try:
                count = self._sock.recv_into(rest)
            except BlockingIOError:
                self._wait(select.POLLIN, began, timeout)
                continue
            except OSError:
                count = 0
            if not count:
                raise self._watch.lost(f"{self._name} is gone")
            rest = rest[count:]

    def close(self) -> None:
        self._sock.close()

    def _wait(self, event: int, began: float, timeout: float | None) -> None:
        poll = select.poll()
        poll.register(self._sock, event)
        while not poll.poll(NAP_SECONDS * 1000):
            self._watch.look()
            if timeout is not None and time.monotonic() - began >= timeout:
                raise self._watch.lost(f"{self._name} did not come within {timeout:g} s")


class SpanningGroup:
    """Ranks on several nodes: what `_native.Group` does, as far as messages need it.

    The first rank of each node has wires to those of the others, and hands on what comes.
    """

    def __init__(
        self,
        by_node: Mapping[int, Sequence[int]],
        own: int,
        local: Group | None,
        wires: Mapping[int, Wire],
        watch: Watch,
        timeout: float,
    ) -> None:
        """`by_node`: all members; `own`: which node this is; `local`: the members on it, if there are others; `wires`:
        empty if another rank speaks for this node."""
        self._places = [(node, index) for node, ranks in by_node.items() for index in range(len(ranks))]
        self._nodes, self._own = list(by_node), own
        self._local, self._wires = local, dict(wires)
        self._watch, self._timeout = watch, timeout

    def message(self, message: bytes | None, root: int) -> bytes:
        """What the member `root` gives; None elsewhere, where this waits as long as it takes."""
        node, index = self._places[root]
        if node == self._own:
            # Who is far away first. A root that does not speak for its node hands it to who does.
            if message is not None and self._wires:
                self._tell(message)
            data = message if self._local is None else self._local.message(message, index)
            assert data is not None
            if message is None and self._wires:
                self._tell(data)
            return data
        data = None
        if self._wires:
            head = bytearray(_LENGTH.size)
            self._wires[node].receive_into(memoryview(head), None)
            began = time.perf_counter_ns()  # waiting for work is no communication
            body = bytearray(_LENGTH.unpack(head)[0])
            self._wires[node].receive_into(memoryview(body), self._timeout)
            self._watch.count(began, 0)
            data = bytes(body)
        if self._local is not None:
            data = self._local.message(data, 0)
        assert data is not None
        return data

    def broadcast(self, address: int, num_bytes: int, root: int) -> None:
        """The vector becomes what it is at the member `root`."""
        node, index = self._places[root]
        began, sent = time.perf_counter_ns(), 0
        if node == self._own:
            if self._local is not None:
                self._local.broadcast(address, num_bytes, index)
            for wire in self._wires.values():
                wire.send(_memory(address, num_bytes), self._timeout)
                sent += num_bytes
        else:
            if self._wires:
                self._wires[node].receive_into(_memory(address, num_bytes), self._timeout)
            if self._local is not None:
                self._local.broadcast(address, num_bytes, 0)
        self._watch.count(began, sent)

    def barrier(self) -> None:
        """Returns when all members have called it."""
        if self._local is not None:
            self._local.barrier()
        for wire in self._wires.values():
            wire.send(b"!", self._timeout)
        for wire in self._wires.values():
            wire.receive_into(memoryview(bytearray(1)), self._timeout)
        if self._local is not None:
            self._local.barrier()

    def exchange(
        self, kind: str, address: int, sizes: Sequence[int], place: int, wanted: Sequence[tuple[int, int]], out: int
    ) -> None:
        """Each member shows `sizes[member]` bytes; `out` gets all of them, one after the other: all must be wanted."""
        assert list(wanted) == [(0, size) for size in sizes]
        del kind
        began = time.perf_counter_ns()
        spans = {node: self._span(node, sizes) for node in self._nodes}
        start, stop = spans[self._own]
        everything = _memory(out, sum(sizes))
        if self._local is None:
            everything[start:stop] = _memory(address, sizes[place])
        else:
            local_sizes = [size for (node, _), size in zip(self._places, sizes, strict=True) if node == self._own]
            self._local.gather(address, local_sizes, self._places[place][1], None, out + start)
        for wire in self._wires.values():
            wire.send(everything[start:stop], self._timeout)
        for node, wire in self._wires.items():
            wire.receive_into(everything[slice(*spans[node])], self._timeout)
        if self._local is not None:
            self._local.broadcast(out, start, 0)
            self._local.broadcast(out + stop, len(everything) - stop, 0)
        self._watch.count(began, (stop - start) * len(self._wires))

    def _tell(self, data: bytes) -> None:
        began = time.perf_counter_ns()
        frame = _LENGTH.pack(len(data)) + data
        for wire in self._wires.values():
            wire.send(frame, self._timeout)
        self._watch.count(began, len(frame) * len(self._wires))

    def _span(self, node: int, sizes: Sequence[int]) -> tuple[int, int]:
        """Where the bytes of a node stand among all."""
        owners = [owner for owner, _ in self._places]
        first = owners.index(node)
        return sum(sizes[:first]), sum(sizes[: first + owners.count(node)])


def _memory(address: int, num_bytes: int) -> memoryview:
    """Bytes that are somebody else's, for the time of a call."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
