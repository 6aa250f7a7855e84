"""`--access-log FILE`: a line per routed request, in JSON or as text, written after the client has its answer."""

from __future__ import annotations

import json
import logging
from collections import deque
from datetime import UTC, datetime
from time import time
from typing import TYPE_CHECKING, NamedTuple

from warmroute.dataplane.line_file import LineFile

if TYPE_CHECKING:
    import asyncio

    from warmroute.config import AccessLogFormat
    from warmroute.directory import Directory

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.1
# Of one turn of the loop: a line takes about 5 us.
_LINES_AT_ONCE = 200
# A disk that stands still must not eat the memory.
_MOST_WAITING = 100_000


class Entry(NamedTuple):
    """What is known of a request when it is over. Times in ns; tokens: prompt, completion, cached, -1 unknown."""

    request_id: bytes
    path: bytes
    model: str | None
    stream: bool
    status: int
    worker_id: str | None
    attempts: int
    prompt_bytes: int
    tokens: tuple[int, int, int]
    first_byte_ns: int | None
    duration_ns: int


class AccessLog:
    """Raises OSError when the file cannot be opened."""

    def __init__(self, path: str, form: AccessLogFormat, directory: Directory, loop: asyncio.AbstractEventLoop) -> None:
        self._file = LineFile(path)
        self._form = form
        self._directory = directory
        self._loop = loop
        self._waiting: deque[tuple[float, Entry]] = deque()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._dropped = 0

    def add(self, entry: Entry) -> None:
        if len(self._waiting) >= _MOST_WAITING:
            self._dropped += 1
            return
        self._waiting.append((time(), entry))
        if self._timer is None:
            self._timer = self._loop.call_later(_FLUSH_SECONDS, self._write_some)

    def close(self) -> None:
        """What waits is written."""
        if self._timer is not None:
            self._timer.cancel()
        while self._waiting:
            self._write_some(reschedule=False)
        self._file.close()

    def _write_some(self, *, reschedule: bool = True) -> None:
        self._timer = None
        waiting = self._waiting
        for _ in range(min(len(waiting), _LINES_AT_ONCE)):
            self._file.write(self._line(*waiting.popleft()))
        try:
            self._file.flush()
        except OSError as error:
            log.error("the access log cannot be written: %s", error.strerror or error)
        if self._dropped:
            log.error("%d lines of the access log are lost: they came faster than they could be written", self._dropped)
            self._dropped = 0
        if waiting and reschedule:
            self._timer = self._loop.call_soon(self._write_some)

    def _line(self, unix: float, entry: Entry) -> str:
        when = datetime.fromtimestamp(unix, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        prompt, completion, cached = (count if count >= 0 else None for count in entry.tokens)
        first_byte_ms = None if entry.first_byte_ns is None else round(entry.first_byte_ns / 1e6, 3)
        duration_ms = round(entry.duration_ns / 1e6, 3)
        request_id, path = entry.request_id.decode("latin-1"), entry.path.decode("latin-1")
        if self._form == "json":
            line = {
                "time": when,
                "request_id": request_id,
                "path": path,
                "model": entry.model,
                "stream": entry.stream,
                "status": entry.status,
                "worker": entry.worker_id,
                "attempts": entry.attempts,
                "prompt_bytes": entry.prompt_bytes,
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "cached_tokens": cached,
                "first_byte_ms": first_byte_ms,
                "duration_ms": duration_ms,
            }
            return json.dumps(line, separators=(",", ":"))
        shown = [when, request_id, path, json.dumps(entry.model), "stream" if entry.stream else "unary", entry.status]
        shown += [f"worker={entry.worker_id}", f"attempts={entry.attempts}", f"prompt_bytes={entry.prompt_bytes}"]
        shown += [f"tokens={prompt}/{completion}/{cached}", f"first_byte_ms={first_byte_ms}"]
        return " ".join(map(str, [*shown, f"duration_ms={duration_ms}"])).replace("None", "-")
