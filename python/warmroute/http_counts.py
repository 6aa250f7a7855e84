"""Counts of HTTP requests and answers that the core does not count, by labels that clients cannot invent."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class HttpCounts:
    """(method, path template) and (status, path template). Written by the control app and the data plane."""

    OTHER = "other"

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.responses: Counter[tuple[int, str]] = Counter()
        self.admission: Callable[[], tuple[int, int, int, int]] | None = None
        """(running, waiting, let in, rejected), of a router with limits."""

    def count(self, method: str, path: str, status: int) -> None:
        self.requests[method, path] += 1
        self.responses[status, path] += 1
