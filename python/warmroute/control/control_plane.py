"""Puts the parts of the control plane together and runs them: registration, probing, the control app, metrics."""

import asyncio
import logging
import random
import socket
from collections.abc import Sequence
from time import monotonic_ns, time_ns
from typing import Any, Final

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector

from warmroute._core import Core
from warmroute.command_line import Settings
from warmroute.config import indexed_text_bytes
from warmroute.control.api import control_app, metrics_app
from warmroute.control.debug_api import DebugApi
from warmroute.control.fleet_api import FindRequest, FleetApi
from warmroute.control.handover import state_of, worker_of
from warmroute.control.http_counts import HttpCounts
from warmroute.control.kv_feeds import KvFeeds
from warmroute.control.load_monitor import LoadMonitor
from warmroute.control.metrics import RouterCollector
from warmroute.control.probe_schedule import ProbeIntervals, ProbeSchedule
from warmroute.control.prober import Prober
from warmroute.control.registry_text import decode, encode
from warmroute.control.worker_api import WorkerApi
from warmroute.control.worker_client import WorkerClient
from warmroute.control.worker_spec import WorkerSpec
from warmroute.control.workers import Registry
from warmroute.directory import Directory, parse_worker_url

log = logging.getLogger(__name__)

# How often the core is asked which workers to probe, and drained workers are looked at.
TICK_SECONDS: Final = 0.1
# After a worker has lost its cache, the whole index is swept in this time: blocks that hundreds of workers have lost at
# once, as when new weights are loaded, are looked through in vain until then.
_SWEEP_AFTER_LOSS_SECONDS: Final = 2.0
# A bucket of the index is a cache line.
_BUCKET_BYTES: Final = 64
# The sockets to the control app are inside this process: an idle one costs nothing, so the data plane closes it first.
_UPSTREAM_KEEP_ALIVE_SECONDS: Final = 3600.0
# The data plane has drained by then, or was told not to.
_SHUTDOWN_SECONDS: Final = 1.0
# How long requests of the control app may take to end before another program takes its place.
_LEAVE_SECONDS: Final = 2.0


class ControlPlane:
    """`start` before anything else, `close` at the end; `control_upstream` in between."""

    def __init__(
        self,
        settings: Settings,
        core: Core,
        directory: Directory,
        metrics_sockets: Sequence[socket.socket],
        find_request: FindRequest,
    ) -> None:
        """`metrics_sockets` listen already; they are served and closed here."""
        config = settings.config
        self._metrics_sockets = metrics_sockets
        self._counts = HttpCounts()
        self._config = config
        self._core = core
        self._wake = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._swept_ns = monotonic_ns()
        self._client = WorkerClient(config.health_check_timeout_secs)
        intervals = ProbeIntervals.of(config.health_check_interval_secs, config.worker_startup_check_interval)
        schedule = ProbeSchedule(intervals, random.Random(config.seed))
        drain_ns = int(config.shutdown_grace_period_secs * 1e9)
        self.registry = Registry(core, directory, drain_ns, indexed_text_bytes(config.index_memory))
        self._prober = Prober(config, core, self.registry, self._client, schedule, monotonic_ns, self._wake.set)
        interval_ns = None if config.disable_load_monitoring else int(config.load_monitor_interval * 1e9)
        self._loads = LoadMonitor(core, self.registry, self._client, interval_ns, monotonic_ns)
        # A connection for each rank's long poll.
        self._feed_client = WorkerClient(config.health_check_timeout_secs, max_connections=None)
        self._feeds = KvFeeds(core, self.registry, self._feed_client, config.kv_events, monotonic_ns)
        self.metrics = CollectorRegistry(auto_describe=False)
        self.metrics.register(
            RouterCollector(core, self.registry, self._prober, self._loads, self._feeds, self._counts, config)
        )
        ProcessCollector(registry=self.metrics)
        worker_api = WorkerApi(self.registry, self._prober, self._loads, self._feeds, monotonic_ns)
        debug_api = DebugApi(core, self.registry, monotonic_ns)
        fleet_api = FleetApi(self.registry, self._client, find_request, monotonic_ns)
        app = control_app(settings, core, self._counts, self.metrics, worker_api, fleet_api, debug_api)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=_UPSTREAM_KEEP_ALIVE_SECONDS,
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        self._metrics_runner = web.AppRunner(
            metrics_app(self.metrics), access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS
        )

    async def start(self, state: dict[str, Any] | None = None) -> None:
        """Begin to probe the start-up workers and to answer. `state`: of the control plane before, see `leave`."""
        await self._runner.setup()
        await self._metrics_runner.setup()
        for sock in self._metrics_sockets:
            await web.SockSite(self._metrics_runner, sock).start()
        if state is None:
            self._take_over()
        else:
            self._resume(state)
        known = {worker.spec.url for worker in self.registry}
        for url in map(parse_worker_url, self._config.worker_urls):
            if url not in known:
                self.registry.add(
                    WorkerSpec(url=url, api_key=self._config.api_key), monotonic_ns(), time_ns() // 1_000_000
                )
        for worker in self.registry:
            self._prober.watch(worker)
        self._loop_task = asyncio.create_task(self._run())

    def _take_over(self) -> None:
        """Of a region that goes on: its workers."""
        if self._core.region_found != "kept":
            return
        _, text = self._core.registry()
        try:
            records = decode(text)
        except ValueError as error:
            log.warning("%s: its workers cannot be read (%s)", self._config.region_file, error)
            records = []
        self.registry.take_over(self._core.take_over(), records, self._config.api_key, monotonic_ns())

    def _resume(self, state: dict[str, Any]) -> None:
        counts = self._counts
        counts.requests.update({(method, path): count for method, path, count in state["http_requests"]})
        counts.responses.update({(status, path): count for status, path, count in state["http_responses"]})
        self._prober.checks = {True: state["checks"][0], False: state["checks"][1]}
        registry = self.registry
        registry.retired_selections = {(model, policy): count for model, policy, count in state["retired_selections"]}
        self._core.learn_models(state["models"])
        registry.resume(map(worker_of, state["workers"]))

    async def leave(self) -> dict[str, Any]:
        """End, and say what the control plane that comes after this one in this process must know."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        deadline_ns = monotonic_ns() + int(_LEAVE_SECONDS * 1e9)
        while self._counts.running and monotonic_ns() < deadline_ns:  # noqa: ASYNC110 (once in a router's life)
            await asyncio.sleep(0.01)
        await self._prober.close()
        await self._loads.close()
        await self._feeds.close()
        registry = self.registry
        return {
            "http_requests": [(*key, count) for key, count in self._counts.requests.items()],
            "http_responses": [(*key, count) for key, count in self._counts.responses.items()],
            "checks": [self._prober.checks[True], self._prober.checks[False]],
            "retired_selections": [(*key, count) for key, count in registry.retired_selections.items()],
            "models": sorted({series.model for series in self._core.series()}),
            "workers": [state_of(worker) for worker in registry],
        }

    def _publish(self) -> None:
        self.registry.publish()
        if self._config.region_file is None or not self.registry.changed:
            return
        self.registry.changed = False
        try:
            self._core.publish_registry(encode(self.registry.records(self._config.api_key)))
        except MemoryError as error:
            log.warning("the registry is too long for the region: it will not be taken over whole (%s)", error)

    async def control_upstream(self) -> socket.socket:
        """A socket whose other end is the control app."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        await self.accept(theirs)
        return ours

    async def accept(self, sock: socket.socket) -> None:
        """Answer on a socket whose other end asks."""
        assert self._runner.server is not None, "start() comes first"
        await asyncio.get_running_loop().connect_accepted_socket(self._runner.server, sock)

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        await self._prober.close()
        await self._loads.close()
        await self._feeds.close()
        await self._feed_client.close()
        await self._metrics_runner.cleanup()
        await self._runner.cleanup()
        await self._client.close()

    async def _run(self) -> None:
        while True:
            try:
                self._tick()
            except Exception:  # whatever it was, workers must go on being probed
                log.exception("a tick of the control plane failed")
            due_ns = self._prober.next_due_ns()
            until_due = TICK_SECONDS if due_ns is None else (due_ns - monotonic_ns()) / 1e9
            self._wake.clear()
            try:
                async with asyncio.timeout(max(0.001, min(TICK_SECONDS, until_due))):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _tick(self) -> None:
        now_ns = monotonic_ns()
        for worker in self.registry.settle(now_ns):
            self._prober.forget(worker)
        self._prober.start_due()
        self._loads.start_due()
        self._feeds.start_due()
        self._sweep_index(now_ns)
        self._publish()

    def _sweep_seconds(self, now_ns: int) -> float:
        forgot_ns = self.registry.forgot_ns
        seconds = self._config.eviction_interval_secs
        if forgot_ns is None or (now_ns - forgot_ns) / 1e9 > _SWEEP_AFTER_LOSS_SECONDS + 2 * TICK_SECONDS:
            return seconds
        return min(seconds, _SWEEP_AFTER_LOSS_SECONDS)

    def _sweep_index(self, now_ns: int) -> None:
        """The whole index once per `eviction_interval_secs`, in slices of a millisecond at most."""
        elapsed = (now_ns - self._swept_ns) / 1e9
        if elapsed >= TICK_SECONDS:
            self._swept_ns = now_ns
            share = min(1.0, elapsed / self._sweep_seconds(now_ns))
            self._core.evict(now_ns, int(self._config.index_memory / _BUCKET_BYTES * share) + 1)
