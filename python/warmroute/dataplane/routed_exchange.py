"""A request for a worker: choose, send, commit, relay; and what follows when an attempt fails.

The commit point is the first byte written to the client. Before it a failure may go elsewhere (`warmroute.retry` says
when), after it never. Every attempt holds one lease, released where the body of its response ends, whatever happens.
"""

from __future__ import annotations

import logging
from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute._core import BadRequest, OutcomeKind, RegionBusy, UnknownModel
from warmroute.dataplane.admission import QueueFull
from warmroute.dataplane.leased_exchange import LeasedExchange
from warmroute.dataplane.pool import ConnectFailure
from warmroute.errors import ErrorCode, stream_error
from warmroute.retry import RETRYABLE_STATUSES, Failure, Retries

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from warmroute._core import Lease, RequestHead, ResponseHead
    from warmroute.dataplane.client_connection import ClientConnection
    from warmroute.dataplane.plane import DataPlane
    from warmroute.dataplane.worker_connection import WorkerConnection

log = logging.getLogger(__name__)

# Statuses that may be retried come with small bodies; one that is larger is relayed at once.
MAX_HELD_BODY_BYTES = 64 * 1024
CLIENT_CLOSED_REQUEST = 499


class RoutedExchange(LeasedExchange):
    __slots__ = ("_failure", "_held", "_is_admitted", "_not_before_ns", "_rank", "_retries", "_splice", "_timer")

    _splice: tuple[int, bytes] | None
    _rank: int | None

    def __init__(self, plane: DataPlane, client: ClientConnection, head: RequestHead, body: bytes, now_ns: int) -> None:
        LeasedExchange.__init__(self, plane, client, head, body, now_ns)  # what super() costs shows
        self._is_admitted = False
        self._not_before_ns = 0
        self._retries: Retries | None = None
        self._failure: tuple[ErrorCode, str] | None = None
        self._held: list[bytes] | None = None  # body of an answer that may still be replaced by another worker's
        self._timer: asyncio.TimerHandle | None = None

    def start(self, now_ns: int) -> None:
        plane = self._plane
        lease = None
        try:
            if plane.decides_at_once:
                self._request, lease = plane.core.route(self._head, self._body, now_ns)
            else:
                self._request = plane.core.read_request(self._head, self._body, now_ns)
        except BadRequest as error:
            message, param = error.args
            self.is_over = True
            self._client.answer_error(ErrorCode.INVALID_REQUEST, message, self.request_id, param)
            return
        plane.buffered_bytes += len(self._body)
        admission = plane.admission
        if admission is None:
            self._is_admitted = True
            plane.retry_budget.requests += 1
            if lease is None:
                self._attempt(now_ns, allow_failed=False)
            else:
                self._try(lease, now_ns)
            return
        try:
            if admission.enter(self, now_ns):
                self.admitted(now_ns)
        except QueueFull:
            self._answer_error(ErrorCode.QUEUE_FULL, "Too many requests are running and waiting; try again")
        except RegionBusy:
            self._answer_error(ErrorCode.ROUTER_BUSY, "The router is overloaded; try again")

    # -- what admission tells

    def admitted(self, now_ns: int) -> None:
        self._is_admitted = True
        self._plane.retry_budget.requests += 1
        self._attempt(now_ns, allow_failed=False)

    def waited_too_long(self) -> None:
        self._answer_error(ErrorCode.QUEUE_TIMEOUT, "The request waited too long for its turn; try again")

    def _ended(self, status: int, now_ns: int) -> None:
        LeasedExchange._ended(self, status, now_ns)
        admission = self._plane.admission
        if admission is None:
            return
        if self._is_admitted:
            self._is_admitted = False
            self._plane.surely(admission.leave)
        else:
            self._plane.surely(lambda: admission.withdraw(self))

    # -- attempts

    def _attempt(self, now_ns: int, *, allow_failed: bool) -> None:
        """Choose a worker and ask the pool for a connection to it."""
        plane = self._plane
        try:
            if plane.decision_log is not None:
                plane.decision_log.sample(self._request, self.request_id, now_ns)
            lease = plane.core.select(self._request, now_ns, False)
            if lease is None and allow_failed:
                if self._not_before_ns > now_ns:
                    self._wait_for_the_failed(now_ns)
                    return
                lease = plane.core.select(self._request, now_ns, True)
        except UnknownModel:
            self._answer_error(
                ErrorCode.MODEL_NOT_FOUND, self._plane.unknown_model_message(self._request.model), "model"
            )
            return
        except RegionBusy:
            self._answer_error(ErrorCode.ROUTER_BUSY, "The router is overloaded; try again")
            return
        if lease is None:
            self._nobody(now_ns)
            return
        self._try(lease, now_ns)

    def _try(self, lease: Lease, now_ns: int) -> None:
        """A worker is chosen: ask the pool for a connection to it."""
        plane = self._plane
        slot, incarnation, self._splice, self._rank = lease.terms
        address = plane.directory.address(slot, incarnation)
        if address is None:  # the worker left between the two calls
            lease.release(OutcomeKind.CONNECT_FAILED, 0, -1, None, None, -1, -1, -1, now_ns)
            self._failed(Failure.NOT_SENT, ErrorCode.NO_AVAILABLE_WORKERS, "The worker was removed; try again")
            return
        self._lease = lease
        self._selected_ns = now_ns
        self._address = address
        self._attempts += 1
        self._may_resend = True
        self._pool = plane.pools.get(address.worker_id) or plane.new_pool(address)
        self._pool.assign(self)

    def _nobody(self, now_ns: int) -> None:
        """No worker can take it now."""
        if self._retries is None:
            self._answer_error(ErrorCode.NO_AVAILABLE_WORKERS, "No worker is available; try again")
            return
        failure = Failure.BAD_STATUS if self._held is not None else self._last_failure()
        decision = self._retries.nobody_left(failure)
        if decision is None:
            self._give_up()
        else:
            self._later(decision.delay_seconds, decision.allow_failed)

    def _last_failure(self) -> Failure:
        assert self._retries is not None
        return Failure.NO_ANSWER if self._retries.unanswered else Failure.NOT_SENT

    def _failed(self, failure: Failure, code: ErrorCode, message: str) -> None:
        """An attempt came to nothing before the commit: another one, later or never."""
        plane = self._plane
        self._failure = (code, message)
        if self._retries is None:
            self._retries = Retries(plane.retry_policy, plane.retry_budget, plane.generator)
        decision = self._retries.after(failure)
        if decision is None:
            self._give_up()
        elif decision.delay_seconds:
            self._later(decision.delay_seconds, decision.allow_failed)
        else:
            self._attempt(monotonic_ns(), allow_failed=decision.allow_failed)

    def _later(self, seconds: float, allow_failed: bool) -> None:
        self._timer = self._plane.loop.call_later(seconds, self._again, allow_failed)

    def _again(self, allow_failed: bool) -> None:
        self._timer = None
        self._attempt(monotonic_ns(), allow_failed=allow_failed)

    def _wait_for_the_failed(self, now_ns: int) -> None:
        """Nobody else is left, and a worker has said (`Retry-After`) that it will not answer before."""
        seconds = (self._not_before_ns - now_ns) / 1e9
        if seconds > self._plane.retry_policy.max_backoff_seconds:
            self._give_up()
        else:
            self._later(seconds, allow_failed=True)

    def _give_up(self) -> None:
        if self._held_head is not None:  # the last answer a worker gave, as it gave it
            body = b"".join(self._held or ())
            self._relay(self._held_head, body, monotonic_ns())
            self._end_relay()
            self._finish(self._held_head.status)
            self._client.exchange_ended()
            return
        assert self._failure is not None
        self._answer_error(*self._failure)

    # -- what the upstream connection tells

    def connected(self, connection: WorkerConnection) -> None:
        self._connection = connection
        body = self._body
        if self._splice is not None:
            offset, inserted = self._splice
            body = body[:offset] + inserted + body[offset:]
        address = self._address
        authorization = address.authorization or self._plane.worker_authorization
        head = self._head.to_worker(address.host_header, authorization, self.request_id, len(body), self._rank)
        connection.send(self, head, body)

    def connect_failed(self, reason: str, failure: ConnectFailure) -> None:
        if self.is_over:
            return
        if failure is ConnectFailure.NO_RESOURCES:  # says nothing about the worker
            log.error("request %s: the router cannot connect: %s", self.request_id.decode(), reason)
            self._release(OutcomeKind.CANCELLED, 0, None)
            self._answer_error(ErrorCode.ROUTER_BUSY, f"The router cannot connect to workers now: {reason}")
            return
        self._release(OutcomeKind.CONNECT_FAILED if self._may_resend else OutcomeKind.NO_ANSWER, 0, None)
        timed_out = failure is ConnectFailure.TIMED_OUT
        code = ErrorCode.UPSTREAM_CONNECT_TIMEOUT if timed_out else ErrorCode.UPSTREAM_CONNECT_FAILED
        # Otherwise what looked like a stale connection was a worker that died with the request in its hands.
        sent = Failure.NOT_SENT if self._may_resend else Failure.NO_ANSWER
        self._failed(sent, code, f"Cannot connect to the worker: {reason}")

    def _unanswered(self, reason: str, code: ErrorCode = ErrorCode.UPSTREAM_NO_ANSWER) -> None:
        self._connection = None
        self._release(OutcomeKind.NO_ANSWER, 0, None)
        self._failed(Failure.NO_ANSWER, code, f"The worker did not answer: {reason}")

    def response_began(self, head: ResponseHead, status: int, rest: bytes, now_ns: int) -> Callable[[bytes], object]:
        if (
            status in RETRYABLE_STATUSES
            and self._plane.retry_policy.enabled
            and head.content_length <= MAX_HELD_BODY_BYTES
        ):
            self._held_head = head
            self._held = [rest]
            return self._hold
        self._held_head = None
        self._held = None
        # It will not be sent again: a long stream needs no prompt.
        self._plane.buffered_bytes -= len(self._body)
        self._body = b""
        return self._relay(head, rest, now_ns)

    def _hold(self, data: bytes) -> None:
        assert self._held is not None
        self._held.append(data)
        if sum(map(len, self._held)) > MAX_HELD_BODY_BYTES and self._connection is not None:
            self._connection.abort()
            self.response_broke(self._connection, "an error body without end")

    def response_ended(self, connection: WorkerConnection) -> None:
        self._connection = None
        held_head = self._held_head
        if held_head is not None and self.response is None:
            self._release(OutcomeKind.ANSWERED, held_head.status, connection)
            if held_head.retry_after_seconds > 0:
                self._not_before_ns = monotonic_ns() + held_head.retry_after_seconds * 10**9
            self._failed(Failure.BAD_STATUS, ErrorCode.UPSTREAM_ERROR, f"The worker answered with {held_head.status}")
            return
        assert self.response is not None
        status = self.response.status
        if self._ends_with_a_chunk:
            self._end_relay()
        self._complete(status, connection)
        self._client.exchange_ended()

    def response_broke(self, connection: WorkerConnection, reason: str) -> None:
        self._connection = None
        if self.response is None:  # broke off while it was held: nothing was committed
            self._held = self._held_head = None
            self._unanswered(reason)
            return
        self._release(OutcomeKind.BROKEN_STREAM, self.response.status, connection)
        log.warning("request %s: the answer of %s broke off: %s", self.request_id.decode(), self._address.url, reason)
        self._break_off(connection, ErrorCode.UPSTREAM_STREAM_BROKEN, f"The worker's answer broke off: {reason}")

    def _break_off(self, connection: WorkerConnection, code: ErrorCode, message: str) -> None:
        """End what has begun so that nobody takes it for whole: an error event where there is a dialect, then close."""
        self._finish(code.status)
        if self._request.stream and not self._head.http_1_0 and self.response is not None and self.response.chunked:
            # The worker's last chunk may be cut: fill it with newlines, which SSE ignores, so that the event can be
            # read.
            event = b"\n\n" + stream_error(code, message)
            missing = connection.reader.open_chunk_bytes
            if missing >= 0:
                filler = b"\n" * (missing - 2) + b"\r\n" if missing >= 2 else b"\n"[:missing]
                self._client.write(filler + b"%x\r\n%b\r\n" % (len(event), event))
                self._client.close()
                return
        self._client.abort()

    # -- what the client connection and the plane tell

    def cancel(self) -> None:
        self._drop_attempt(OutcomeKind.CANCELLED)
        self._finish(CLIENT_CLOSED_REQUEST)

    def check_time(self, now_ns: int) -> None:
        times = self._plane.times
        connection = self._connection
        if self.deadline_ns <= now_ns:
            self.timed_out()
        elif connection is None:
            return
        elif self.response is None and self._held_head is None:
            if now_ns - self._selected_ns >= times.first_byte_ns:
                connection.abort()
                reason = f"not a byte within {times.first_byte_ns / 1e9:g} s"
                self._unanswered(reason, ErrorCode.UPSTREAM_FIRST_BYTE_TIMEOUT)
        elif connection.silent_ns(now_ns) >= times.stream_idle_ns:
            message = f"The worker's answer stopped for {times.stream_idle_ns / 1e9:g} s"
            self._end_late(ErrorCode.UPSTREAM_STALLED, message)

    def timed_out(self) -> None:
        if not self._is_admitted:
            self.waited_too_long()
            return
        self._end_late(
            ErrorCode.UPSTREAM_TIMEOUT, f"The worker took longer than {self._plane.times.request_ns / 1e9:g} s"
        )

    def _end_late(self, code: ErrorCode, message: str) -> None:
        connection = self._connection
        began = self.response is not None
        self._drop_attempt(OutcomeKind.BROKEN_STREAM if began else OutcomeKind.NO_ANSWER)
        if began and connection is not None:
            self._break_off(connection, code, message)
        else:
            self._answer_error(code, message)

    def _drop_attempt(self, kind: OutcomeKind) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        connection = self._connection
        if connection is not None:
            connection.abort()
            self._connection = None
        self._release(kind, 0, connection if self.response is not None else None)

    def _answer_error(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        self._finish(code.status)
        self._client.answer_error(code, message, self.request_id, param)

    def _worker_header(self) -> bytes:
        return b"x-warmroute-worker: %b\r\n" % self._address.worker_id.encode()
