"""`--access-log FILE`: a line per routed request, in JSON or as text, written after the client has its answer."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from threading import Thread
from time import sleep, time
from typing import TYPE_CHECKING, NamedTuple

from warmroute.dataplane.line_file import LineFile

if TYPE_CHECKING:
    from warmroute.config import AccessLogFormat

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 0.1
_CLOSE_SECONDS = 2.0
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
    """Lines are made and written by a thread of their own: a disk or a pipe that stands still must not stop the loop.

    Raises OSError when the file cannot be opened.
    """

    def __init__(self, path: str, form: AccessLogFormat) -> None:
        self._file = LineFile(path)
        self._form = form
        self._waiting: SimpleQueue[tuple[float, Entry] | None] = SimpleQueue()
        self._dropped = 0
        self._thread = Thread(target=self._write, name="access-log", daemon=True)
        self._thread.start()

    def add(self, entry: Entry) -> None:
        if self._waiting.qsize() >= _MOST_WAITING:
            self._dropped += 1
        else:
            self._waiting.put((time(), entry))

    def close(self) -> None:
        """What waits is written, unless that takes too long."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _write(self) -> None:
        is_open = True
        while is_open:
            lines, is_open = self._take()
            try:
                for line in lines:
                    self._file.write(line)
                self._file.flush()
            except OSError as error:  # its reader is gone, or the disk is full: later lines may fare better
                log.error("the access log cannot be written: %s", error.strerror or error)
            dropped, self._dropped = self._dropped, 0
            if dropped:
                log.error("%d lines of the access log are lost: they came faster than they could be written", dropped)
            if is_open:
                sleep(_FLUSH_SECONDS)  # many lines in one write
        self._file.close()

    def _take(self) -> tuple[list[str], bool]:
        """What waits, as lines, at least one; and whether more may come."""
        lines: list[str] = []
        waiting = self._waiting.get()
        while waiting is not None:
            lines.append(self._line(*waiting))
            try:
                waiting = self._waiting.get_nowait()
            except Empty:
                return lines, True
        return lines, False

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
