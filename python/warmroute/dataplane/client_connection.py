"""One client connection for its whole life: finds requests in the bytes, answers them in order, one at a time.

Owns what is read but not yet handled. Bytes of later requests wait in the buffer while an exchange is under way.
"""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute._core import BadHead, ChunkDecoder, Route
from warmroute.dataplane.exchange import ControlExchange
from warmroute.dataplane.routed_exchange import RoutedExchange
from warmroute.errors import ErrorCode, http_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute._core import RequestHead
    from warmroute.dataplane.exchange import Exchange
    from warmroute.dataplane.plane import DataPlane

# A client that pipelines may be this far ahead of the answers before it is made to wait.
MAX_AHEAD_BYTES = 256 * 1024
# Probes of orchestrators and monitoring have no credentials; so it is with the peers.
OPEN_PATHS = frozenset({b"/health", b"/liveness", b"/readiness", b"/metrics", b"/v1/models"})
OTHER = "other"
"""What counts for methods and paths that clients may have invented."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# After an answer to a request that was not read whole: how long its sender may go on before the connection is cut, so
# that the answer is not lost to a reset (RFC 9112, section 9.6).
LINGER_SECONDS = 2.0

_REASONS = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    408: b"Request Timeout",
    413: b"Content Too Large",
    429: b"Too Many Requests",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    502: b"Bad Gateway",
    503: b"Service Unavailable",
    504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}


class ClientConnection(asyncio.Protocol):
    __slots__ = (
        "_advancing",
        "_body_missing",
        "_buffer",
        "_decoder",
        "_discarding",
        "_has_asked",
        "_head",
        "_is_full",
        "_parts",
        "_paused_reading",
        "_plane",
        "_since_ns",
        "_transport",
        "_unread",
        "came_late",
        "exchange",
        "keep_alive",
        "write",
    )

    _transport: asyncio.Transport
    write: Callable[[bytes], None]

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._advancing = False
        self._buffer = b""
        self.exchange: Exchange | None = None
        self._head: RequestHead | None = None  # of a request whose body is not complete
        self._parts: list[bytes] = []  # that head, and what has come of the body
        self._body_missing = 0
        self._decoder: ChunkDecoder | None = None
        self._discarding = False
        self._paused_reading = False
        self._is_full = False
        """The client does not read: what is written to it piles up here."""
        self._unread = 0
        """How many bytes have, when somebody last looked."""
        self.came_late = plane.is_draining
        """It was accepted when the router was going away already."""
        self._has_asked = False
        self._since_ns = plane.second_ns
        """When what it waits for began: the next request, the rest of a head, the next bytes of a body."""
        self.keep_alive = True

    def __repr__(self) -> str:
        phase = "discarding" if self._discarding else "idle"
        if self.exchange is not None:
            phase = "answering"
        elif self._head is not None or self._buffer:
            phase = "reading"
        return f"<ClientConnection [{phase}]>"

    @property
    def is_idle(self) -> bool:
        return self.exchange is None and self._head is None and not self._buffer

    # -- from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self.write = self._transport.write
        plane = self._plane
        if len(plane.connections) >= plane.max_connections:
            self._refuse(503, f"The router has {plane.max_connections} connections, no more", ErrorCode.ROUTER_BUSY)
            return
        plane.connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self._buffer += data
            if len(self._buffer) > MAX_AHEAD_BYTES:
                self._pause_reading()
        elif self._head is not None:
            self._body_received(data)
        elif not self._discarding:
            self._advance(self._buffer + data if self._buffer else data)

    def eof_received(self) -> bool:
        return False  # a client that ends its side is gone: there is no half-closed state in this protocol

    def connection_lost(self, exc: Exception | None) -> None:
        self._plane.connections.discard(self)
        exchange = self.exchange
        if exchange is not None:
            self.exchange = None
            exchange.cancel()
        self._buffer = b""
        self._forget_parts()
        self._discarding = True

    def check_time(self, now_ns: int) -> None:
        """Once a second: is the client too slow?"""
        if self.exchange is not None or self._discarding:
            return
        times = self._plane.times
        waited_ns = now_ns - self._since_ns
        unread, self._unread = self._unread, self._transport.get_write_buffer_size()
        if self._unread < unread:
            self._since_ns = now_ns  # it reads, if slowly
        elif self._is_full:
            if waited_ns >= times.client_idle_ns:
                self._end()
        elif self._head is not None:
            if waited_ns >= times.body_ns:
                seconds = times.body_ns / 1e9
                self._refuse(408, f"No byte of the body came for {seconds:g} s", ErrorCode.BODY_TIMEOUT)
        elif self._buffer:
            if waited_ns >= times.header_ns:
                self._refuse(408, f"The head of the request was not complete after {times.header_ns / 1e9:g} s")
        elif waited_ns >= (times.client_idle_ns if self._has_asked else times.header_ns):
            self._end()

    def pause_writing(self) -> None:
        self._is_full = True
        if self.exchange is not None:
            self.exchange.pause()

    def resume_writing(self) -> None:
        self._is_full = False
        if self.exchange is not None:
            self.exchange.resume()
        else:
            self._since_ns = self._plane.second_ns
            self._go_on()

    # -- from the exchange

    def exchange_ended(self) -> None:
        """The response is written whole."""
        self.exchange = None
        self._since_ns = self._plane.second_ns
        if not self.keep_alive:  # and the client was told so; whoever was not may be writing its next request
            self.close()
            return
        if self._paused_reading or self._buffer or self._is_full:
            self._go_on()

    def _go_on(self) -> None:
        """With what has come meanwhile; not while the answers that there are stay unread."""
        if self._is_full:
            self._pause_reading()
            return
        if self._paused_reading:
            self._paused_reading = False
            self._transport.resume_reading()
        if self._buffer and not self._advancing and not self._discarding:
            self._advance(self._buffer)

    def _pause_reading(self) -> None:
        if not self._paused_reading:
            self._paused_reading = True
            self._transport.pause_reading()

    def answer_error(self, code: ErrorCode, message: str, request_id: bytes, param: str | None = None) -> None:
        """End the current request with an error of our own."""
        self._respond(*http_error(code, message, param), request_id)
        self.exchange_ended()

    def close(self) -> None:
        """After what is written has been sent. What the client asked behind it is not answered."""
        self.exchange = None
        self._buffer = b""
        self._since_ns = self._plane.second_ns
        self._transport.close()

    def abort(self) -> None:
        """What has begun cannot be completed: a clean end would be a lie."""
        self.exchange = None
        self._buffer = b""
        self._transport.abort()

    # -- requests

    def _advance(self, buffer: bytes) -> None:
        """Handle what has come, `buffer` in all, until an exchange is under way or more bytes are needed."""
        plane = self._plane
        self._advancing = True  # an exchange that ends at once must not enter here again: pipelined requests would nest
        now_ns = monotonic_ns()
        routes = plane.decides_at_once and not self.came_late
        while True:
            try:
                begun = plane.core.begin(plane.parser, plane.upstreams, buffer, routes, now_ns)
            except BadHead as error:
                self._refuse(*error.args)
                break
            if begun is None:
                if not self._buffer:
                    self._since_ns = plane.second_ns  # the first bytes of a head
                self._buffer = buffer
                break
            head, is_whole, self._buffer, keep_alive, is_for_worker, request, lease, pool, first, second = begun
            self.keep_alive = keep_alive and not plane.is_draining
            if request is not None:
                self._has_asked = True
                self.exchange = exchange = RoutedExchange()
                exchange.start(plane, self, head, buffer, now_ns, request, lease, pool, first, second)
            elif is_whole:
                self._dispatch(head, buffer, is_for_worker)
            elif not self._begin_body(head):
                break
            else:
                rest = self._buffer
                self._buffer = b""
                self._parts.append(buffer[: len(buffer) - len(rest)])
                if head.expect_continue and not rest:
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._body_received(rest)
            buffer = self._buffer
            if not buffer or self.exchange is not None or self._discarding or self._is_full:
                break
        self._advancing = False

    def _begin_body(self, head: RequestHead) -> bool:
        """Of a request whose body is not all there; whether it may come."""
        length = head.content_length
        if length > self._plane.max_body_bytes:
            self._refuse(413, f"The body is larger than {self._plane.max_body_bytes} bytes")
            return False
        if not self._has_room(head):
            return False
        if head.chunked:
            self._decoder = ChunkDecoder(self._plane.max_body_bytes)
        else:
            self._body_missing = length
        self._head = head
        return True

    def _body_received(self, data: bytes) -> None:
        """More of the body of the request whose head is `_head`."""
        head = self._head
        assert head is not None
        if self._decoder is not None:
            try:
                decoded, end = self._decoder.feed(data)
            except BadHead as error:
                self._refuse(*error.args)
                return
            self._keep_part(decoded)
            if end < 0:
                self._has_room(head)
                return
            self._decoder = None
        else:
            end = min(self._body_missing, len(data))
            self._keep_part(data if end == len(data) else data[:end])
            self._body_missing -= end
            if self._body_missing:
                self._has_room(head)
                return
        request = b"".join(self._parts)
        self._forget_parts()
        self._head = None
        self._buffer = data[end:]
        self._dispatch(head, request, head.is_authorized and head.is_routed)
        if self._buffer and self.exchange is None and not self._advancing and not self._is_full:
            self._advance(self._buffer)

    def _end(self) -> None:
        """It has been waited for long enough."""
        if self._transport.get_write_buffer_size():
            self._transport.abort()  # to close it would wait for what nobody reads
        else:
            self._transport.close()

    def _keep_part(self, part: bytes) -> None:
        self._since_ns = self._plane.second_ns
        self._parts.append(part)
        self._plane.buffered_bytes += len(part)

    def _forget_parts(self) -> None:
        if self._parts:
            self._plane.buffered_bytes -= sum(map(len, self._parts[1:]))  # the head is not counted
            self._parts.clear()

    def _has_room(self, head: RequestHead) -> bool:
        """For more of its body; if there is none, the request is refused."""
        plane = self._plane
        if plane.buffered_bytes <= plane.max_buffered_bytes:
            return True
        self._refuse(503, "The router holds as many bytes of requests as it may; try again", ErrorCode.ROUTER_BUSY)
        return False

    def _dispatch(self, head: RequestHead, data: bytes, is_for_worker: bool) -> None:
        """A request is there as a whole, `data` begins with it. `is_for_worker`: and its client may ask a worker."""
        plane = self._plane
        self._has_asked = True
        now_ns = monotonic_ns()
        if is_for_worker and not self.came_late:
            self.exchange = exchange = RoutedExchange()
            exchange.start(plane, self, head, data, now_ns)
        elif not head.is_authorized and (head.is_routed or head.path not in OPEN_PATHS):
            self._answer_unasked(head, ErrorCode.UNAUTHORIZED, "A valid API key is needed: authorization: Bearer ...")
        elif is_for_worker:
            self._answer_unasked(head, ErrorCode.SHUTTING_DOWN, "The router is going away; ask another one")
        elif head.route == Route.CONTROL:
            if head.method not in METHODS:
                self._answer_unasked(head, ErrorCode.NOT_IMPLEMENTED, f"There is no method {head.method} here")
                return
            self.exchange = control = ControlExchange()
            control.start(plane, self, head, data, now_ns)
        else:
            status, content_type, content = plane.probe(head.route)
            plane.core.count_http(head.method, head.path.decode(), status)
            self._respond(status, (("content-type", content_type),), content, b"")
            self.exchange_ended()

    def _answer_unasked(self, head: RequestHead, code: ErrorCode, message: str) -> None:
        """Refuse what neither the core nor the control app gets to see, and count it in their place."""
        path = head.path.decode() if head.is_routed else OTHER
        self._plane.core.count_http(head.method, path, code.status)
        self.answer_error(code, message, head.request_id)

    def _respond(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes, request_id: bytes) -> None:
        lines = [b"HTTP/1.1 %d %b\r\ncontent-length: %d\r\n" % (status, _REASONS.get(status, b"Error"), len(body))]
        lines += [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers]
        if request_id:
            lines.append(b"x-request-id: %b\r\n" % request_id)
        if not self.keep_alive or self._plane.is_draining:
            self.keep_alive = False
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        lines.append(body)
        self.write(b"".join(lines))

    def _refuse(self, status: int, message: str, code: ErrorCode | None = None) -> None:
        """A request that cannot be read on: answer, let the sender finish for a moment, close."""
        self.keep_alive = False
        self._discarding = True
        self._head = None
        self._decoder = None
        self._buffer = b""
        self._forget_parts()
        self._plane.core.count_http(OTHER, OTHER, status)
        self._respond(*http_error(code or ErrorCode.of_status(status), message), self._plane.parser.new_request_id())
        self._transport.write_eof()
        self._plane.loop.call_later(LINGER_SECONDS, self._end)
