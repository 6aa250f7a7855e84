"""What a request keeps of attempts that came to nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from warmroute._core import Response
    from warmroute.errors import ErrorCode
    from warmroute.retry import Retries


class Setbacks:
    """Made at the first of them: few requests have any."""

    __slots__ = ("failure", "held", "held_in", "held_parts", "not_before_ns", "retries", "timer")

    def __init__(self) -> None:
        self.retries: Retries | None = None
        self.failure: tuple[ErrorCode, str] | None = None
        self.held: Response | None = None
        """An answer that may still be replaced by another worker's."""
        self.held_in = b""
        """What that began in."""
        self.held_parts: list[bytes] = []
        """Its body."""
        self.not_before_ns = 0
        self.timer: asyncio.TimerHandle | None = None

    def let_go(self) -> None:
        """Nobody will get what was held."""
        self.held, self.held_in, self.held_parts = None, b"", []
