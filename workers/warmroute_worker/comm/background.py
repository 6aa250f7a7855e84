"""Collectives that go on while something else is computed: one thread that does them in the order they are given.

One thread, so that the order is the same on all ranks. The GIL is free while a collective waits or copies.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Pending(Generic[T]):
    """What will come of a collective."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = work
        self.name = name
        self._done = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        self.began_ns = self.ended_ns = self.waited_ns = 0
        self.began_at = 0
        """Nanoseconds since 1970, for traces."""

    def do(self) -> None:
        """On the thread that does them."""
        self.began_at, self.began_ns = time.time_ns(), time.perf_counter_ns()
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        del self._work
        self.ended_ns = time.perf_counter_ns()
        self._done.set()

    def result(self) -> T:
        """Waits for it. Raises what the collective raised."""
        began = time.perf_counter_ns()
        self._done.wait()
        self.waited_ns = time.perf_counter_ns() - began
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    @property
    def overlap_ns(self) -> int:
        """How long it went on while nobody waited for it."""
        return max(0, self.ended_ns - self.began_ns - self.waited_ns)


class Background:
    """Begins with its first work, ends with the process."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Pending[object]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.log: list[tuple[str, int, int]] | None = None
        """Name, beginning and nanoseconds of what was done, while somebody wants to know."""

    def submit(self, work: Callable[[], T], name: str) -> Pending[T]:
        if self._thread is None:
            # Not before: a process with threads is no good parent for ranks.
            self._thread = threading.Thread(target=self._run, name="collectives", daemon=True)
            self._thread.start()
        pending = Pending(work, name)
        anything: Any = pending
        self._queue.put(anything)
        return pending

    def _run(self) -> None:
        while True:
            pending = self._queue.get()
            pending.do()
            log = self.log
            if log is not None:
                log.append((pending.name, pending.began_at, pending.ended_ns - pending.began_ns))
            # Whoever waits for it has it; until the next one comes nobody else must.
            del pending
