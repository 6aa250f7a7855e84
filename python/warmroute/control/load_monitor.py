"""Asks workers what each of their ranks has to do, for people, metrics and the size of each rank's cache.

Decisions read what this router has in flight, which is exact and never late; what workers say is seconds old.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from warmroute._core import Core
from warmroute.control.worker_client import WorkerClient, WorkerUnreachable
from warmroute.control.worker_facts import RankLoad
from warmroute.control.workers import Registry, Worker

log = logging.getLogger(__name__)

MAX_IN_FLIGHT: Final = 64
_STALE_INTERVALS: Final = 3
"""What is older than that many intervals is not shown: it would look like a load that does not move."""


@dataclass(frozen=True, slots=True)
class _Seen:
    at_ns: int
    loads: tuple[RankLoad, ...]


class LoadMonitor:
    """Owns what workers said last. `interval_ns`: None: nobody is asked. `clock`: CLOCK_MONOTONIC in ns."""

    def __init__(
        self, core: Core, registry: Registry, client: WorkerClient, interval_ns: int | None, clock: Callable[[], int]
    ) -> None:
        self._core = core
        self._registry = registry
        self._client = client
        self._interval_ns = interval_ns
        self._clock = clock
        self._due_ns: dict[str, int] = {}
        self._seen: dict[str, _Seen] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.polls = {True: 0, False: 0}
        """By whether the worker told."""

    def load(self, worker: Worker, rank: int) -> RankLoad | None:
        """None: unknown."""
        seen = self._seen.get(worker.worker_id)
        if seen is None or self._interval_ns is None:
            return None
        if self._clock() - seen.at_ns > _STALE_INTERVALS * self._interval_ns:
            return None
        return next((load for load in seen.loads if load.rank == rank), None)

    def start_due(self) -> None:
        """Ask whom it is time to ask: everybody that gets requests, at once when it begins to."""
        if self._interval_ns is None:
            return
        now_ns = self._clock()
        present = {worker.worker_id for worker in self._registry}
        for worker_id in self._due_ns.keys() - present:
            del self._due_ns[worker_id]
            self._seen.pop(worker_id, None)
        for worker in self._registry:
            is_due = now_ns >= self._due_ns.get(worker.worker_id, 0) and worker.worker_id not in self._tasks
            if is_due and self._registry.health(worker) == "ready" and len(self._tasks) < MAX_IN_FLIGHT:
                self._due_ns[worker.worker_id] = now_ns + self._interval_ns
                self._tasks[worker.worker_id] = asyncio.create_task(self._ask(worker))

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _ask(self, worker: Worker) -> None:
        told = False
        try:
            loads = await self._client.rank_loads(worker)
            told = True
            self._take(worker, loads)
        except WorkerUnreachable as error:
            log.debug("worker %s: its loads are unknown: %s", worker.spec.url, error)
        except Exception:  # a defect of ours must not end the asking
            log.exception("worker %s: its loads cannot be taken in", worker.spec.url)
        finally:
            self.polls[told] += 1
            self._tasks.pop(worker.worker_id, None)

    def _take(self, worker: Worker, loads: tuple[RankLoad, ...]) -> None:
        if self._registry.worker(worker.worker_id) is None or len(worker.slots) != len(loads):
            return  # gone, or it has other ranks than it said: nothing here would be of the right rank
        self._seen[worker.worker_id] = _Seen(self._clock(), loads)
        for load in loads:
            if load.kv_capacity_tokens and load.rank < len(worker.slots):
                self._core.set_kv_capacity(worker.slots[load.rank], load.kv_capacity_tokens)
