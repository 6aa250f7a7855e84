"""One upstream connection: sends a request, finds the response in the bytes that come, hands them on.

Three phases: idle (no exchange), waiting for the head, relaying. While relaying, a piece costs one call into the
framing machine and one write to the client; nothing is parsed, copied or awaited.
"""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute._core import BadHead

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute._core import Response
    from warmroute.dataplane.exchange import Exchange
    from warmroute.dataplane.pool import Pool


class WorkerConnection(asyncio.Protocol):
    """Belongs to a pool while idle, to an exchange while `exchange` is set."""

    __slots__ = (
        "_feed",
        "_paused_ns",
        "_pending",
        "_pool",
        "_resumed_ns",
        "_write",
        "exchange",
        "idle_since_ns",
        "response",
        "transport",
        "uses",
    )

    transport: asyncio.Transport
    response: Response
    """To the request that it has, or had last, once its head is complete."""
    _write: Callable[[bytes], object]

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.exchange: Exchange | None = None
        self._feed: Callable[[bytes, int], int] | None = None  # None: the head is not complete
        self._pending = b""
        self.uses = 0
        """Exchanges that it has had, with the one that it has."""
        self.idle_since_ns = 0
        self._paused_ns = 0
        self._resumed_ns = 0

    def __repr__(self) -> str:
        phase = "idle" if self.exchange is None else "waiting" if self._feed is None else "relaying"
        return f"<WorkerConnection [{phase}]>"

    # -- from the exchange

    def send(self, exchange: Exchange, message: bytes, rest: bytes | None = None) -> None:
        self.exchange = exchange
        self.uses += 1
        self.transport.write(message)
        if rest is not None:
            self.transport.write(rest)

    def pause(self) -> None:
        """The client is slow."""
        self._paused_ns = monotonic_ns()
        self.transport.pause_reading()

    def resume(self) -> None:
        self._paused_ns = 0
        self._resumed_ns = monotonic_ns()
        self.transport.resume_reading()

    def silent_ns(self, now_ns: int) -> int:
        """For how long the worker has sent nothing of an answer that it has begun, though it could have."""
        if self._feed is None or self._paused_ns:
            return 0
        return now_ns - max(self.response.last_ns, self._resumed_ns)

    def abort(self) -> None:
        """The exchange is over before the response is: the worker sees a reset and stops working on it."""
        self.exchange = None
        self.transport.abort()

    def close(self) -> None:
        self.exchange = None
        self.transport.close()

    # -- from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self._pool.connections += 1

    def data_received(self, data: bytes) -> None:
        feed = self._feed
        now_ns = monotonic_ns()
        if feed is None:
            exchange = self.exchange
            if exchange is None or self._pending or not exchange.answered(self, data, now_ns):
                self._head_received(data, now_ns)
            return
        try:
            end = feed(data, now_ns)
        except BadHead as error:
            self._fail(str(error.args[1]))
            return
        if end < 0:
            self._write(data)
        else:
            self._write(data if end == len(data) else data[:end])
            self._response_ended(end == len(data) and self.response.keep_alive, now_ns)

    def eof_received(self) -> bool:
        return False  # close the transport; connection_lost tells the exchange

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.connections -= 1
        exchange = self.exchange
        if exchange is None:
            self._pool.forget(self)
            return
        if self._feed is not None and self.response.end_of_file():
            self._response_ended(False, monotonic_ns())
            return
        self._fail(str(exc) if exc else "connection closed by the worker")

    # -- steps

    def _head_received(self, data: bytes, now_ns: int) -> None:
        exchange = self.exchange
        if exchange is None:
            # Nobody asked. A worker that times out an idle connection may say so before it closes it.
            self._pool.forget(self)
            self.transport.abort()
            return
        if self._pending:
            data = self._pending + data
        try:
            begun = self._pool.parser.begin_response(data, exchange.head, now_ns)
        except BadHead as error:
            self._fail(str(error.args[1]))
            return
        if begun is None:
            self._pending = data
            return
        if self._pending:
            self._pending = b""
        self.response, status, can_stay = begun
        if can_stay is None:
            self._feed = self.response.feed
            self._write = exchange.response_began(self.response, status, data)
            exchange.response_goes_on()
        else:
            exchange.response_began(self.response, status, data)
            self._response_ended(can_stay, now_ns)

    def _response_ended(self, can_stay: bool, now_ns: int) -> None:
        """`can_stay`: as far as the response is concerned, another one may follow it."""
        exchange = self.exchange
        if exchange is None:  # the write above lost the client, and with it the exchange
            return
        self.exchange = None
        self._feed = None
        if self._paused_ns:  # for a client that does not read on; the next one may
            self.resume()
        self.give_back(can_stay, now_ns)
        exchange.response_ended(self, now_ns)

    def give_back(self, can_stay: bool, now_ns: int) -> None:
        """To the pool, if it can be used again; no exchange has it any more."""
        transport = self.transport
        if transport.get_write_buffer_size():
            # The answer came before the request was sent whole: the rest would be read as the next request.
            transport.abort()
        elif can_stay:
            self.idle_since_ns = now_ns
            self._pool.idle.append(self)
        else:
            transport.close()

    def _fail(self, reason: str) -> None:
        exchange = self.exchange
        began = self._feed is not None
        self.exchange = None
        self.transport.abort()
        if exchange is None:
            return
        if began:
            exchange.response_broke(self, reason)
        else:
            exchange.not_answered(reason, stale=self.uses > 1 and not self._pending)
