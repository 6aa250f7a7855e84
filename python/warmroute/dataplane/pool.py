"""Connections to one upstream: idle ones are kept and handed out again, last in first out.

The pool owns the idle list and the connects under way; a connection in use belongs to its exchange.
"""

from __future__ import annotations

import asyncio
import enum
import errno
from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute.dataplane.worker_connection import WorkerConnection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from warmroute._core import HeadParser
    from warmroute.dataplane.exchange import Exchange
    from warmroute.directory import WorkerAddress

    Connect = Callable[[Callable[[], asyncio.Protocol]], Awaitable[object]]
    """Opens one connection whose protocol the argument makes."""

# Servers close idle connections after 5 s (uvicorn) or more. Their close is seen as it comes and the race is covered by
# one free re-send, so this only bounds how long sockets of a quiet fleet stay open.
IDLE_NS = 60 * 10**9

# Not the worker's: this process has too many files open, this host too few ports or too little memory.
_OUR_FAULTS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


class ConnectFailure(enum.Enum):
    REFUSED = "refused"
    """Or unreachable, or whatever else says that nobody can be had there."""
    TIMED_OUT = "timed_out"
    NO_RESOURCES = "no_resources"
    """Of the router itself."""


class Pool:
    """All connections to one worker, or to the control app."""

    __slots__ = ("_connect", "_connect_seconds", "_connecting", "address", "connections", "idle", "parser")

    def __init__(
        self, connect: Connect, parser: HeadParser, connect_seconds: float, address: WorkerAddress | None = None
    ) -> None:
        """`connect_seconds`: how long a connect may take. `address`: a worker's."""
        self.address = address
        self._connect = connect
        self._connect_seconds = connect_seconds
        self.parser = parser
        self.idle: list[WorkerConnection] = []
        """In the order in which they were given back."""
        self.connections = 0
        """Idle ones and those that an exchange has."""
        self._connecting: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Pool [{len(self.idle)} of {self.connections} idle, {len(self._connecting)} connecting]>"

    @property
    def is_empty(self) -> bool:
        return not self.connections and not self._connecting

    def take(self) -> WorkerConnection | None:
        """An idle connection; None: there is none, `open` one."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                return connection
        return None

    def open(self, exchange: Exchange) -> None:
        """A new connection for `exchange`: calls its `connected` or `connect_failed`, later."""
        task = asyncio.get_running_loop().create_task(self._open(exchange))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def forget(self, connection: WorkerConnection) -> None:
        """An idle connection was closed by the other side."""
        if connection in self.idle:
            self.idle.remove(connection)

    def close_idle(self, before_ns: int) -> None:
        """Close what has been idle since before `before_ns`; the list is in order of that time, oldest first."""
        while self.idle and self.idle[0].idle_since_ns < before_ns:
            self.idle.pop(0).close()

    def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        for connection in self.idle:
            connection.close()
        self.idle.clear()

    async def _open(self, exchange: Exchange) -> None:
        connection = WorkerConnection(self)
        try:
            async with asyncio.timeout(self._connect_seconds):
                await self._connect(lambda: connection)
        except TimeoutError:
            exchange.connect_failed(f"no connection within {self._connect_seconds:g} s", ConnectFailure.TIMED_OUT)
        except OSError as error:
            ours = error.errno in _OUR_FAULTS
            exchange.connect_failed(
                error.strerror or str(error), ConnectFailure.NO_RESOURCES if ours else ConnectFailure.REFUSED
            )
        else:
            if exchange.is_over:  # cancelled meanwhile: the connection is as good as new
                connection.idle_since_ns = monotonic_ns()
                self.idle.append(connection)
            else:
                exchange.connected(connection)
