"""Counts of HTTP requests and answers that the core does not count, by labels that clients cannot invent."""

from collections import Counter


class HttpCounts:
    """(method, path template) and (status, path template). Written by the control app and the data plane."""

    OTHER = "other"

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.responses: Counter[tuple[int, str]] = Counter()

    def count(self, method: str, path: str, status: int) -> None:
        self.requests[method, path] += 1
        self.responses[status, path] += 1
