"""How many requests may run at once, how many may wait for their turn, and how fast they may come.

Whoever waits is let in in the order of arrival. Decisions only: time comes in, and what follows is told to the waiters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute.config import RouterConfig

BURST_SECONDS = 1.0
"""A rate limit lets in at once what it lets in during that time."""


class Waiter(Protocol):
    def admitted(self, now_ns: int) -> None:
        """Its turn has come."""

    def waited_too_long(self) -> None:
        """It is not in the queue any more."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    max_concurrent: int | None
    queue_size: int
    queue_timeout_ns: int
    per_second: float | None

    @classmethod
    def of(cls, config: RouterConfig) -> AdmissionLimits | None:
        """None: nothing is limited."""
        concurrent = config.max_concurrent_requests if config.max_concurrent_requests > 0 else None
        if concurrent is None and config.rate_limit_tokens_per_second is None:
            return None
        timeout_ns = int(config.queue_timeout_secs * 1e9)
        return cls(concurrent, config.queue_size, timeout_ns, config.rate_limit_tokens_per_second)


class QueueFull(Exception):  # noqa: N818
    """Nobody may wait any more."""


class Admission:
    """`wake_later(seconds)`: to have `let_in` called then; at 0 soon, but not from within the call."""

    def __init__(self, limits: AdmissionLimits, wake_later: Callable[[float], object], now_ns: int) -> None:
        self._limits = limits
        self._wake_later = wake_later
        self._queue: OrderedDict[Waiter, int] = OrderedDict()
        """Waiter -> when it has waited for too long; in the order of arrival, so in this order, too."""
        self._tokens = self._most_tokens
        self._refilled_ns = now_ns
        self._running = self._let_in = self._rejected = 0

    def counts(self) -> tuple[int, int, int, int]:
        """(running, waiting, let in, rejected)"""
        return self._running, len(self._queue), self._let_in, self._rejected

    def enter(self, waiter: Waiter, now_ns: int) -> bool:
        """Whether it may run now; otherwise it waits. Raises QueueFull."""
        if not self._queue and self._take(now_ns):
            return True
        if len(self._queue) >= self._limits.queue_size:
            self._rejected += 1
            raise QueueFull
        self._queue[waiter] = now_ns + self._limits.queue_timeout_ns
        self._wait_for_token(now_ns)
        return False

    def leave(self) -> None:
        """One that ran has ended."""
        self._running -= 1
        if self._queue:
            self._wake_later(0)

    def withdraw(self, waiter: Waiter) -> None:
        """It does not wait any more, if it did."""
        self._queue.pop(waiter, None)

    def let_in(self, now_ns: int) -> None:
        """Those whose turn has come."""
        while self._queue and self._take(now_ns):
            waiter, _ = self._queue.popitem(last=False)
            waiter.admitted(now_ns)
        self._wait_for_token(now_ns)

    def expire(self, now_ns: int) -> None:
        """Those who have waited for too long."""
        while self._queue:
            waiter = next(iter(self._queue))
            if self._queue[waiter] > now_ns:
                return
            del self._queue[waiter]
            self._rejected += 1
            waiter.waited_too_long()

    @property
    def _most_tokens(self) -> float:
        return max(1.0, (self._limits.per_second or 0.0) * BURST_SECONDS)

    def _take(self, now_ns: int) -> bool:
        limits = self._limits
        if limits.max_concurrent is not None and self._running >= limits.max_concurrent:
            return False
        if limits.per_second is not None:
            refill = (now_ns - self._refilled_ns) / 1e9 * limits.per_second
            self._tokens = min(self._most_tokens, self._tokens + refill)
            self._refilled_ns = now_ns
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
        self._running += 1
        self._let_in += 1
        return True

    def _wait_for_token(self, now_ns: int) -> None:
        """Whoever waits for one that runs is woken by its end; whoever waits for the rate must be woken by time."""
        limits = self._limits
        has_room = limits.max_concurrent is None or self._running < limits.max_concurrent
        if self._queue and has_room and limits.per_second is not None:
            missing = max(0.0, 1.0 - self._tokens) / limits.per_second
            self._wake_later(missing - (now_ns - self._refilled_ns) / 1e9 + 0.001)
