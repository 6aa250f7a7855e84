"""One client request and what becomes of it: the part that is the same for every upstream.

An exchange ties a client connection to one upstream connection at a time. It is over exactly once, by one of: the
response was relayed whole, an error was answered, the response broke off, the client went away. Nothing here awaits, so
that cancellation cannot cut a clean-up in half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmroute._core import BadHead, ChunkDecoder
from warmroute.errors import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute._core import RequestHead, Response
    from warmroute.dataplane.client_connection import ClientConnection
    from warmroute.dataplane.plane import DataPlane
    from warmroute.dataplane.pool import ConnectFailure, Pool
    from warmroute.dataplane.worker_connection import WorkerConnection


class Exchange:
    """Base of `RoutedExchange` (to a worker) and `ControlExchange` (to the control app)."""

    __slots__ = (
        "_client",
        "_connection",
        "_data",
        "_decoder",
        "_ends_with_a_chunk",
        "_may_resend",
        "_plane",
        "_pool",
        "accepted_ns",
        "head",
        "is_over",
        "response",
    )

    _plane: DataPlane
    _client: ClientConnection
    head: RequestHead
    _data: bytes
    """Begins with the request, which is there as a whole."""
    accepted_ns: int
    _pool: Pool
    _connection: WorkerConnection | None
    _may_resend: bool
    response: Response | None
    """From the commit on: the client has seen a byte of it."""
    _ends_with_a_chunk: bool
    _decoder: ChunkDecoder
    is_over: bool

    # No constructor: `start` is one, and what it costs to have both shows (2 % of the instructions of a request).

    @property
    def request_id(self) -> bytes:
        return self.head.request_id

    @property
    def deadline_ns(self) -> int:
        return self.accepted_ns + self._plane.times.request_ns

    # -- what an upstream connection tells

    def connected(self, connection: WorkerConnection) -> None:
        raise NotImplementedError

    def connect_failed(self, reason: str, failure: ConnectFailure) -> None:
        raise NotImplementedError

    def not_answered(self, reason: str, *, stale: bool) -> None:
        """The connection ended before a response head. `stale`: it had answered before, and nothing came this time."""
        if stale and self._may_resend:
            # The server timed the idle connection out while we wrote: the one failure that says nothing. Once, to the
            # same worker.
            self._may_resend = False
            self._connection = None
            self._pool.open(self)
        else:
            self._unanswered(reason)

    def answered(self, connection: WorkerConnection, data: bytes, now_ns: int) -> bool:
        """Whether `data`, the first bytes of a response, was all of it and is dealt with."""
        return False

    def response_began(self, response: Response, status: int, data: bytes) -> Callable[[bytes], object]:
        """The head is complete, in `data`: write it and what is there of the body; return where the rest of the body
        goes."""
        return self._relay(response, data)

    def response_goes_on(self) -> None:
        """More of the body will come."""

    def response_broke(self, connection: WorkerConnection, reason: str) -> None:
        raise NotImplementedError

    def response_ended(self, connection: WorkerConnection, now_ns: int) -> None:
        raise NotImplementedError

    # -- what the client connection and the plane tell

    def cancel(self) -> None:
        """The client is gone. Synchronous, so the worker learns of it in this turn of the loop."""
        raise NotImplementedError

    def check_time(self, now_ns: int) -> None:
        """Once a second: end it if something takes too long."""
        if self.deadline_ns <= now_ns:
            self.timed_out()

    def timed_out(self) -> None:
        """The whole took too long."""
        raise NotImplementedError

    def pause(self) -> None:
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        if self._connection is not None:
            self._connection.resume()

    # -- steps

    def _unanswered(self, reason: str) -> None:
        raise NotImplementedError

    def _worker_header(self) -> bytes:
        return b""

    def _relay(self, response: Response, data: bytes) -> Callable[[bytes], object]:
        """Commit: from here on the client has seen a byte."""
        self.response = response
        client = self._client
        if not self._plane.expose_worker:
            answer = response.as_it_is(self.head, client.keep_alive, data)
            if answer is not None:
                client.write(answer)
                return client.write
        http_1_0 = self.head.http_1_0
        sized = response.content_length >= 0
        chunked = response.chunked
        self._ends_with_a_chunk = not (sized or chunked or http_1_0)
        # A body that ends with the connection can only be told to a client of HTTP/1.0 by closing its connection, too.
        client.keep_alive = keep_alive = client.keep_alive and (sized or not http_1_0)
        extra = b"x-request-id: %b\r\n" % self.request_id
        if self._plane.expose_worker:
            extra += self._worker_header()
        if http_1_0 and keep_alive:
            extra += b"connection: keep-alive\r\n"  # what HTTP/1.1 takes for granted
        out = response.to_client(extra, keep_alive, not sized and not http_1_0)
        rest = response.body_in(data)
        write = client.write
        if sized or (chunked and not http_1_0):
            write(out + rest)
            return write
        if chunked:
            self._decoder = ChunkDecoder(1 << 62)
            write(out)
            write = self._write_decoded
        elif not http_1_0:
            write(out)
            write = self._write_chunk
        else:
            write(out)
        if rest:
            write(rest)
        return write

    def _write_decoded(self, data: bytes) -> None:
        """A chunked body for a client of HTTP/1.0, which ends it by closing."""
        try:
            self._client.write(self._decoder.feed(data)[0])
        except BadHead:
            self._client.abort()

    def _write_chunk(self, data: bytes) -> None:
        """A body that ends with the worker's connection, for a client that keeps its own."""
        self._client.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _end_relay(self) -> None:
        """The body is complete: end it in the client's framing."""
        if self._ends_with_a_chunk:
            self._client.write(b"0\r\n\r\n")

    def _over(self) -> None:
        self.is_over = True
        self._connection = None
        plane = self._plane
        plane.buffered_bytes -= len(self._data)


class ControlExchange(Exchange):
    """To the control app, in this process or another. It is ours and local: no retries beyond a stale connection."""

    __slots__ = ()

    def start(self, plane: DataPlane, client: ClientConnection, head: RequestHead, data: bytes, now_ns: int) -> None:
        self._plane = plane
        self._client = client
        self.head = head
        self._data = data
        self.accepted_ns = now_ns
        self._connection = self.response = None
        self._may_resend = True
        self._ends_with_a_chunk = self.is_over = False
        self._pool = plane.control_pool
        plane.buffered_bytes += len(data)
        connection = self._pool.take()
        if connection is None:
            self._pool.open(self)
        else:
            self.connected(connection)

    def connected(self, connection: WorkerConnection) -> None:
        self._connection = connection
        head = self.head
        body = head.body_in(self._data)
        length = len(body) if head.content_length >= 0 or head.chunked else -1
        connection.send(self, head.to_control(length) + body)

    def connect_failed(self, reason: str, failure: ConnectFailure) -> None:
        if not self.is_over:
            self._unanswered(reason)

    def not_answered(self, reason: str, *, stale: bool) -> None:
        # The control app answers whatever it has read; without an answer its process has been replaced (SIGHUP).
        super().not_answered(reason, stale=True)

    def _unanswered(self, reason: str) -> None:
        self._over()
        self._client.answer_error(
            ErrorCode.CONTROL_UNAVAILABLE, f"The control plane does not answer: {reason}", self.request_id
        )

    def response_broke(self, connection: WorkerConnection, reason: str) -> None:
        self._over()
        self._client.abort()

    def response_ended(self, connection: WorkerConnection, now_ns: int) -> None:
        self._end_relay()
        self._over()
        self._client.exchange_ended()

    def cancel(self) -> None:
        if self._connection is not None:
            self._connection.abort()
        self._over()

    def timed_out(self) -> None:
        if self._connection is not None:
            self._connection.abort()
        began = self.response is not None
        self._over()
        if began:
            self._client.abort()
        else:
            self._client.answer_error(
                ErrorCode.UPSTREAM_TIMEOUT, "The control plane did not answer in time", self.request_id
            )
