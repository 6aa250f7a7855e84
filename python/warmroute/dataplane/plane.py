"""The data plane as a whole: what all connections share, the sweep for time-outs, draining."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import random
from pathlib import Path
from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute import router_health
from warmroute._core import HeadParser, Route
from warmroute.dataplane.admission import Admission, AdmissionLimits
from warmroute.dataplane.client_connection import ClientConnection
from warmroute.dataplane.decision_log import DecisionLog
from warmroute.dataplane.pool import IDLE_NS, Pool
from warmroute.dataplane.recorder import DecisionRecorder
from warmroute.retry import RetryBudget, RetryPolicy

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from warmroute._core import Core, RequestHead, Transition
    from warmroute.config import RouterConfig
    from warmroute.dataplane.exchange import Exchange
    from warmroute.directory import Directory, WorkerAddress
    from warmroute.http_counts import HttpCounts

log = logging.getLogger(__name__)

SWEEP_SECONDS = 1.0
MAX_HEAD_BYTES = 64 * 1024
# Probes of orchestrators and monitoring have no credentials; so it is with the peers.
OPEN_PATHS = frozenset({b"/health", b"/liveness", b"/readiness", b"/metrics", b"/v1/models"})


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
        counts: HttpCounts,
    ) -> None:
        self.core = core
        self.counts = counts
        self.recorder = DecisionRecorder(Path(config.record_decisions)) if config.record_decisions else None
        self.decision_log = DecisionLog(core, directory, config.log_decisions) if config.log_decisions else None
        self.directory = directory
        self.loop = asyncio.get_running_loop()
        self.parser = HeadParser(request_id_headers=config.request_id_headers, max_head_bytes=MAX_HEAD_BYTES)
        self.retry_policy = RetryPolicy.of(config)
        self.retry_budget = RetryBudget()
        self.generator = random.Random(config.seed)
        self.max_body_bytes = config.max_payload_size
        self.request_timeout_ns = int(config.request_timeout_secs * 1e9)
        self.expose_worker = config.expose_worker
        self.api_key = config.api_key
        self._expected_authorization = b"Bearer " + config.api_key.encode() if config.api_key else b""
        limits = AdmissionLimits.of(config)
        self.admission = None if limits is None else Admission(limits, self._let_in_later, monotonic_ns())
        if self.admission is not None:
            counts.admission = self.admission.counts
        self._letting_in: asyncio.TimerHandle | None = None
        self.connections: set[ClientConnection] = set()
        self.is_draining = False
        self._exchanges: set[Exchange] = set()
        self._pools: dict[str, Pool] = {}
        self._all_done = asyncio.Event()
        self._id_prefix = b"req-" + os.urandom(8).hex().encode()
        self._id_count = 0

        async def connect_control(factory: Callable[[], asyncio.Protocol]) -> None:
            await self.loop.create_connection(factory, sock=await control_upstream())

        self.control_pool = Pool(connect_control, self.parser)
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    def protocol_factory(self) -> ClientConnection:
        return ClientConnection(self)

    @property
    def active_requests(self) -> int:
        return len(self._exchanges)

    async def drain(self, timeout_seconds: float) -> bool:
        """Close idle connections, let running requests finish; whether all did in time."""
        self.is_draining = True
        for connection in [c for c in self.connections if c.is_idle]:
            connection.close()
        if self._exchanges:
            self._all_done.clear()
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._all_done.wait()
            except TimeoutError:
                return False
        return True

    def close(self) -> None:
        """Cut everything that is left."""
        self.is_draining = True
        self._sweeper.cancel()
        for exchange in list(self._exchanges):
            exchange.cancel()
        if self._letting_in is not None:  # each exchange that ended asked for it
            self._letting_in.cancel()
        for connection in list(self.connections):
            connection.abort()
        for pool in (*self._pools.values(), self.control_pool):
            pool.close()
        if self.recorder is not None:
            self.recorder.close()

    # -- for the connections and exchanges

    def new_request_id(self) -> bytes:
        self._id_count += 1
        return b"%b%08x" % (self._id_prefix, self._id_count)

    def may_enter(self, head: RequestHead) -> bool:
        if head.path in OPEN_PATHS and not head.is_routed:
            return True
        return hmac.compare_digest(head.authorization or b"", self._expected_authorization)

    def probe(self, route: Route) -> tuple[int, str, bytes]:
        """(status, content type, body) for an orchestrator's probe, from the core alone."""
        if route == Route.READINESS:
            return router_health.readiness(self.core, draining=self.is_draining)
        return router_health.liveness()

    def began(self, exchange: Exchange) -> None:
        self._exchanges.add(exchange)

    def ended(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)
        if self.is_draining and not self._exchanges:
            self._all_done.set()

    def pool(self, address: WorkerAddress) -> Pool:
        pool = self._pools.get(address.worker_id)
        if pool is None:

            async def connect(factory: Callable[[], asyncio.Protocol]) -> None:
                await self.loop.create_connection(factory, address.host, address.port, ssl=address.tls or None)

            pool = self._pools[address.worker_id] = Pool(connect, self.parser)
        return pool

    def worker_authorization(self, address: WorkerAddress) -> bytes | None:
        """None: the client's own goes through. The router's key never leaves the router."""
        if address.authorization is not None:
            return address.authorization
        return b"" if self.api_key is not None else None

    def unknown_model_message(self, model: str | None) -> str:
        known = ", ".join(self.directory.models()) or "none"
        return f"The model {model!r} is not served here; known models: {known}"

    def log_transition(self, transition: Transition) -> None:
        address = self.directory.address(transition.head)
        url = address.url if address else f"slot {transition.head}"
        log.warning("worker %s: %s %s -> %s", url, transition.machine, transition.previous, transition.current)

    # -- admission

    def _let_in_later(self, seconds: float) -> None:
        if self._letting_in is not None:
            if self._letting_in.when() <= self.loop.time() + seconds:
                return
            self._letting_in.cancel()
        self._letting_in = self.loop.call_later(max(seconds, 0.0), self._let_in)

    def _let_in(self) -> None:
        self._letting_in = None
        assert self.admission is not None
        self.admission.let_in(monotonic_ns())

    # -- time

    def _sweep(self) -> None:
        """Once a second: requests over their time, connections idle for too long. Cheaper than a timer for each."""
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)
        now_ns = monotonic_ns()
        if self.admission is not None:
            self.admission.expire(now_ns)
        for exchange in [e for e in self._exchanges if e.deadline_ns <= now_ns]:
            if not exchange.is_over:
                exchange.timed_out()
        for worker_id, pool in list(self._pools.items()):
            pool.close_idle(now_ns - IDLE_NS)
            if pool.is_empty:
                del self._pools[worker_id]
        self.control_pool.close_idle(now_ns - IDLE_NS)
