"""Traces as workloads, one JSON object per line: public ones as the Mooncake project publishes them, and those that a
router wrote with `--record-decisions`.

`timestamp` (ms), `input_length` and `output_length` (tokens), `hash_ids`: one id per 512 tokens of the prompt, the last
block may be shorter; equal leading ids are a shared prefix. A recorded line has `blocks` instead: key and end in bytes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.simulator.engine import Engine
from bench.simulator.workload import BYTES_PER_TOKEN, Segment, Session, Turn, Workload

BLOCK_TOKENS = 512


def read_trace(path: Path, requests: int = 0, speed: float = 1.0, workers: int = 8) -> Workload:
    """The first `requests` (0: all) of a trace, arriving `speed` times as fast. Raises ValueError naming a bad line."""
    sessions = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if requests and number > requests:
                break
            try:
                session = _session(json.loads(line), speed)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}") from error
            if session is not None:
                sessions.append(session)
    what = f"{path.name}, {len(sessions):,} requests at {speed:g}x"
    return Workload("trace", what, sessions, workers=workers, engine=Engine())


def _session(entry: dict[str, Any], speed: float) -> Session | None:
    """None for a recorded attempt that was not answered: whoever asked was served by another."""
    timestamp, tokens, output = (float(entry[key]) for key in ("timestamp", "input_length", "output_length"))
    if "blocks" in entry:
        if entry["outcome"] != "answered" or not entry["blocks"]:
            return None
        return Session(
            timestamp / 1000 / speed, (Turn(tuple(_recorded(entry["blocks"], tokens)), max(int(output), 1)),)
        )
    ids = entry["hash_ids"]
    if not isinstance(ids, list) or not ids:
        raise ValueError("hash_ids is no list of ids")
    segments = tuple(_segments(ids, max(int(tokens), 1)))
    return Session(timestamp / 1000 / speed, (Turn(segments, max(int(output), 1)),))


def _segments(ids: list[int], tokens: int) -> Iterator[Segment]:
    for place, block in enumerate(ids):
        length = min(BLOCK_TOKENS, tokens - place * BLOCK_TOKENS)
        if length > 0:
            yield Segment("user", block, length)


def _recorded(blocks: list[list[int]], tokens: float) -> Iterator[Segment]:
    """Blocks of bytes as segments of tokens; `tokens` of the whole prompt, or a guess where nobody reported it."""
    bytes_per_token = blocks[-1][1] / tokens if tokens > 0 else BYTES_PER_TOKEN
    done = 0
    for key, end in blocks:
        upto = max(round(end / bytes_per_token), done + 1)
        # Half of the key: ids of messages are kept small enough for what is hashed from them.
        yield Segment("user", key >> 1, upto - done)
        done = upto
