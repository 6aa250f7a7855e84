"""Asks workers how they are, tells the core, and logs what changed. When to ask is `ProbeSchedule`'s decision."""

import asyncio
import logging
from collections.abc import Callable

from warmroute._core import Core
from warmroute.config import RouterConfig
from warmroute.control.probe_schedule import ProbeResult, ProbeSchedule
from warmroute.control.worker_client import WorkerClient, WorkerUnreachable
from warmroute.control.workers import Registry, Worker

log = logging.getLogger(__name__)


class Prober:
    """Owns the probes in flight and what was said about workers that do not answer.

    `clock`: CLOCK_MONOTONIC in ns. `wake`: called when a probe has ended, so that the next one may be due earlier.
    """

    def __init__(
        self,
        config: RouterConfig,
        core: Core,
        registry: Registry,
        client: WorkerClient,
        schedule: ProbeSchedule,
        clock: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._core = core
        self._registry = registry
        self._client = client
        self._schedule = schedule
        self._clock = clock
        self._wake = wake
        self._tasks: set[asyncio.Task[None]] = set()
        self._reminded_ns: dict[str, int] = {}  # worker id -> when the log last said that it does not answer
        self.checks = {True: 0, False: 0}
        """Probes by whether they succeeded."""

    def watch(self, worker: Worker) -> None:
        """Probe it at once and from now on."""
        self._schedule.add(worker.worker_id, self._clock())
        self._wake()

    def forget(self, worker: Worker) -> None:
        self._schedule.remove(worker.worker_id)
        self._reminded_ns.pop(worker.worker_id, None)

    def start_due(self) -> None:
        """Start the probes that are due, and those that failed requests ask for."""
        now_ns = self._clock()
        for head in self._core.take_probe_requests():
            worker = self._registry.of_head(head)
            if worker is not None and self._is_checked(worker):
                self._schedule.request(worker.worker_id, now_ns)
        for worker_id in self._schedule.take_due(now_ns):
            worker = self._registry.worker(worker_id)
            if worker is None:
                self._schedule.remove(worker_id)
                continue
            task = asyncio.create_task(self._probe(worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def next_due_ns(self) -> int | None:
        """When `start_due` has something to do again, as far as is known now."""
        return self._schedule.next_due_ns()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _probe(self, worker: Worker) -> None:
        refused, ok = False, False
        try:
            await self._ask(worker)
            ok, worker.failure = True, None
        except WorkerUnreachable as error:
            refused, worker.failure = error.refused, str(error)
        except (MemoryError, ValueError) as error:  # the core has no room for it, or cannot take what it says
            worker.failure = f"it cannot be taken in: {error}"
        except Exception as error:  # a defect of ours must not end the probing of this worker
            worker.failure = repr(error)
            log.exception("worker %s: the probe failed in an unforeseen way", worker.spec.url)
        worker.lost |= refused
        self.checks[ok] += 1
        if self._registry.worker(worker.worker_id) is None:
            return  # it was removed in the meantime
        now_ns = self._clock()
        if worker.slots:
            for transition in self._core.observe_probe(worker.head, ok, now_ns):
                level = logging.INFO if transition.current in ("ready", "closed", "half_open") else logging.WARNING
                log.log(
                    level,
                    "worker %s: %s %s -> %s%s",
                    worker.spec.url,
                    transition.machine,
                    transition.previous,
                    transition.current,
                    f" ({worker.failure})" if worker.failure else "",
                )
        health = self._registry.health(worker)
        if health == "pending" and not ok:
            self._remind(worker, now_ns)
        result = ProbeResult(ok=ok, refused=refused, health=health, watch=self._is_checked(worker))
        self._schedule.finished(worker.worker_id, result, now_ns)
        self._wake()

    async def _ask(self, worker: Worker) -> None:
        """Raises WorkerUnreachable; MemoryError or ValueError when the core does not take the worker."""
        if self._is_checked(worker):
            await self._client.check(worker, self._config.health_check_endpoint)
        if worker.facts is None or worker.lost:
            facts = await self._client.identify(worker)
            self._registry.identified(worker, facts if self._config.dp_aware else facts.as_one_rank(), self._clock())

    def _is_checked(self, worker: Worker) -> bool:
        return not (self._config.disable_health_check or worker.spec.disable_health_check)

    def _remind(self, worker: Worker, now_ns: int) -> None:
        """Say why a worker is not there yet: at once, then once per `worker_startup_check_interval`."""
        waited_s = (now_ns - worker.registered_ns) / 1e9
        if not worker.overdue and waited_s > self._config.worker_startup_timeout_secs:
            worker.overdue = True
            log.error("worker %s: has not answered for %.0f s: %s", worker.spec.url, waited_s, worker.failure)
        last_ns = self._reminded_ns.get(worker.worker_id)
        if last_ns is None or now_ns - last_ns >= self._config.worker_startup_check_interval * 1e9:
            self._reminded_ns[worker.worker_id] = now_ns
            log.warning("worker %s: not ready after %.0f s: %s", worker.spec.url, waited_s, worker.failure)
