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
    from warmroute._core import BodyReader, Lease, RequestHead, ResponseHead, RoutedRequest
    from warmroute.dataplane.client_connection import ClientConnection
    from warmroute.dataplane.plane import DataPlane
    from warmroute.dataplane.worker_connection import WorkerConnection
    from warmroute.directory import WorkerAddress

OUTCOME_NAMES = {
    OutcomeKind.ANSWERED: "answered",
    OutcomeKind.CONNECT_FAILED: "connect_failed",
    OutcomeKind.NO_ANSWER: "no_answer",
    OutcomeKind.BROKEN_STREAM: "broken_stream",
    OutcomeKind.CANCELLED: "cancelled",
}


class LeasedExchange(Exchange):
    """Base of `RoutedExchange`, which takes the leases and decides when what ends."""

    __slots__ = ("_address", "_attempts", "_held_head", "_lease", "_request", "_selected_ns", "_tokens")

    _address: WorkerAddress
    _request: RoutedRequest
    _selected_ns: int

    def __init__(self, plane: DataPlane, client: ClientConnection, head: RequestHead, body: bytes, now_ns: int) -> None:
        Exchange.__init__(self, plane, client, head, body, now_ns)
        self._attempts = 0
        self._lease: Lease | None = None
        self._held_head: ResponseHead | None = None
        """Of an answer that may still be replaced by another worker's."""
        self._tokens = (-1, -1, -1)

    @property
    def worker_id(self) -> str | None:
        """Who has it now."""
        return self._address.worker_id if self._lease is not None else None

    @property
    def rid(self) -> str | None:
        return self._request.rid

    # -- accounts

    def _release(self, kind: OutcomeKind, status: int, connection: WorkerConnection | None) -> None:
        """Give the lease back with what is known; the core says which machines moved."""
        lease = self._lease
        if lease is None:
            return
        self._lease = None
        prompt = cached = -1
        reader = reused = None
        if connection is not None:
            head = self.response or self._held_head
            reader, reused = connection.reader, connection.is_reused
            if head is not None:
                prompt, cached = head.prompt_tokens, head.cached_tokens
        plane = self._plane
        if plane.keeps_records:
            self._record(lease, kind, status, reader, prompt, cached)
        first_byte_ns, now_ns = self.first_byte_ns, monotonic_ns()
        try:
            transitions = lease.release(kind, status, first_byte_ns, reader, reused, prompt, -1, cached, now_ns)
        except RegionBusy:
            plane.later(lambda: lease.release(kind, status, first_byte_ns, None, None, prompt, -1, cached, now_ns))
            return
        if transitions:
            plane.log_transitions(transitions)

    def _complete(self, status: int, connection: WorkerConnection) -> None:
        """As `_release` and `_finish`, of an answer that arrived whole and went to the client."""
        head, reader, lease, first_byte_ns = self.response, connection.reader, self._lease, self.first_byte_ns
        assert head is not None
        assert lease is not None
        self._lease = None
        plane = self._plane
        if plane.keeps_records:
            self._record(lease, OutcomeKind.ANSWERED, status, reader, head.prompt_tokens, head.cached_tokens)
        now_ns = monotonic_ns()
        try:
            transitions = lease.complete(status, first_byte_ns, head, reader, connection.is_reused, now_ns)
        except RegionBusy:
            kind = OutcomeKind.ANSWERED
            plane.later(lambda: lease.release(kind, status, first_byte_ns, None, None, -1, -1, -1, now_ns))
        else:
            if transitions:
                plane.log_transitions(transitions)
        self._ended(status, now_ns)

    def _record(
        self, lease: Lease, kind: OutcomeKind, status: int, reader: BodyReader | None, prompt: int, cached: int
    ) -> None:
        found = reader.usage() if reader is not None else (-1, -1, -1)
        self._tokens = (prompt, found[1], cached) if prompt >= 0 else found
        recorder = self._plane.recorder
        if recorder is not None:
            name = OUTCOME_NAMES[kind]
            recorder.record(
                self._request, lease, self._address, name, status, self._selected_ns, self.first_byte_ns, self._tokens
            )

    def _finish(self, status: int) -> None:
        now_ns = monotonic_ns()
        self._request.finish(status, self.first_byte_ns, now_ns)
        self._ended(status, now_ns)

    def _ended(self, status: int, now_ns: int) -> None:
        plane = self._plane
        if plane.access_log is not None:
            plane.access_log.add(self._entry(status, now_ns))
        self.is_over = True
        self._connection = None
        plane.buffered_bytes -= len(self._body)

    def _entry(self, status: int, now_ns: int) -> Entry:
        request, accepted_ns = self._request, self.deadline_ns - self._plane.times.request_ns
        first_byte_ns = self.first_byte_ns
        return Entry(
            request_id=self.request_id,
            path=self._head.path,
            model=request.model,
            stream=request.stream,
            status=status,
            worker_id=self._address.worker_id if self._attempts else None,
            attempts=self._attempts,
            prompt_bytes=request.prompt_bytes,
            tokens=self._tokens,
            first_byte_ns=first_byte_ns - accepted_ns if first_byte_ns >= 0 else None,
            duration_ns=now_ns - accepted_ns,
        )
