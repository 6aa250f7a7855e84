"""`--record-decisions FILE`: what was decided and what came of it, one JSON object per line, without any text.

`python -m bench.simulator --trace FILE` replays it, so that policies can be judged on one's own traffic.
"""

from __future__ import annotations

import json
from time import monotonic_ns
from typing import TYPE_CHECKING

from warmroute.dataplane.line_file import LineFile

if TYPE_CHECKING:
    from warmroute._core import Lease, RoutedRequest
    from warmroute.directory import WorkerAddress


class DecisionRecorder:
    """Appends to a file. Raises OSError when it cannot be opened."""

    def __init__(self, path: str, start_ns: int) -> None:
        """`start_ns`: the zero of its times, the same in all processes of a router."""
        self._file = LineFile(path)
        self._start_ns = start_ns

    def record(
        self,
        request: RoutedRequest,
        lease: Lease,
        address: WorkerAddress,
        outcome: str,
        status: int,
        selected_ns: int,
        first_byte_ns: int,
        tokens: tuple[int, int, int],
    ) -> None:
        """`tokens`: prompt, completion, cached, as the worker reported them; -1: it did not. Times are ms."""
        prompt, completion, cached = tokens
        line = {
            "timestamp": self._milliseconds(selected_ns),
            "model": request.model,
            "worker": address.worker_id,
            "outcome": outcome,
            "status": status,
            "first_byte": self._milliseconds(first_byte_ns) if first_byte_ns >= 0 else None,
            "end": self._milliseconds(monotonic_ns()),
            "prompt_bytes": request.prompt_bytes,
            "input_length": prompt,
            "output_length": completion,
            "cached_tokens": cached,
            "predicted_cached_tokens": lease.predicted_cached_tokens,
            "blocks": request.blocks(),
        }
        self._file.write(json.dumps(line, separators=(",", ":")))

    def close(self) -> None:
        self._file.close()

    def _milliseconds(self, now_ns: int) -> float:
        return round((now_ns - self._start_ns) / 1e6, 3)
