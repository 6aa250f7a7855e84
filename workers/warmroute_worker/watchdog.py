"""Which rank hangs: decided from numbers that a living rank keeps raising. Pure: time is an argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from warmroute_worker.topology import Layout


class Watchdog:
    """A rank raises its heartbeat in each step, while it waits for others and while it is idle. One that stands still
    for longer than the time-out is stopped, or computes something endless."""

    def __init__(self, layout: Layout, timeout: float, ranks: range | None = None) -> None:
        """`ranks`: those that are watched; None: all."""
        self._layout, self._timeout = layout, timeout
        self._ranks = range(layout.world_size) if ranks is None else ranks
        self._beats: list[int] = [-1] * layout.world_size
        self._since: list[float] = [0.0] * layout.world_size

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(1.0, self._timeout / 4)

    def observe(self, statuses: Sequence[Mapping[str, int]], now: float) -> str | None:
        """What to say of the ranks that hang, if any do. `statuses`: what each rank says of itself, by rank."""
        hanging = []
        for rank, status in zip(self._ranks, statuses, strict=True):
            if status["heartbeat"] != self._beats[rank]:
                self._beats[rank], self._since[rank] = status["heartbeat"], now
            elif now - self._since[rank] >= self._timeout:
                hanging.append(f"{self._layout.place(rank)}, pid {status['pid']},")
        if not hanging:
            return None
        return f"{' and '.join(hanging)} has shown no life for {self._timeout:g} s (--watchdog-timeout)"
