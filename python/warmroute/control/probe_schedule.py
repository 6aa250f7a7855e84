"""When to probe which worker. Pure: time comes in, randomness comes from the generator that was handed in.

* a new worker, and one whose request just failed: at once;
* not ready: every `retry_ns` at most, so that a restarted worker has traffic within 2 s of answering;
* between the successes that make it ready, and after a refusal while it is ready: `confirm_ns`;
* ready: every `interval_ns`.
At most `max_in_flight` probes at once, the longest overdue first.
"""

import random
from dataclasses import dataclass
from typing import Final

MAX_IN_FLIGHT: Final = 128
CONFIRM_NS: Final = 100_000_000
LONGEST_RETRY_NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class ProbeIntervals:
    """`pending_retry_ns`: of a worker that never answered; `retry_ns`: of one that is unhealthy or under suspicion."""

    interval_ns: int
    retry_ns: int
    pending_retry_ns: int

    @classmethod
    def of(cls, health_check_interval_secs: float, worker_startup_check_interval: float) -> "ProbeIntervals":
        interval_ns = int(health_check_interval_secs * 1e9)
        retry_ns = min(interval_ns, LONGEST_RETRY_NS)
        return cls(interval_ns, retry_ns, min(retry_ns, int(worker_startup_check_interval * 1e9)))


@dataclass(frozen=True, slots=True)
class ProbeResult:
    ok: bool
    refused: bool
    """Nobody listens there: more probes would say the same, so suspicion needs no time."""
    health: str
    """The core's verdict after this probe: pending, ready or unhealthy."""
    watch: bool
    """False: once it is ready it is not checked any more (health checks are off)."""


@dataclass(slots=True)
class _Entry:
    due_ns: int | None
    in_flight: bool = False
    once_more: bool = False


class ProbeSchedule:
    """Owns the due times. A worker is in flight from `take_due` to `finished`."""

    def __init__(self, intervals: ProbeIntervals, generator: random.Random, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._intervals = intervals
        self._generator = generator
        self._max_in_flight = max_in_flight
        self._entries: dict[str, _Entry] = {}
        self._in_flight = 0

    def add(self, worker_id: str, now_ns: int) -> None:
        self._entries[worker_id] = _Entry(now_ns)

    def remove(self, worker_id: str) -> None:
        """A probe in flight may still be `finished`."""
        entry = self._entries.pop(worker_id, None)
        if entry is not None and entry.in_flight:
            self._in_flight -= 1

    def request(self, worker_id: str, now_ns: int) -> None:
        """Something spoke against the worker: probe it at once, or once more if the probe in flight began before."""
        entry = self._entries.get(worker_id)
        if entry is None:
            return
        if entry.in_flight:
            entry.once_more = True
        else:
            entry.due_ns = now_ns

    def take_due(self, now_ns: int) -> list[str]:
        """The workers to probe now; they are in flight from here on."""
        due = sorted(
            (entry.due_ns, worker_id)
            for worker_id, entry in self._entries.items()
            if entry.due_ns is not None and entry.due_ns <= now_ns and not entry.in_flight
        )
        taken = [worker_id for _, worker_id in due[: self._max_in_flight - self._in_flight]]
        for worker_id in taken:
            self._entries[worker_id].in_flight = True
        self._in_flight += len(taken)
        return taken

    def finished(self, worker_id: str, result: ProbeResult, now_ns: int) -> None:
        """What the probe found; sets when the next one is due. Does nothing for a worker that was removed."""
        entry = self._entries.get(worker_id)
        if entry is None or not entry.in_flight:
            return
        entry.in_flight = False
        self._in_flight -= 1
        if entry.once_more:
            entry.once_more = False
            entry.due_ns = now_ns
            return
        delay_ns = self._delay_ns(result)
        entry.due_ns = None if delay_ns is None else now_ns + delay_ns

    def next_due_ns(self) -> int | None:
        """When `take_due` has something again; None: when something else happens first."""
        if self._in_flight >= self._max_in_flight:
            return None
        return min((e.due_ns for e in self._entries.values() if e.due_ns is not None and not e.in_flight), default=None)

    def _delay_ns(self, result: ProbeResult) -> int | None:
        intervals, ready = self._intervals, result.health == "ready"
        if result.ok:
            if not ready:
                return CONFIRM_NS
            return int(intervals.interval_ns * self._generator.uniform(0.9, 1.1)) if result.watch else None
        if ready:
            return min(CONFIRM_NS, intervals.retry_ns) if result.refused else intervals.retry_ns
        # Jitter downwards only: the longest wait is part of the promise above.
        longest = intervals.pending_retry_ns if result.health == "pending" else intervals.retry_ns
        return int(longest * self._generator.uniform(0.75, 1.0))
