"""The registry with a real core: no sockets, time passed in."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest

from warmroute._core import Core, Lease, OutcomeKind
from warmroute.config import RouterConfig
from warmroute.control.worker_facts import WorkerFacts
from warmroute.control.worker_spec import WorkerSpec
from warmroute.control.workers import AlreadyRegistered, Registry, Worker
from warmroute.directory import Directory
from warmroute.engine import build_core

SECOND = 1_000_000_000
DRAIN_NS = 5 * SECOND
FACTS = WorkerFacts(("m", "alias"), 2, 100_000, "sglang", 8192)


class Fleet:
    def __init__(self) -> None:
        self.core: Core = build_core(RouterConfig(seed=1, hash_seed=2, index_memory=1 << 20))
        self.directory = Directory()
        self.registry = Registry(self.core, self.directory, DRAIN_NS, indexed_bytes=1_000_000)

    def ready(self, url: str, facts: WorkerFacts = FACTS) -> Worker:
        worker = self.registry.add(WorkerSpec(url), now_ns=0, unix_ms=1)
        self.registry.identified(worker, facts, 0)
        for _ in range(2):
            self.core.observe_probe(worker.head, True, 0)
        return worker

    def lease(self, now_ns: int) -> Lease:
        request = self.core.read(b"/generate", b"", b'{"text": "hello"}', now_ns)
        lease = self.core.select(request, now_ns, False)
        assert lease is not None
        return lease


def release(lease: Lease, now_ns: int) -> None:
    lease.release(OutcomeKind.ANSWERED, 200, now_ns, None, None, -1, -1, -1, now_ns)


def test_worker_has_no_slots_before_it_told_what_it_serves() -> None:
    fleet = Fleet()
    worker = fleet.registry.add(WorkerSpec("http://w:1"), 0, 1)
    assert (worker.slots, fleet.registry.status(worker), fleet.registry.load(worker)) == ((), "pending", 0)
    assert fleet.core.targets() == []
    fleet.registry.identified(worker, FACTS, 0)
    assert [target.rank for target in fleet.registry.targets(worker)] == [0, 1]
    assert fleet.registry.status(worker) == "pending"  # nothing is born healthy
    assert [fleet.directory.address(slot) for slot in worker.slots] == [worker.address] * 2
    assert fleet.registry.of_head(worker.head) is worker


def test_draining_worker_gets_nothing_and_goes_when_it_is_idle() -> None:
    fleet = Fleet()
    worker = fleet.ready("http://w:1")
    lease = fleet.lease(0)
    fleet.registry.drain(worker, SECOND)
    assert fleet.registry.status(worker) == "draining"
    assert fleet.core.select(fleet.core.read(b"/generate", b"", b'{"text": "x"}', 0), 0, False) is None
    assert fleet.registry.settle(2 * SECOND) == []
    assert fleet.directory.address(worker.slots[0]) is not None
    fleet.registry.drain(worker, 3 * SECOND)  # a second DELETE does not prolong it
    assert worker.drain_deadline_ns == SECOND + DRAIN_NS
    release(lease, 3 * SECOND)
    assert fleet.registry.settle(3 * SECOND) == [worker]
    assert fleet.registry.worker(worker.worker_id) is None
    assert fleet.core.targets() == []
    assert fleet.directory.models() == []
    assert fleet.registry.retired_selections == {("m", "cache_aware"): 1}
    fleet.core.check_integrity()


def test_draining_has_an_end() -> None:
    fleet = Fleet()
    worker = fleet.ready("http://w:1")
    lease = fleet.lease(0)
    fleet.registry.drain(worker, 0)
    assert fleet.registry.settle(DRAIN_NS - 1) == []
    assert fleet.registry.settle(DRAIN_NS) == [worker]
    successor = fleet.ready("http://w:1")
    release(lease, DRAIN_NS)  # of slots that are somebody else's by now
    assert fleet.registry.load(successor) == 0
    fleet.core.check_integrity()


def test_worker_that_was_never_reached_goes_at_once() -> None:
    fleet = Fleet()
    worker = fleet.registry.add(WorkerSpec("http://w:1"), 0, 1)
    fleet.registry.drain(worker, 0)
    fleet.registry.identified(worker, FACTS, 0)  # a probe that was under way
    assert fleet.registry.settle(0) == [worker]
    fleet.registry.identified(worker, FACTS, 0)
    assert fleet.core.targets() == []


def test_url_is_taken_until_its_worker_drains() -> None:
    fleet = Fleet()
    worker = fleet.ready("http://w:1")
    with pytest.raises(AlreadyRegistered) as caught:
        fleet.registry.add(WorkerSpec("http://w:1"), 0, 1)
    assert caught.value.worker is worker
    fleet.registry.drain(worker, 0)
    assert fleet.registry.add(WorkerSpec("http://w:1"), 0, 2).worker_id != worker.worker_id


def test_lost_worker_has_lost_its_cache() -> None:
    fleet = Fleet()
    worker = fleet.ready("http://w:1", WorkerFacts(("m",), 1, 100_000, "sglang", None))
    text = b'{"text": "%b"}' % (b"remember this " * 100)
    assert fleet.core.select(fleet.core.read(b"/generate", b"", text, 0), 0, False) is not None
    release(fleet.lease(0), 0)

    def known() -> int:
        return sum(target.index_characters for target in fleet.registry.targets(worker))

    fleet.registry.identified(worker, FACTS_OF_ONE, SECOND)
    assert known() > 0  # asked again, but it never went away
    worker.lost = True
    fleet.registry.identified(worker, FACTS_OF_ONE, SECOND)
    assert known() == 0
    assert not worker.lost


FACTS_OF_ONE = WorkerFacts(("m", "new-alias"), 1, 100_000, "sglang", None)


def test_more_ranks_than_slots() -> None:
    fleet = Fleet()
    huge = WorkerFacts(("m",), 1024, 0, "sglang", None)
    workers = [fleet.ready(f"http://w:{port}", huge) for port in range(1, 5)]
    one_more = fleet.registry.add(WorkerSpec("http://w:9"), 0, 1)
    with pytest.raises(MemoryError):
        fleet.registry.identified(one_more, huge, 0)
    assert one_more.slots == ()
    fleet.registry.drain(workers[0], 0)
    fleet.registry.settle(0)
    fleet.registry.identified(one_more, huge, 0)
    assert len(one_more.slots) == 1024


def test_two_thousand_registrations_leave_nothing() -> None:
    fleet = Fleet()
    for round_ in range(2000):
        worker = fleet.ready(f"http://w:{round_ % 60000 + 1}")
        fleet.registry.drain(worker, 0)
        fleet.registry.settle(0)
    assert len(fleet.registry) == 0
    assert fleet.core.targets() == []
    assert fleet.directory.models() == []
    fleet.core.check_integrity()


def test_ten_thousand_workers_that_came_and_went_leave_no_memory_behind() -> None:
    fleet = Fleet()

    def cycles(count: int, first: int) -> int:
        for number in range(first, first + count):
            worker = fleet.ready(f"http://w{number}:1")
            lease = fleet.core.select(fleet.core.read(b"/generate", b"", b'{"text": "%d"}' % number, 0), 0, False)
            assert lease is not None
            release(lease, 0)
            fleet.registry.drain(worker, 0)
            assert fleet.registry.settle(0) == [worker]
        gc.collect()
        return resident_bytes()

    before = cycles(10_000, 0)  # which has used every page of the index
    grown = cycles(10_000, 10_000) - before
    assert grown < 1 << 20, f"{grown / 10_000:.0f} bytes a worker"
    assert (len(fleet.registry), fleet.core.targets(), fleet.directory.models()) == (0, [], [])
    fleet.core.check_integrity()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_index_that_is_too_small_for_the_fleet_is_told(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet()
    worker = fleet.ready("http://w:1", replace(FACTS, kv_capacity_tokens=100_000))
    assert "raise --index-memory" not in caplog.text
    fleet.registry.identified(worker, replace(FACTS, kv_capacity_tokens=150_000), SECOND)
    assert "hold about 1 MB of text, the prefix index knows 1 MB: raise --index-memory" in caplog.text
