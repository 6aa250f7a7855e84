"""The registry: which workers there are, what they serve, which slots they hold.

Owns `Worker`, and is the only writer of the directory and the only caller of the core's worker verbs. Load, health and
breaker are the core's: nothing here copies them. A worker has no slots until it has told what it serves; from then on
its health is the core's health machine, fed by the prober.
"""

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from warmroute._core import Core, TargetInfo
from warmroute.control.registry_text import Key, Record
from warmroute.control.worker_facts import WorkerFacts
from warmroute.control.worker_id import new_worker_id
from warmroute.control.worker_spec import WorkerSpec
from warmroute.directory import Directory, WorkerAddress

log = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Of English text, about."""

Status = Literal["pending", "ready", "not_ready", "failed", "draining"]


class AlreadyRegistered(Exception):  # noqa: N818
    """The URL belongs to `worker`, which is not leaving."""

    def __init__(self, worker: "Worker") -> None:
        super().__init__(worker.spec.url)
        self.worker = worker


@dataclass(slots=True)
class Worker:
    """One registration, from POST to gone. Only the registry and the prober write here."""

    worker_id: str
    spec: WorkerSpec
    address: WorkerAddress
    registered_ns: int
    registered_unix_ms: int
    facts: WorkerFacts | None = None
    slots: tuple[int, ...] = ()
    """The ranks in order; the first is the head."""
    lost: bool = False
    """It refused a connection since it was last asked what it serves: what answers next may be another process."""
    failure: str | None = None
    """Why the last probe failed; None: it did not."""
    overdue: bool = False
    """It has not answered for `worker_startup_timeout_secs`. It is still asked."""
    drain_deadline_ns: int | None = None
    lives: int = 0
    """How often it came back after it was lost, perhaps as another process."""

    @property
    def head(self) -> int:
        """Only of a worker with slots."""
        return self.slots[0]

    @property
    def is_draining(self) -> bool:
        return self.drain_deadline_ns is not None

    def __repr__(self) -> str:
        return f"<Worker {self.spec.url} [{self.worker_id}, slots {list(self.slots)}]>"


class Registry:
    def __init__(self, core: Core, directory: Directory, drain_ns: int, indexed_bytes: int) -> None:
        """`drain_ns`: how long a worker that was told to go may finish its requests. `indexed_bytes`: of text, for
        which the prefix index has room."""
        self._core = core
        self._directory = directory
        self._drain_ns = drain_ns
        self._indexed_bytes = indexed_bytes
        self._workers: dict[str, Worker] = {}
        self.changed = False
        """Since the registry was last published: who is there, or in which slots."""
        self.forgot_ns: int | None = None
        """When a worker lost its cache last."""
        self.retired_selections: dict[tuple[str, str], int] = {}
        """(model, policy) -> selections of workers that are gone, so that sums over the fleet never fall."""

    # -- who is there

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def worker(self, worker_id: str) -> Worker | None:
        return self._workers.get(worker_id)

    def of_head(self, head: int) -> Worker | None:
        return next((worker for worker in self._workers.values() if worker.slots and worker.head == head), None)

    def targets(self, worker: Worker) -> list[TargetInfo]:
        """Its ranks as they stand now; empty before it has told what it serves."""
        return [self._core.target(slot) for slot in worker.slots]

    async def index_entries(self, worker: Worker) -> list[int]:
        """Blocks of the prefix index that each of its ranks holds. Walks the index: beside the loop."""
        slots = worker.slots  # as they are now: there may be more of them afterwards
        entries = await asyncio.to_thread(self._core.index_entries)
        return [entries[slot] for slot in slots]

    def load(self, worker: Worker) -> int:
        """Requests in flight, over all ranks."""
        return sum(self._core.load(slot) for slot in worker.slots)

    def health(self, worker: Worker) -> str:
        """pending, ready or unhealthy."""
        return self._core.target(worker.head).health if worker.slots else "pending"

    def is_available(self, worker: Worker) -> bool:
        return any(target.available for target in self.targets(worker))

    def status(self, worker: Worker) -> Status:
        """In the words of sglang-router's worker API. `failed` is no end: such a worker is still probed."""
        if worker.is_draining:
            return "draining"
        health = self.health(worker)
        if health == "ready":
            return "ready"
        if health == "unhealthy":
            return "not_ready"
        return "failed" if worker.overdue else "pending"

    # -- what happens to them

    def add(self, spec: WorkerSpec, now_ns: int, unix_ms: int) -> Worker:
        """Raises AlreadyRegistered; a worker that is draining does not keep its URL from coming back."""
        for known in self._workers.values():
            if known.spec.url == spec.url and not known.is_draining:
                raise AlreadyRegistered(known)
        worker_id = new_worker_id(unix_ms, os.urandom(10))
        address = WorkerAddress.of(worker_id, spec.url, spec.api_key)
        worker = Worker(worker_id, spec, address, registered_ns=now_ns, registered_unix_ms=unix_ms)
        self._workers[worker_id] = worker
        self.changed = True
        log.info("worker %s: registered as %s", spec.url, worker_id)
        return worker

    def take_over(self, heads: Iterable[int], records: Iterable[Record], router_key: str | None, now_ns: int) -> None:
        """The workers of the router that had the region before, whose `heads` are still in it. Each is asked anew what
        it serves, and keeps its slots, and with them what is known of its cache, if it has as many ranks as before."""
        left = set(heads)
        for record in records:
            if record.key == "own":
                log.warning("worker %s: had a key of its own, which is not kept: register it again", record.spec.url)
                continue
            spec = replace(record.spec, api_key=router_key if record.key == "router" else None)
            address = WorkerAddress.of(record.worker_id, spec.url, spec.api_key)
            worker = Worker(record.worker_id, spec, address, now_ns, record.registered_unix_ms)
            if record.slots and record.slots[0] in left:
                left.discard(record.slots[0])
                worker.slots = record.slots
            self._workers[worker.worker_id] = worker
            log.info("worker %s: taken over as %s", spec.url, worker.worker_id)
        for head in left:
            self._core.remove_worker(head)

    def resume(self, workers: Iterable[Worker]) -> None:
        """Workers as the control plane before this one knew them: the core has them, and the directory gets them."""
        for worker in workers:
            self._workers[worker.worker_id] = worker
            if worker.slots and worker.facts is not None:
                incarnations = [target.incarnation for target in self.targets(worker)]
                self._directory.put(worker.slots, worker.address, worker.facts.models, incarnations)
        self._directory.publish()

    def publish(self) -> None:
        """Tell the other processes who has gone; who has come they know already."""
        self._directory.publish()

    def records(self, router_key: str | None) -> list[Record]:
        """Of everybody but those that are leaving."""

        def key(worker: Worker) -> Key:
            if worker.spec.api_key is None:
                return "none"
            return "router" if worker.spec.api_key == router_key else "own"

        return [
            Record(w.worker_id, replace(w.spec, api_key=None), key(w), w.registered_unix_ms, w.slots)
            for w in self
            if not w.is_draining
        ]

    def identified(self, worker: Worker, facts: WorkerFacts, now_ns: int) -> None:
        """It told what it serves: for the first time, or again after it was lost.

        Raises MemoryError when the core has no room for it, ValueError when it says what cannot be.
        """
        if worker.worker_id not in self._workers or worker.is_draining:
            return
        if worker.slots and len(worker.slots) != facts.dp_size:
            log.warning("worker %s: has %d dp ranks now, had %d", worker.spec.url, facts.dp_size, len(worker.slots))
            self._free(worker)
        asked = worker.spec.policy
        if not worker.slots:
            slots = self._core.add_worker(facts.models, facts.dp_size, facts.kv_capacity_tokens, asked, now_ns)
            worker.slots = tuple(slots)
            self.changed = True
        else:
            if facts != worker.facts:
                self._core.update_worker(worker.head, facts.models, facts.kv_capacity_tokens, asked, now_ns)
            if worker.lost:
                worker.lives += 1
                self.forget_cache(worker, now_ns)
        incarnations = [target.incarnation for target in self.targets(worker)]
        self._directory.put(worker.slots, worker.address, facts.models, incarnations)
        # Before a probe can make it ready: whoever is told one of its slots must find it.
        self._directory.publish()
        if facts != worker.facts:
            log.info(
                "worker %s: serves %s (%s), %d ranks with %d KV tokens each",
                worker.spec.url,
                ", ".join(facts.models),
                facts.runtime,
                facts.dp_size,
                facts.kv_capacity_tokens,
            )
        if facts != worker.facts:
            worker.facts = facts
            self._warn_of_a_small_index()
            self._warn_of_another_policy(worker)
        worker.lost = False

    def _warn_of_a_small_index(self) -> None:
        """What the workers can hold and the index cannot name will not be found again."""
        known = [worker.facts for worker in self if worker.facts is not None]
        held = sum(facts.kv_capacity_tokens * facts.dp_size for facts in known) * BYTES_PER_TOKEN
        if held > self._indexed_bytes:
            log.warning(
                "the workers' caches hold about %d MB of text, the prefix index knows %d MB: raise --index-memory",
                held // 1_000_000,
                self._indexed_bytes // 1_000_000,
            )

    def _warn_of_another_policy(self, worker: Worker) -> None:
        asked = worker.spec.policy
        effective = self.policy(worker)
        if asked is not None and asked != effective:
            log.warning(
                "worker %s: its label asks for policy %s, but its model has %s, as its first worker wanted",
                worker.spec.url,
                asked,
                effective,
            )

    def policy(self, worker: Worker) -> str | None:
        """By which requests for its model are routed; None: it has not told what it serves."""
        return self._core.policy_of_model(worker.facts.models[0]) if worker.facts else None

    def forget_cache(self, worker: Worker, now_ns: int) -> None:
        """It restarted or was flushed."""
        if worker.slots:
            self._core.restart_worker(worker.head, now_ns)
            self.forgot_ns = now_ns

    def drain(self, worker: Worker, now_ns: int) -> None:
        """No new requests; `settle` removes it when it is idle or out of time. A second call changes nothing."""
        if worker.is_draining:
            return
        worker.drain_deadline_ns = now_ns + self._drain_ns
        self.changed = True
        if worker.slots:
            self._core.drain_worker(worker.head)
        log.info("worker %s: draining, %d requests in flight", worker.spec.url, self.load(worker))

    def settle(self, now_ns: int) -> list[Worker]:
        """Remove the draining workers that are idle or out of time; which ones."""
        gone = []
        for worker in self:
            if worker.drain_deadline_ns is None:
                continue
            load = self.load(worker)
            if load and now_ns < worker.drain_deadline_ns:
                continue
            # What still runs then goes on: a removed worker's leases release without effect.
            log.info("worker %s: removed%s", worker.spec.url, f", {load} requests go on" if load else "")
            self._free(worker)
            del self._workers[worker.worker_id]
            gone.append(worker)
        return gone

    def _free(self, worker: Worker) -> None:
        if not worker.slots:
            return
        if worker.facts is not None:  # else it was taken over, and has not answered since
            key = worker.facts.models[0], self._core.policy_of_model(worker.facts.models[0])
            selections = sum(target.selections for target in self.targets(worker))
            self.retired_selections[key] = self.retired_selections.get(key, 0) + selections
        self._directory.remove(worker.slots)
        self._core.remove_worker(worker.head)
        worker.slots = ()
        self.changed = True
