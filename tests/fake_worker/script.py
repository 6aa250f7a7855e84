"""What a fake worker is told to do, and what it saw."""

import base64
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(slots=True)
class Script:
    """How inference requests are answered. Set with `POST /_script` (fields left out take these defaults)."""

    first_byte_seconds: float = 0.0
    """Wait before the head is sent."""
    chunk_seconds: float = 0.0
    """Wait before each further chunk of a stream; 0: all in one write."""
    chunks: int = 4
    """Pieces of the answer; a unary answer is all of them at once."""
    chunk_bytes: int = 16
    status: int = 200
    retry_after: int | None = None
    """Sent as Retry-After with a status other than 200."""
    reset_before_answer: bool = False
    """Read the request whole, then RST."""
    reset_after_chunks: int | None = None
    """RST after that many chunks of a stream, or in the middle of a unary body."""
    stall_after_chunks: int | None = None
    """Say nothing more after that many chunks of a stream."""
    die: bool = False
    """The process kills itself on the request (a prompt that kills its worker)."""
    garbage: bool = False
    """Answer with bytes that are not HTTP."""
    stall: bool = False
    """Never answer."""
    idle_close_seconds: float | None = None
    """Close connections that were idle that long."""
    health_status: int = 200
    token_headers: bool = True
    """Send x-prompt-tokens and x-cached-tokens."""
    only_if_body_contains: str | None = None
    """Other inference requests get the default script."""
    times: int | None = None
    """Apply to that many inference requests, then fall back to the default script."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Script":
        """Raises ValueError on a field that does not exist."""
        unknown = values.keys() - {known.name for known in fields(cls)}
        if unknown:
            raise ValueError(f"no such field: {', '.join(sorted(unknown))}")
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class SeenRequest:
    """One inference request. Outcomes: answering, answered, cancelled (client went away), broken (by the script),
    aborted (by request)."""

    at: float
    """time.time() when the whole request had arrived."""
    path: str
    head: bytes
    body: bytes
    rank: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    outcome: str = "answering"

    def header(self, name: str) -> str | None:
        """Value of the first header of that name."""
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.lower().encode():
                return value.strip().decode("latin-1")
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "at": self.at,
            "path": self.path,
            "head": self.head.decode("latin-1"),
            "body_base64": base64.b64encode(self.body).decode(),
            "rank": self.rank,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "outcome": self.outcome,
        }


@dataclass
class Record:
    """What the worker saw since its start or the last `POST /_reset`; open connections and in-flight survive that."""

    requests: deque[SeenRequest] = field(default_factory=lambda: deque(maxlen=50_000))
    other_paths: dict[str, int] = field(default_factory=dict)
    """Every other request (probes, info), counted by path."""
    received: int = 0
    answered: int = 0
    cancelled: int = 0
    broken: int = 0
    aborted: int = 0
    in_flight: int = 0
    open_connections: int = 0
    accepted_connections: int = 0

    def see(self, request: SeenRequest) -> None:
        self.requests.append(request)
        self.received += 1
        self.in_flight += 1

    def end(self, request: SeenRequest, outcome: str) -> None:
        """`outcome`: answered, cancelled, broken or aborted. A request ends once."""
        if request.outcome != "answering":
            return
        request.outcome = outcome
        self.in_flight -= 1
        setattr(self, outcome, getattr(self, outcome) + 1)

    def reset(self) -> None:
        self.requests.clear()
        self.other_paths.clear()
        self.received = self.answered = self.cancelled = self.broken = self.aborted = self.accepted_connections = 0

    def to_json(self, with_requests: bool) -> dict[str, Any]:
        counts = {
            name: getattr(self, name)
            for name in (
                "received",
                "answered",
                "cancelled",
                "broken",
                "aborted",
                "in_flight",
                "open_connections",
                "accepted_connections",
                "other_paths",
            )
        }
        return counts | ({"requests": [request.to_json() for request in self.requests]} if with_requests else {})


def seen(path: str, head: bytes, body: bytes, rank: int) -> SeenRequest:
    return SeenRequest(at=time.time(), path=path, head=head, body=body, rank=rank)
