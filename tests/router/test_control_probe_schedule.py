"""When workers are probed: no clock, no sockets. Times are in milliseconds here."""

import random

import pytest

from warmroute.control.probe_schedule import MAX_IN_FLIGHT, ProbeIntervals, ProbeResult, ProbeSchedule

MS = 1_000_000
OK_READY = ProbeResult(ok=True, refused=False, health="ready", watch=True)
OK_PENDING = ProbeResult(ok=True, refused=False, health="pending", watch=True)
OK_UNHEALTHY = ProbeResult(ok=True, refused=False, health="unhealthy", watch=True)
FAILED_READY = ProbeResult(ok=False, refused=False, health="ready", watch=True)
REFUSED_READY = ProbeResult(ok=False, refused=True, health="ready", watch=True)
FAILED_PENDING = ProbeResult(ok=False, refused=True, health="pending", watch=True)
FAILED_UNHEALTHY = ProbeResult(ok=False, refused=True, health="unhealthy", watch=True)
UNWATCHED = ProbeResult(ok=True, refused=False, health="ready", watch=False)


def schedule(
    interval_secs: float = 60.0, startup_secs: float = 30.0, max_in_flight: int = MAX_IN_FLIGHT
) -> ProbeSchedule:
    return ProbeSchedule(ProbeIntervals.of(interval_secs, startup_secs), random.Random(1), max_in_flight)


DELAYS = [
    # result, health check interval, start-up check interval, earliest and latest next probe in ms
    (OK_READY, 60.0, 30.0, 54_000, 66_000),
    (OK_READY, 0.2, 30.0, 180, 220),
    (OK_PENDING, 60.0, 30.0, 100, 100),
    (OK_UNHEALTHY, 60.0, 30.0, 100, 100),
    (FAILED_READY, 60.0, 30.0, 1000, 1000),
    (FAILED_READY, 0.5, 30.0, 500, 500),
    (REFUSED_READY, 60.0, 30.0, 100, 100),
    (REFUSED_READY, 0.05, 30.0, 50, 50),
    (FAILED_PENDING, 60.0, 30.0, 750, 1000),
    (FAILED_PENDING, 60.0, 0.2, 150, 200),
    (FAILED_UNHEALTHY, 60.0, 0.2, 750, 1000),
    (FAILED_UNHEALTHY, 0.4, 30.0, 300, 400),
]


@pytest.mark.parametrize(("result", "interval", "startup", "earliest", "latest"), DELAYS)
def test_delay(result: ProbeResult, interval: float, startup: float, earliest: int, latest: int) -> None:
    seen = set()
    one = schedule(interval, startup)
    one.add("w", 0)
    now = 0
    for _ in range(50):
        assert one.take_due(now) == ["w"]
        one.finished("w", result, now)
        due = one.next_due_ns()
        assert due is not None
        assert earliest * MS <= due - now <= latest * MS
        seen.add(due - now)
        assert one.take_due(due - 1) == []
        now = due
    assert len(seen) == 1 or earliest < latest  # where there is jitter, it varies
    assert (len(seen) > 10) == (earliest < latest)


def test_new_worker_is_due_at_once_and_only_once() -> None:
    one = schedule()
    one.add("w", 7)
    assert one.next_due_ns() == 7
    assert one.take_due(6) == []
    assert one.take_due(7) == ["w"]
    assert one.take_due(8) == []
    assert one.next_due_ns() is None


def test_request_brings_the_next_probe_forward() -> None:
    one = schedule()
    one.add("w", 0)
    one.take_due(0)
    one.finished("w", OK_READY, 0)
    one.request("w", 5)
    assert one.take_due(5) == ["w"]
    # What failed while the probe was under way may have failed after the worker answered it: ask again.
    one.request("w", 6)
    assert one.take_due(7) == []
    one.finished("w", OK_READY, 8)
    assert one.take_due(8) == ["w"]
    one.finished("w", OK_READY, 9)
    assert one.take_due(10) == []
    one.request("unknown", 10)


def test_removed_in_flight() -> None:
    one = schedule(max_in_flight=1)
    one.add("a", 0)
    one.add("b", 1)
    assert one.take_due(1) == ["a"]
    one.remove("a")
    assert one.take_due(1) == ["b"]
    one.finished("a", OK_READY, 2)  # comes late, counts nothing
    assert one.take_due(2) == []
    one.finished("b", OK_PENDING, 3)
    assert one.next_due_ns() == 3 + 100 * MS


def test_at_most_so_many_at_once_the_longest_overdue_first() -> None:
    one = schedule(max_in_flight=3)
    for index in range(10):
        one.add(f"w{index}", 100 - index)
    assert one.take_due(1000) == ["w9", "w8", "w7"]
    assert one.take_due(1000) == []
    assert one.next_due_ns() is None
    one.finished("w8", OK_READY, 1000)
    assert one.next_due_ns() == 94
    assert one.take_due(1000) == ["w6"]
    assert MAX_IN_FLIGHT == 128


def test_unwatched_worker_is_left_alone_once_it_is_ready() -> None:
    one = schedule()
    one.add("w", 0)
    one.take_due(0)
    one.finished("w", UNWATCHED, 0)
    assert one.next_due_ns() is None
    assert one.take_due(10**18) == []


def test_restarted_worker_is_ready_within_two_seconds() -> None:
    """However unlucky the jitter: the longest wait, then one more good probe."""
    for seed in range(200):
        one = ProbeSchedule(ProbeIntervals.of(60.0, 30.0), random.Random(seed))
        one.add("w", 0)
        one.take_due(0)
        one.finished("w", FAILED_UNHEALTHY, 0)
        due = one.next_due_ns()
        assert due is not None
        one.take_due(due)
        one.finished("w", OK_UNHEALTHY, due)
        second = one.next_due_ns()
        assert second is not None
        assert second <= 1_100 * MS
