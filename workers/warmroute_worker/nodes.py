"""How the launchers of one worker find each other: node 0 listens, the others come, all see that they fit together.

Then sockets are laid between them: a line between node 0 and each other, on which the supervisors say that they live; a
wire for each group of ranks that has messages for another node; and one from each driver to the HTTP process on node 0.
All ranks inherit their ends. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmroute_worker import node_agreement
from warmroute_worker.node_line import Line
from warmroute_worker.node_reception import Reception, is_gone

if TYPE_CHECKING:
    from collections.abc import Mapping

    from warmroute_worker.args import WorkerArgs

RETRY_SECONDS = 0.2
CONNECT_SECONDS = 5.0
"""One attempt; a host that does not exist answers nothing at all."""


class NodesError(Exception):
    """The nodes do not come together; the message is one line."""


@dataclass
class Meeting:
    """What came of it, from the view of one node."""

    lines: dict[int, Line]
    """By node: node 0 has one to each, the others one to node 0."""
    hosts: list[str]
    """By node, as others reach it."""
    ranks_on_host: int
    wires: dict[str, dict[int, socket.socket]] = field(default_factory=dict)
    """By group and node."""
    drivers: dict[int, socket.socket] = field(default_factory=dict)
    """Between the HTTP process and the drivers of other nodes, by data-parallel rank: the end that is here."""


@dataclass(frozen=True)
class _Node:
    """What everybody learns of a node."""

    host: str
    port: int
    boot_id: str


def meet(args: WorkerArgs, folder: Path) -> Meeting:
    """Until all are connected with all. `folder`: the model's. Raises NodesError, within `dist_timeout`."""
    deadline = time.monotonic() + args.dist_timeout
    description = node_agreement.described(args, folder)
    return (
        _Host(args, deadline, description).run() if args.node_rank == 0 else _Guest(args, deadline, description).run()
    )


class _Side:
    """What both sides do."""

    def __init__(self, args: WorkerArgs, deadline: float, description: Mapping[str, Any]) -> None:
        self._args, self._deadline, self._description = args, deadline, description
        self._nodes = args.nodes
        self._where = args.dist_init_addr
        self._timeout = f"{args.dist_timeout:g} s (--dist-timeout)"

    def _meeting(self, lines: dict[int, Line], table: list[_Node]) -> Meeting:
        neighbours = sum(node.boot_id == table[self._nodes.own].boot_id for node in table)
        each = len(self._nodes.local_ranks)
        return Meeting(lines, [node.host for node in table], neighbours * each)

    def _lay_wires(self, meeting: Meeting, table: list[_Node], key: str, reception: Reception) -> None:
        """To nodes before this one by calling them, to those behind it by being called."""
        own = self._nodes.own
        wires: set[tuple[str, int]] = set()
        drivers: set[tuple[int, int]] = set()
        for group, by_node in self._nodes.wired().items():
            for node in by_node if own in by_node else ():
                if node > own:
                    wires.add((group, node))
                elif node < own:
                    called = self._call(table[node], {"key": key, "wire": group, "node": own})
                    meeting.wires.setdefault(group, {})[node] = called
        for dp_rank, rank in enumerate(self._nodes.layout.drivers()):
            node = self._nodes.node_of(rank)
            if node and not own:
                drivers.add((dp_rank, node))
            elif node and node == own:
                meeting.drivers[dp_rank] = self._call(table[0], {"key": key, "driver": dp_rank, "node": own})
        while wires or drivers:
            found = reception.next(self._deadline)
            if found is None:
                missing = _listed({node for _, node in wires} | {node for _, node in drivers})
                raise NodesError(f"{missing} did not connect to node {own} within {self._timeout}")
            sock, message = found
            caller: Any = message.get("node")
            if not hmac.compare_digest(str(message.get("key")).encode(), key.encode()):
                sock.close()
            elif (wire := (message.get("wire"), caller)) in wires:
                wires.remove(wire)
                meeting.wires.setdefault(wire[0], {})[caller] = _without_delay(sock)
            elif (driver := (message.get("driver"), caller)) in drivers:
                drivers.remove(driver)
                meeting.drivers[driver[0]] = _without_delay(sock)
            else:
                sock.close()

    def _call(self, node: _Node, message: dict[str, Any]) -> socket.socket:
        try:
            sock = socket.create_connection((node.host, node.port), max(0.1, self._deadline - time.monotonic()))
            Line(sock).send(message)
        except OSError as error:
            raise NodesError(f"{node.host}:{node.port} cannot be reached: {_reason(error)}") from error
        return _without_delay(sock)


class _Host(_Side):
    """Node 0."""

    def run(self) -> Meeting:
        try:
            address = self._args.dist_address()
            family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server(address, family=family, backlog=1024)
        except OSError as error:
            raise NodesError(f"node 0 cannot listen at {self._where} (--dist-init-addr): {_reason(error)}") from error
        lines: dict[int, Line] = {}
        with contextlib.closing(Reception(listener)) as reception:
            try:
                there = self._wait_for_all(reception, lines)
                key = secrets.token_hex(16)
                own = [lines[node].sock.getsockname()[0] for node in sorted(lines)]
                port = listener.getsockname()[1]
                others = [there[node] for node in sorted(there)]
                for node, host in zip(sorted(lines), own, strict=True):
                    table = [_Node(host, port, _boot_id()), *others]
                    lines[node].send({"key": key, "nodes": [vars(each) for each in table]})
                meeting = self._meeting(lines, table)
                self._lay_wires(meeting, table, key, reception)
            except NodesError as error:
                for line in lines.values():
                    line.send({"refused": str(error)})
                raise
        return meeting

    def _wait_for_all(self, reception: Reception, lines: dict[int, Line]) -> dict[int, _Node]:
        there: dict[int, _Node] = {}
        while len(lines) < self._nodes.count - 1:
            # Who has given up may come again.
            for node in [node for node, line in lines.items() if is_gone(line.sock)]:
                lines.pop(node).close()
                del there[node]
            found = reception.next(min(self._deadline, time.monotonic() + RETRY_SECONDS))
            if found is None:
                if time.monotonic() >= self._deadline:
                    missing = _listed(set(range(1, self._nodes.count)) - set(lines))
                    raise NodesError(f"{missing} did not come to {self._where} within {self._timeout}")
                continue
            sock, hello = found
            line, number, own = Line(_without_delay(sock)), hello.get("node"), _node(hello)
            if own is None or not isinstance(number, int) or not isinstance(hello.get("description"), dict):
                line.close()  # not one of ours: somebody who looks which ports are open
                continue
            node = number
            reason = node_agreement.difference(node, hello["description"], self._description)
            if reason is not None:
                line.send({"refused": reason})
                raise NodesError(reason)
            if node in lines or not 0 < node < self._nodes.count:
                line.send({"refused": f"there is a node {node} already (--node-rank)"})
                line.close()
                continue
            lines[node], there[node] = line, own
        return there


class _Guest(_Side):
    """Every other node."""

    def run(self) -> Meeting:
        while True:
            sock = self._reach()
            host = sock.getsockname()[0]
            listener = socket.create_server((host, 0), family=sock.family, backlog=1024)
            with contextlib.closing(Reception(listener)) as reception:
                hello = {"node": self._nodes.own, "host": host, "port": listener.getsockname()[1]}
                line = Line(_without_delay(sock))
                line.send({**hello, "boot_id": _boot_id(), "description": self._description})
                welcome = self._answer(line)
                if welcome is None:  # node 0 ended, and may be started again
                    line.close()
                    time.sleep(RETRY_SECONDS)
                    continue
                table = [_Node(**each) for each in welcome["nodes"]]
                meeting = self._meeting({0: line}, table)
                self._lay_wires(meeting, table, str(welcome["key"]), reception)
                return meeting

    def _reach(self) -> socket.socket:
        """A connection to node 0, which may not have been started yet."""
        while True:
            left = self._deadline - time.monotonic()
            try:
                return socket.create_connection(self._args.dist_address(), min(max(left, 0.1), CONNECT_SECONDS))
            except OSError as error:
                if time.monotonic() + RETRY_SECONDS >= self._deadline:
                    raise NodesError(
                        f"node 0 does not answer at {self._where} (--dist-init-addr) within {self._timeout}: "
                        f"{_reason(error)}"
                    ) from error
                time.sleep(RETRY_SECONDS)

    def _answer(self, line: Line) -> dict[str, Any] | None:
        """Node 0's, once all nodes have come; None if it is gone."""
        while True:
            try:
                messages = line.receive()
            except ValueError as error:
                raise NodesError(f"what answers at {self._where} (--dist-init-addr) is no node 0") from error
            if messages is None:
                return None
            for number, message in enumerate(messages, start=1):
                if "refused" in message:
                    raise NodesError(str(message["refused"]))
                if "nodes" in message:
                    line.keep(messages[number:])
                    return message
            if time.monotonic() >= self._deadline:
                raise NodesError(
                    f"node 0 at {self._where} (--dist-init-addr) did not let node {self._nodes.own} begin within "
                    f"{self._timeout}: other nodes are missing, or something else answers there"
                )
            time.sleep(0.01)


def _node(hello: Mapping[str, Any]) -> _Node | None:
    host, port, boot_id = (hello.get(name) for name in ("host", "port", "boot_id"))
    if isinstance(host, str) and isinstance(port, int) and isinstance(boot_id, str):
        return _Node(host, port, boot_id)
    return None


def _listed(nodes: set[int]) -> str:
    return " and ".join(f"node {node}" for node in sorted(nodes))


def _without_delay(sock: socket.socket) -> socket.socket:
    """Small messages go out at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else str(error)


def _boot_id() -> str:
    """The same for all who share a kernel, and so cores and memory."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
