"""The data plane as a whole: what all connections share, the sweep for time-outs, draining."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute import router_health
from warmroute._core import HeadParser, RegionBusy, Route, Upstreams
from warmroute.dataplane.access_log import AccessLog
from warmroute.dataplane.admission import Admission
from warmroute.dataplane.client_connection import ClientConnection
from warmroute.dataplane.decision_log import DecisionLog
from warmroute.dataplane.doorbell import Doorbell
from warmroute.dataplane.pool import IDLE_NS, Pool
from warmroute.dataplane.recorder import DecisionRecorder
from warmroute.dataplane.routed_exchange import RoutedExchange
from warmroute.retry import RetryBudget, RetryPolicy

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterable

    from warmroute._core import Core, Transition
    from warmroute.config import RouterConfig
    from warmroute.dataplane.exchange import Exchange
    from warmroute.directory import Directory, WorkerAddress

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
TURN_SECONDS = 0.1
DRAIN_SECONDS = 0.02
IDLE_DRAIN_SECONDS = 0.5
# How long to wait before the region's lock is tried again, when it could not be had.
BUSY_SECONDS = 0.05
# Files that are neither a client's connection nor a worker's.
SPARE_FILES = 64
MAX_HEAD_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Shared:
    """What a data plane has in common with its siblings."""

    open_files: int
    """How many files the process may have open."""
    processes: int = 1
    doorbell_fd: int | None = None
    start_ns: int = field(default_factory=monotonic_ns)


@dataclass(frozen=True, slots=True)
class Times:
    """The longest of everything. In ns but for the one that a timer of its own takes."""

    header_ns: int
    body_ns: int
    client_idle_ns: int
    connect_seconds: float
    first_byte_ns: int
    stream_idle_ns: int
    request_ns: int

    @classmethod
    def of(cls, config: RouterConfig) -> Times:
        return cls(
            header_ns=int(config.client_header_timeout_secs * 1e9),
            body_ns=int(config.client_body_timeout_secs * 1e9),
            client_idle_ns=int(config.client_idle_timeout_secs * 1e9),
            connect_seconds=config.connect_timeout_secs,
            first_byte_ns=int(config.first_byte_timeout_secs * 1e9),
            stream_idle_ns=int(config.stream_idle_timeout_secs * 1e9),
            request_ns=int(config.request_timeout_secs * 1e9),
        )


class DataPlane:
    """Owns every client connection and the pools. Decisions are the core's; addresses are the directory's.

    `control_upstream` opens a socket to the control app.
    """

    def __init__(
        self,
        config: RouterConfig,
        core: Core,
        directory: Directory,
        control_upstream: Callable[[], Awaitable[socket.socket]],
        shared: Shared | None = None,
    ) -> None:
        shared = shared or Shared(open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self.core = core
        self.recorder = DecisionRecorder(config.record_decisions, shared.start_ns) if config.record_decisions else None
        self.decision_log = DecisionLog(core, directory, config.log_decisions) if config.log_decisions else None
        self.directory = directory
        self.loop = asyncio.get_running_loop()
        self.parser = HeadParser(
            request_id_headers=config.request_id_headers,
            max_head_bytes=MAX_HEAD_BYTES,
            max_body_bytes=config.max_payload_size,
            authorization=b"Bearer " + config.api_key.encode() if config.api_key else None,
            id_prefix=b"req-" + os.urandom(8).hex().encode(),
        )
        self.retry_policy = RetryPolicy.of(config)
        self.retry_budget = RetryBudget()
        self.generator = random.Random(config.seed)
        self.max_body_bytes = config.max_payload_size
        self.max_buffered_bytes = max(config.max_buffered_bytes // shared.processes, config.max_payload_size)
        self.max_connections = config.max_connections or max(shared.open_files // 2 - SPARE_FILES, 16)
        self.times = Times.of(config)
        self.expose_worker = config.expose_worker
        self.worker_authorization = b"" if config.api_key else None
        """For workers without a key of their own. None: the client's goes through. The router's never leaves it."""
        path, form = config.access_log, config.access_log_format
        self.access_log = AccessLog(path, form) if path else None
        self.keeps_records = self.recorder is not None or self.access_log is not None
        self.relays_at_once = not self.keeps_records and not self.expose_worker
        """A whole answer goes on without a look at it."""
        self.admission: Admission | None = None
        if config.is_limited:
            bell = Doorbell(self.loop, shared.doorbell_fd, self._let_in)
            self.admission = Admission(core, int(config.queue_timeout_secs * 1e9), self._let_in_later, bell)
        self.decides_at_once = self.admission is None and self.decision_log is None
        """A request is not looked at between reading it and choosing its worker."""
        self._letting_in: asyncio.Handle | None = None
        self._let_in_at = 0.0
        self.buffered_bytes = 0
        """Of request bodies that are still being read, and of whole requests that may have to be sent again."""
        self.second_ns = monotonic_ns()
        """The time, at most a second late: for what happens too often to ask for it."""
        self.connections: set[ClientConnection] = set()
        self.is_draining = False
        self.pools: dict[str, Pool] = {}
        """By worker."""
        self.upstreams = Upstreams()
        """The same by slot, where the core finds them."""

        async def connect_control(factory: Callable[[], asyncio.Protocol]) -> None:
            await self.loop.create_connection(factory, sock=await control_upstream())

        self.control_pool = Pool(connect_control, self.parser, self.times.connect_seconds)
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)
        core.turned(0, self.second_ns)
        self._turn_at = self.loop.time() + TURN_SECONDS
        self._turner = self.loop.call_at(self._turn_at, self._turn)

    def protocol_factory(self) -> ClientConnection:
        return ClientConnection(self)

    @property
    def active_requests(self) -> int:
        return len(self._exchanges())

    async def drain(self, timeout_seconds: float) -> bool:
        """Let requests finish, those that are still being read included; whether all did in time. What comes on new
        connections meanwhile is refused. Old ones without a request are kept for a moment, so that a client does not
        write its next one into a closed connection: its answer tells it to connect anew.
        """
        self.is_draining = True
        now = self.loop.time()
        deadline, idle_deadline = now + timeout_seconds, now + min(IDLE_DRAIN_SECONDS, timeout_seconds)
        while True:
            now = self.loop.time()
            if now >= idle_deadline:
                for connection in [c for c in self.connections if c.is_idle]:
                    connection.close()
            # Those that are closed are there until their last bytes have been sent.
            if not self._exchanges() and all(connection.came_late for connection in self.connections):
                return True
            if now >= deadline:
                return False
            await asyncio.sleep(DRAIN_SECONDS)

    def close(self) -> None:
        """Cut everything that is left."""
        self.is_draining = True
        self._sweeper.cancel()
        self._turner.cancel()
        for exchange in self._exchanges():
            exchange.cancel()
        if self._letting_in is not None:  # each exchange that ended asked for it
            self._letting_in.cancel()
        for connection in list(self.connections):
            connection.abort()
        for pool in (*self.pools.values(), self.control_pool):
            pool.close()
        if self.recorder is not None:
            self.recorder.close()
        if self.access_log is not None:
            self.access_log.close()

    def _exchanges(self) -> list[Exchange]:
        """Under way: each is its connection's."""
        return [connection.exchange for connection in self.connections if connection.exchange is not None]

    # -- for the connections and exchanges

    def probe(self, route: Route) -> tuple[int, str, bytes]:
        """(status, content type, body) for an orchestrator's probe, from the core alone."""
        if route == Route.READINESS:
            return router_health.readiness(self.core, draining=self.is_draining)
        return router_health.liveness()

    def pool_for(self, slot: int, incarnation: int) -> Pool | None:
        """Of the worker that was in that slot; None: it has left. From now on `Core.begin` knows it."""
        address = self.directory.address(slot, incarnation)
        if address is None:
            return None
        pool = self.pools.get(address.worker_id) or self.new_pool(address)
        authorization = address.authorization or self.worker_authorization
        self.upstreams.put(slot, incarnation, address.host_header, authorization, pool)
        return pool

    def new_pool(self, address: WorkerAddress) -> Pool:
        async def connect(factory: Callable[[], asyncio.Protocol]) -> None:
            await self.loop.create_connection(factory, address.host, address.port, ssl=address.tls or None)

        pool = self.pools[address.worker_id] = Pool(connect, self.parser, self.times.connect_seconds, address)
        return pool

    def unknown_model_message(self, model: str | None) -> str:
        known = ", ".join(self.directory.models()) or "none"
        return f"The model {model!r} is not served here; known models: {known}"

    def log_transitions(self, transitions: Iterable[Transition]) -> None:
        for transition in transitions:
            address = self.directory.address(transition.head)
            url = address.url if address else f"slot {transition.head}"
            log.warning("worker %s: %s %s -> %s", url, transition.machine, transition.previous, transition.current)

    def find(self, request_id: str) -> list[tuple[str, str]]:
        """(id of the worker, the request's name there) of the running requests whose `rid` that is, or which their
        heads call so."""
        wanted = request_id.encode("latin-1", "replace")
        running = [one for one in self._exchanges() if isinstance(one, RoutedExchange)]
        return [
            (one.worker_id, one.rid or request_id)
            for one in running
            if one.worker_id and (one.request_id == wanted or one.rid == request_id)
        ]

    def surely(self, call: Callable[[], object]) -> None:
        """Now, or as soon as the region's lock can be had."""
        try:
            call()
        except RegionBusy:
            self.later(call)

    def later(self, call: Callable[[], object]) -> None:
        self.loop.call_later(BUSY_SECONDS, self.surely, call)

    # -- admission

    def _let_in_later(self, seconds: float) -> None:
        at = self.loop.time() + seconds
        if self._letting_in is not None:
            if self._let_in_at <= at:
                return
            self._letting_in.cancel()
        self._let_in_at = at
        self._letting_in = self.loop.call_at(at, self._let_in)

    def _let_in(self) -> None:
        self._letting_in = None
        admission = self.admission
        assert admission is not None
        self.surely(lambda: admission.let_in(monotonic_ns()))

    # -- time

    def _sweep(self) -> None:
        """Once a second: requests over their time, connections idle for too long. Cheaper than a timer for each."""
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)
        now_ns = self.second_ns = monotonic_ns()
        if self.admission is not None:
            admission = self.admission
            self.surely(lambda: admission.expire(now_ns))
            self._let_in()  # whatever woke nobody
        for exchange in self._exchanges():
            if not exchange.is_over:
                exchange.check_time(now_ns)
        for connection in list(self.connections):
            connection.check_time(now_ns)
        for worker_id, pool in list(self.pools.items()):
            pool.close_idle(now_ns - IDLE_NS)
            if pool.is_empty:
                self.upstreams.forget(pool)
                del self.pools[worker_id]
        self.control_pool.close_idle(now_ns - IDLE_NS)

    def _turn(self) -> None:
        """Ten times a second: how late is the loop? Whoever watches sees that it turns at all."""
        now = self.loop.time()
        self.core.turned(max(0, int((now - self._turn_at) * 1e9)), monotonic_ns())
        self._turn_at = now + TURN_SECONDS
        self._turner = self.loop.call_at(self._turn_at, self._turn)
