"""A trace of what one rank does: torch's, and the collectives that go on in the background beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from warmroute_worker.comm.background import Background

BACKGROUND = "collectives in the background"
"""The thread, as the trace calls it."""


class Trace:
    """Begins when it is made."""

    def __init__(self, folder: Path, device: str, background: Background) -> None:
        """Raises OSError if the folder cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._background = folder, background
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()
        background.log = []

    def drop(self) -> None:
        """End it without writing it."""
        self._profile.stop()
        self._background.log = None

    def write(self, name: str) -> Path:
        """End it. Raises OSError."""
        self._profile.stop()
        collectives, self._background.log = self._background.log or [], None
        path = self._folder / f"{name}.trace.json"
        self._profile.export_chrome_trace(str(path))
        if collectives:
            # torch's profiler sees the threads that torch knows.
            trace: dict[str, Any] = json.loads(path.read_text())
            base = trace.get("baseTimeNanoseconds", 0)
            events = trace["traceEvents"]
            pid = next(event["pid"] for event in events if event.get("cat") in ("user_annotation", "cpu_op"))
            for text, began_at, nanoseconds in collectives:
                microseconds = {"ts": (began_at - base) / 1000, "dur": nanoseconds / 1000}
                events.append(
                    {"ph": "X", "cat": "collective", "name": text, "pid": pid, "tid": BACKGROUND, **microseconds}
                )
            path.write_text(json.dumps(trace))
        return path
