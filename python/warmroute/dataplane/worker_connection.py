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

    from warmroute._core import BodyReader
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
        "_reusable",
        "_write",
        "exchange",
        "idle_since_ns",
        "is_reused",
        "reader",
        "transport",
        "was_used",
    )

    transport: asyncio.Transport
    reader: BodyReader
    _write: Callable[[bytes], object]

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.exchange: Exchange | None = None
        self._feed: Callable[[bytes, int], int] | None = None  # None: the head is not complete
        self._pending = b""
        self._reusable = False
        self.was_used = False
        self.idle_since_ns = 0
        self._paused_ns = 0
        self._resumed_ns = 0
        self.is_reused = False
        """Whether the exchange that it has was not its first."""

    def __repr__(self) -> str:
        phase = "idle" if self.exchange is None else "waiting" if self._feed is None else "relaying"
        return f"<WorkerConnection [{phase}]>"

    # -- from the exchange

    def send(self, exchange: Exchange, head: bytes, body: bytes) -> None:
        self.exchange = exchange
        self.is_reused = self.was_used
        if len(body) < 16384:  # one copy is cheaper than one more buffer in the kernel's list
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

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
        return now_ns - max(self.reader.last_ns, self._resumed_ns)

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

    def data_received(self, data: bytes) -> None:
        feed = self._feed
        if feed is None:
            self._head_received(data)
            return
        try:
            end = feed(data, monotonic_ns())
        except BadHead as error:
            self._fail(str(error.args[1]))
            return
        if end < 0:
            self._write(data)
        else:
            self._write(data if end == len(data) else data[:end])
            self._response_ended(clean=end == len(data))

    def eof_received(self) -> bool:
        return False  # close the transport; connection_lost tells the exchange

    def connection_lost(self, exc: Exception | None) -> None:
        exchange = self.exchange
        if exchange is None:
            self._pool.forget(self)
            return
        if self._feed is not None and self.reader.end_of_file():
            self._response_ended(clean=False)
            return
        self._fail(str(exc) if exc else "connection closed by the worker")

    # -- steps

    def _head_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            # Nobody asked. A worker that times out an idle connection may say so before it closes it.
            self._pool.forget(self)
            self.transport.abort()
            return
        data = self._pending + data if self._pending else data
        now_ns = monotonic_ns()
        try:
            begun = self._pool.parser.begin_response(data, exchange.is_head_request, now_ns)
        except BadHead as error:
            self._fail(str(error.args[1]))
            return
        if begun is None:
            self._pending = data
            return
        self._pending = b""
        head, status, self.reader, rest, surplus, self._reusable = begun
        self._feed = self.reader.feed
        self._write = exchange.response_began(head, status, rest, now_ns)
        if surplus >= 0:
            self._response_ended(clean=surplus == 0)

    def _response_ended(self, *, clean: bool) -> None:
        exchange = self.exchange
        if exchange is None:  # the write above lost the client, and with it the exchange
            return
        self.exchange = None
        self._feed = None
        self.was_used = True
        # An answer that came before the request was sent whole leaves a rest that would be read as the next request.
        if self._reusable and clean and not self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self._pool.give_back(self, self.reader.last_ns)
        else:
            self.transport.close()
        exchange.response_ended(self)

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
            exchange.not_answered(reason, stale=self.was_used and not self._pending)
