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
from warmroute.dataplane.setbacks import Setbacks
from warmroute.errors import ErrorCode, stream_error
from warmroute.retry import RETRYABLE_STATUSES, Failure, Retries

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute._core import Lease, RequestHead, Response, RoutedRequest
    from warmroute.dataplane.client_connection import ClientConnection
    from warmroute.dataplane.plane import DataPlane
    from warmroute.dataplane.pool import Pool
    from warmroute.dataplane.worker_connection import WorkerConnection

log = logging.getLogger(__name__)

# Statuses that may be retried come with small bodies; one that is larger is relayed at once.
MAX_HELD_BODY_BYTES = 64 * 1024
CLIENT_CLOSED_REQUEST = 499


class RoutedExchange(LeasedExchange):
    __slots__ = ("_is_admitted", "_setbacks")

    def start(
        self,
        plane: DataPlane,
        client: ClientConnection,
        head: RequestHead,
        data: bytes,
        now_ns: int,
        request: RoutedRequest | BadRequest | None = None,
        lease: Lease | None = None,
        pool: Pool | None = None,
        first: bytes | None = None,
        second: bytes | None = None,
    ) -> None:
        """`data` begins with the request, which is there as a whole; `now_ns`: it came then. `request` and what
        follows: as `Core.begin` gives them, if it was asked to route."""
        self._plane = plane
        self._client = client
        self.head = head
        self._data = data
        self.accepted_ns = now_ns
        self._connection = None
        self.response = None
        self._ends_with_a_chunk = False
        self.is_over = False
        self._setbacks: Setbacks | None = None
        self._is_admitted = True  # or has no need to be
        self._lease = lease
        if pool is None:
            self._start_slowly(request, now_ns)
            return
        self._request = request  # type: ignore[assignment]  # with a lease it is no refusal
        plane.buffered_bytes += len(data)
        plane.retry_budget.requests += 1
        self._address = pool.address  # type: ignore[assignment]  # a worker's pool has one
        self._may_resend = True
        self._pool = pool
        connection = pool.take()
        if connection is None:
            pool.open(self)
        else:
            self._connection = connection
            connection.send(self, first, second)  # type: ignore[arg-type]  # with a pool there is something to send

    def _start_slowly(self, request: RoutedRequest | BadRequest | None, now_ns: int) -> None:
        """Of a request that was not routed yet, could not be, or goes where none of this process has gone before."""
        plane, lease = self._plane, self._lease
        self._lease = None
        try:
            if isinstance(request, BadRequest):
                raise request
            if request is not None:
                self._request = request
            elif plane.decides_at_once:
                self._request, lease, _, _ = plane.core.route(self.head, self._data, now_ns)
            else:
                self._request = plane.core.read_request(self.head, self._data, now_ns)
        except BadRequest as error:
            message, param = error.args
            self.is_over = True
            self._client.answer_error(ErrorCode.INVALID_REQUEST, message, self.request_id, param)
            return
        plane.buffered_bytes += len(self._data)
        admission = plane.admission
        if admission is None:
            plane.retry_budget.requests += 1
            if lease is None:
                self._attempt(now_ns, allow_failed=False)
            else:
                self._try(lease, now_ns)
            return
        self._is_admitted = False
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

    def _ended(self) -> None:
        self.is_over = True
        self._connection = None
        plane = self._plane
        plane.buffered_bytes -= len(self._data)
        admission = plane.admission
        if admission is None:
            return
        if self._is_admitted:
            self._is_admitted = False
            plane.surely(admission.leave)
        else:
            plane.surely(lambda: admission.withdraw(self))

    # -- attempts

    def _attempt(self, now_ns: int, *, allow_failed: bool) -> None:
        """Choose a worker and ask the pool for a connection to it."""
        plane = self._plane
        try:
            if plane.decision_log is not None:
                plane.decision_log.sample(self._request, self.request_id, now_ns)
            lease = plane.core.select(self._request, now_ns, False)
            if lease is None and allow_failed:
                if self._set_back().not_before_ns > now_ns:
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
        pool = self._plane.pool_for(lease.slot, lease.incarnation)
        if pool is None:  # the worker left between the two calls
            release = lease.release
            self._plane.surely(lambda: release(OutcomeKind.CONNECT_FAILED, 0, -1, None, None, -1, -1, -1, now_ns))
            self._failed(Failure.NOT_SENT, ErrorCode.NO_AVAILABLE_WORKERS, "The worker was removed; try again")
            return
        self._lease = lease
        self._address = pool.address  # type: ignore[assignment]  # as in `start`
        self._may_resend = True
        self._pool = pool
        connection = pool.take()
        if connection is None:
            pool.open(self)
        else:
            self.connected(connection)

    def _set_back(self) -> Setbacks:
        if self._setbacks is None:
            self._setbacks = Setbacks()
        return self._setbacks

    def _nobody(self, now_ns: int) -> None:
        """No worker can take it now."""
        setbacks = self._setbacks
        if setbacks is None or setbacks.retries is None:
            self._answer_error(ErrorCode.NO_AVAILABLE_WORKERS, "No worker is available; try again")
            return
        retries = setbacks.retries
        if setbacks.held is not None:
            failure = Failure.BAD_STATUS
        else:
            failure = Failure.NO_ANSWER if retries.unanswered else Failure.NOT_SENT
        decision = retries.nobody_left(failure)
        if decision is None:
            self._give_up()
        else:
            self._later(decision.delay_seconds, decision.allow_failed)

    def _failed(self, failure: Failure, code: ErrorCode, message: str) -> None:
        """An attempt came to nothing before the commit: another one, later or never."""
        plane = self._plane
        setbacks = self._set_back()
        setbacks.failure = (code, message)
        if setbacks.retries is None:
            setbacks.retries = Retries(plane.retry_policy, plane.retry_budget, plane.generator)
        decision = setbacks.retries.after(failure)
        if decision is None:
            self._give_up()
        elif decision.delay_seconds:
            self._later(decision.delay_seconds, decision.allow_failed)
        else:
            self._attempt(monotonic_ns(), allow_failed=decision.allow_failed)

    def _later(self, seconds: float, allow_failed: bool) -> None:
        self._set_back().timer = self._plane.loop.call_later(seconds, self._again, allow_failed)

    def _again(self, allow_failed: bool) -> None:
        self._set_back().timer = None
        self._attempt(monotonic_ns(), allow_failed=allow_failed)

    def _wait_for_the_failed(self, now_ns: int) -> None:
        """Nobody else is left, and a worker has said (`Retry-After`) that it will not answer before."""
        seconds = (self._set_back().not_before_ns - now_ns) / 1e9
        if seconds > self._plane.retry_policy.max_backoff_seconds:
            self._give_up()
        else:
            self._later(seconds, allow_failed=True)

    def _give_up(self) -> None:
        setbacks = self._set_back()
        held = setbacks.held
        if held is not None:  # the last answer a worker gave, as it gave it
            held.held_until(monotonic_ns())
            write = self._relay(held, setbacks.held_in)
            for part in setbacks.held_parts[1:]:
                write(part)
            self._end_relay()
            self._finish(held.status)
            self._client.exchange_ended()
            return
        assert setbacks.failure is not None
        self._answer_error(*setbacks.failure)

    # -- what the upstream connection tells

    def connected(self, connection: WorkerConnection) -> None:
        self._connection = connection
        lease: Lease = self._lease  # type: ignore[assignment]  # a request that is sent has one
        address = self._address
        authorization = address.authorization or self._plane.worker_authorization
        connection.send(self, *lease.to_worker(self.head, address.host_header, authorization, self._data))

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

    def answered(self, connection: WorkerConnection, data: bytes, now_ns: int) -> bool:
        """Of an answer that is whole in `data` and plain, everything at once: most are. False: nothing was done."""
        lease, plane = self._lease, self._plane
        if lease is None or not plane.relays_at_once:
            return False
        client = self._client
        found = lease.answer(plane.parser, self.head, client.keep_alive, connection.uses > 1, data, now_ns)
        if found is None:
            return False
        answer, can_stay, transitions, response = found
        self._lease = None
        self._connection = None  # nothing more comes of it, and a client that does not read on must not hold it up
        client.write(answer)
        connection.exchange = None
        connection.give_back(can_stay, now_ns)
        if transitions is not None:
            plane.log_transitions(transitions)
        elif response is not None:
            self._release_later(lease, OutcomeKind.ANSWERED, response.status, response.began_ns, response, now_ns)
        self._ended()
        client.exchange_ended()
        return True

    def response_began(self, response: Response, status: int, data: bytes) -> Callable[[bytes], object]:
        if (
            status in RETRYABLE_STATUSES
            and self._plane.retry_policy.enabled
            and response.content_length <= MAX_HELD_BODY_BYTES
        ):
            setbacks = self._set_back()
            setbacks.held = response
            setbacks.held_in = data
            setbacks.held_parts = [response.body_in(data)]
            return self._hold
        if self._setbacks is not None:
            self._setbacks.let_go()
        return self._relay(response, data)

    def response_goes_on(self) -> None:
        if self.response is not None:  # it will not be sent again: a long stream needs no prompt
            self._plane.buffered_bytes -= len(self._data)
            self._data = b""

    def _hold(self, data: bytes) -> None:
        parts = self._set_back().held_parts
        parts.append(data)
        if sum(map(len, parts)) > MAX_HELD_BODY_BYTES and self._connection is not None:
            self._connection.abort()
            self.response_broke(self._connection, "an error body without end")

    def response_ended(self, connection: WorkerConnection, now_ns: int) -> None:
        if self.response is None:  # it is held
            self._connection = None
            response = connection.response
            status = response.status
            self._release(OutcomeKind.ANSWERED, status, connection)
            if response.retry_after_seconds > 0:
                self._set_back().not_before_ns = now_ns + response.retry_after_seconds * 10**9
            self._failed(Failure.BAD_STATUS, ErrorCode.UPSTREAM_ERROR, f"The worker answered with {status}")
            return
        if self._ends_with_a_chunk:
            self._end_relay()
        self._complete(connection, now_ns)
        self._client.exchange_ended()

    def response_broke(self, connection: WorkerConnection, reason: str) -> None:
        self._connection = None
        if self.response is None:  # broke off while it was held: nothing was committed
            self._set_back().let_go()
            self._unanswered(reason)
            return
        self._release(OutcomeKind.BROKEN_STREAM, self.response.status, connection)
        log.warning("request %s: the answer of %s broke off: %s", self.request_id.decode(), self._address.url, reason)
        self._break_off(connection, ErrorCode.UPSTREAM_STREAM_BROKEN, f"The worker's answer broke off: {reason}")

    def _break_off(self, connection: WorkerConnection, code: ErrorCode, message: str) -> None:
        """End what has begun so that nobody takes it for whole: an error event where there is a dialect, then close."""
        self._finish(code.status)
        if self._request.stream and not self.head.http_1_0 and self.response is not None and self.response.chunked:
            # The worker's last chunk may be cut: fill it with newlines, which SSE ignores, so that the event can be
            # read.
            event = b"\n\n" + stream_error(code, message)
            missing = connection.response.open_chunk_bytes
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
        elif self.response is None and (self._setbacks is None or self._setbacks.held is None):
            if self._lease is not None and now_ns - self._lease.selected_ns >= times.first_byte_ns:
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
        setbacks = self._setbacks
        if setbacks is not None and setbacks.timer is not None:
            setbacks.timer.cancel()
            setbacks.timer = None
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
