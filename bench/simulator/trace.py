"""Public request traces as workloads: one JSON object per line, as the Mooncake project publishes them.

`timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids`: one id per 512 tokens of the prompt, the last
block may be shorter; equal leading ids are a shared prefix.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from bench.simulator.engine import Engine
from bench.simulator.workload import Segment, Session, Turn, Workload

BLOCK_TOKENS = 512


def read_trace(path: Path, requests: int = 0, speed: float = 1.0, workers: int = 8) -> Workload:
    """The first `requests` (0: all) of a trace, arriving `speed` times as fast. Raises ValueError naming a bad line."""
    sessions = []
    for number, line in enumerate(path.open(encoding="utf-8"), 1):
        if requests and number > requests:
            break
        try:
            sessions.append(_session(json.loads(line), speed))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from error
    what = f"{path.name}, {len(sessions):,} requests at {speed:g}x"
    return Workload("trace", what, sessions, workers=workers, engine=Engine())


def _session(entry: dict[str, object], speed: float) -> Session:
    timestamp, tokens, output = (int(str(entry[key])) for key in ("timestamp", "input_length", "output_length"))
    ids = entry["hash_ids"]
    if not isinstance(ids, list) or not ids:
        raise ValueError("hash_ids is no list of ids")
    segments = tuple(_segments(ids, max(tokens, 1)))
    return Session(timestamp / 1000 / speed, (Turn(segments, max(output, 1)),))


def _segments(ids: list[int], tokens: int) -> Iterator[Segment]:
    for place, block in enumerate(ids):
        length = min(BLOCK_TOKENS, tokens - place * BLOCK_TOKENS)
        if length > 0:
            yield Segment("user", block, length)
