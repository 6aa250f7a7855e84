"""Counts of the control app's requests and answers, by labels that clients cannot invent."""

from collections import Counter


class HttpCounts:
    """(method, path template) and (status, path template). What the data plane answers is counted in the core."""

    OTHER = "other"

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.responses: Counter[tuple[int, str]] = Counter()
        self.running = 0
        """Requests that the control app answers just now."""

    def count(self, method: str, path: str, status: int) -> None:
        self.requests[method, path] += 1
        self.responses[status, path] += 1
