"""How many decode steps go in one plan. Time is passed in."""

from __future__ import annotations

from typing import Final

MOST_STEPS: Final = 8
BURST_SECONDS: Final = 0.01
"""Tokens of steps that go together come together: what nobody sees as a jerk."""


class Pace:
    """Between two plans is Python, 0.1 to 0.3 ms of it: steps that take little more go several at a time.

    With a fixed number of steps, that many; else as many as bring their tokens within `BURST_SECONDS`, as long as steps
    take what the last ones took.
    """

    def __init__(self, fixed: int | None) -> None:
        self._fixed = fixed
        self._steps = 1

    @property
    def steps(self) -> int:
        return self._fixed or self._steps

    def took(self, seconds: float, steps: int) -> None:
        """So long a plan took that had only decodes."""
        within = int(BURST_SECONDS * steps / seconds) if seconds > 0 else MOST_STEPS
        self._steps = min(max(within, 1), MOST_STEPS)
