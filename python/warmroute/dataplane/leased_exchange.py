"""What a routed exchange owes to others: its lease to the core, its line to the access log.

Every attempt holds one lease, given back once, where the body of its response ends or whatever else happens to it.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute._core import OutcomeKind, RegionBusy
from warmroute.dataplane.access_log import Entry
from warmroute.dataplane.exchange import Exchange

if TYPE_CHECKING:
    from warmroute._core import Lease, Response, RoutedRequest
    from warmroute.dataplane.worker_connection import WorkerConnection
    from warmroute.directory import WorkerAddress

OUTCOME_NAMES = {
    OutcomeKind.ANSWERED: "answered",
    OutcomeKind.CONNECT_FAILED: "connect_failed",
    OutcomeKind.NO_ANSWER: "no_answer",
    OutcomeKind.BROKEN_STREAM: "broken_stream",
    OutcomeKind.CANCELLED: "cancelled",
}

UNKNOWN = (-1, -1, -1)
"""Tokens of which nobody said anything."""


class LeasedExchange(Exchange):
    """Base of `RoutedExchange`, which takes the leases and decides when what ends."""

    __slots__ = ("_address", "_lease", "_request", "_tokens")

    _address: WorkerAddress
    """Of the last attempt."""
    _lease: Lease | None
    _request: RoutedRequest
    _tokens: tuple[int, int, int]

    @property
    def worker_id(self) -> str | None:
        """Who has it now."""
        return self._address.worker_id if self._lease is not None else None

    @property
    def rid(self) -> str | None:
        return self._request.rid

    # -- accounts

    def _release(self, kind: OutcomeKind, status: int, connection: WorkerConnection | None) -> None:
        """Give the lease back with what is known; the core says which machines moved. `connection`: on which an answer
        has begun."""
        lease = self._lease
        if lease is None:
            return
        self._lease = None
        plane = self._plane
        response = reused = None
        if connection is not None:
            response, reused = connection.response, connection.uses > 1
        if plane.keeps_records:
            self._record(lease, kind, status, response)
        first_byte_ns, now_ns = self.first_byte_ns, monotonic_ns()
        try:
            transitions = lease.release(kind, status, first_byte_ns, response, reused, -1, -1, -1, now_ns)
        except RegionBusy:
            self._release_later(lease, kind, status, first_byte_ns, response, now_ns)
            return
        if transitions:
            plane.log_transitions(transitions)

    def _complete(self, connection: WorkerConnection, now_ns: int) -> None:
        """As `_release` and `_finish`, of an answer that arrived whole and went to the client."""
        response = connection.response
        lease: Lease = self._lease  # type: ignore[assignment]  # an attempt that is answered has one
        self._lease = None
        plane = self._plane
        try:
            transitions = lease.complete(response, connection.uses > 1, now_ns)
        except RegionBusy:
            self._release_later(lease, OutcomeKind.ANSWERED, response.status, response.began_ns, response, now_ns)
        else:
            if transitions:
                plane.log_transitions(transitions)
        if plane.keeps_records:
            self._record(lease, OutcomeKind.ANSWERED, response.status, response)
            self._log(response.status, now_ns)
        self._ended()

    def _release_later(
        self,
        lease: Lease,
        kind: OutcomeKind,
        status: int,
        first_byte_ns: int,
        response: Response | None,
        now_ns: int,
    ) -> None:
        """What was delivered is counted already."""
        prompt, completion, cached = UNKNOWN if response is None else response.tokens
        self._plane.later(
            lambda: lease.release(kind, status, first_byte_ns, None, None, prompt, completion, cached, now_ns)
        )

    def _record(self, lease: Lease, kind: OutcomeKind, status: int, response: Response | None) -> None:
        self._tokens = UNKNOWN if response is None else response.tokens
        recorder = self._plane.recorder
        if recorder is not None:
            name = OUTCOME_NAMES[kind]
            recorder.record(
                self._request, lease, self._address, name, status, lease.selected_ns, self.first_byte_ns, self._tokens
            )

    @property
    def first_byte_ns(self) -> int:
        """When the client got it; -1: not yet."""
        return -1 if self.response is None else self.response.began_ns

    def _finish(self, status: int) -> None:
        now_ns = monotonic_ns()
        self._request.finish(status, self.first_byte_ns, now_ns)
        self._log(status, now_ns)
        self._ended()

    def _ended(self) -> None:
        """The client's request is over."""
        raise NotImplementedError

    def _log(self, status: int, now_ns: int) -> None:
        access_log, request, first_byte_ns = self._plane.access_log, self._request, self.first_byte_ns
        if access_log is None:
            return
        attempts = request.attempts if hasattr(self, "_address") else 0
        access_log.add(
            Entry(
                request_id=self.request_id,
                path=self.head.path,
                model=request.model,
                stream=request.stream,
                status=status,
                worker_id=self._address.worker_id if attempts else None,
                attempts=attempts,
                prompt_bytes=request.prompt_bytes,
                tokens=self._tokens if attempts else UNKNOWN,
                first_byte_ns=first_byte_ns - self.accepted_ns if first_byte_ns >= 0 else None,
                duration_ns=now_ns - self.accepted_ns,
            )
        )
