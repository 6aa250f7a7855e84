"""Who waits in this process for the router's limits, in the order of arrival.

The limits themselves, what runs and how many wait are the core's, for all processes. Decisions only: time comes in, and
what follows is told to the waiters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute._core import Core


class Waiter(Protocol):
    def admitted(self, now_ns: int) -> None:
        """Its turn has come."""

    def waited_too_long(self) -> None:
        """It is not in the queue any more."""


class QueueFull(Exception):  # noqa: N818
    """Nobody may wait any more."""


class Bell(Protocol):
    """`Doorbell`, as far as it is used here."""

    def ring(self) -> None: ...
    def listen(self, wanted: bool) -> None: ...


class Admission:
    """`wake_later(seconds)`: to have `let_in` called then; at 0 soon, but not from within the call. `bell`: to have the
    `let_in` of a process called in which somebody waits."""

    def __init__(self, core: Core, queue_timeout_ns: int, wake_later: Callable[[float], object], bell: Bell) -> None:
        self._core = core
        self._queue_timeout_ns = queue_timeout_ns
        self._wake_later = wake_later
        self._bell = bell
        self._queue: OrderedDict[Waiter, int] = OrderedDict()
        """Waiter -> when it has waited for too long; in the order of arrival, so in this order, too."""

    def enter(self, waiter: Waiter, now_ns: int) -> bool:
        """Whether it may run now; otherwise it waits. Raises QueueFull, RegionBusy."""
        runs = self._core.enter(now_ns)
        if runs is None:
            raise QueueFull
        if not runs:
            self._queue[waiter] = now_ns + self._queue_timeout_ns
            self._bell.listen(True)
            self._wake_later(0)  # it may be the rate that it waits for
        return runs

    def leave(self) -> None:
        """One that ran has ended. Raises RegionBusy: nothing was changed."""
        if self._core.leave():
            self._bell.ring()

    def withdraw(self, waiter: Waiter) -> None:
        """It does not wait any more, if it did. Raises RegionBusy, as above."""
        if waiter in self._queue:
            self._core.withdraw(False)
            del self._queue[waiter]
            self._bell.listen(bool(self._queue))

    def let_in(self, now_ns: int) -> None:
        """Those whose turn has come. Raises RegionBusy."""
        while self._queue:
            turn = self._core.next_turn(now_ns)
            if turn > 0:
                self._wake_later(turn / 1e9)
            if turn != 0:
                return
            waiter, _ = self._queue.popitem(last=False)
            waiter.admitted(now_ns)
        self._bell.listen(False)
        if self._core.admission()[1]:  # nobody here: it may have been meant for another process
            self._bell.ring()

    def expire(self, now_ns: int) -> None:
        """Those who have waited for too long. Raises RegionBusy."""
        while self._queue:
            waiter = next(iter(self._queue))
            if self._queue[waiter] > now_ns:
                return
            self._core.withdraw(True)
            del self._queue[waiter]
            waiter.waited_too_long()
        self._bell.listen(False)
