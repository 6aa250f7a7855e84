"""What clients ask: sessions of turns, made of segments of text that may be shared."""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.simulator.engine import PAGE_TOKENS, Engine

BYTES_PER_TOKEN = 4
MODEL = "simulated"


@dataclass(frozen=True, slots=True)
class Segment:
    """A message. Equal ids stand for equal text."""

    role: str
    id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What the client adds, and how long the answer is."""

    new: tuple[Segment, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    """A client that asks, waits for the answer, thinks, and asks again with all that was said before."""

    start: float
    turns: tuple[Turn, ...]
    think_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Outage:
    """Worker `worker` dies at `start` and is back, empty, after `seconds`."""

    start: float
    worker: int
    seconds: float


@dataclass(frozen=True)
class Workload:
    name: str
    what: str
    sessions: Sequence[Session]
    concurrency: int = 0
    """Sessions at a time, the next beginning when one ends; 0: each begins at its `start`."""
    workers: int = 8
    ranks: int = 1
    engine: Engine = field(default_factory=Engine)
    outages: Sequence[Outage] = ()


@dataclass(slots=True)
class Request:
    """One turn with everything before it."""

    segments: tuple[Segment, ...]
    output_tokens: int
    prompt_tokens: int
    keys: list[range]
    """Page keys of prompt and answer."""

    @staticmethod
    def make(history: Sequence[Segment], turn: Turn, answer_id: int) -> "Request":
        segments = (*history, *turn.new)
        prompt_tokens = sum(segment.tokens for segment in segments)
        answer = Segment("assistant", answer_id, turn.output_tokens)
        return Request(segments, turn.output_tokens, prompt_tokens, page_keys((*segments, answer)))

    def body(self, stream: bool = True) -> bytes:
        messages = b",".join(_message(segment) for segment in self.segments)
        tail = b',"stream":true' if stream else b""
        return b'{"model":"%s","messages":[%s]%s}' % (MODEL.encode(), messages, tail)


def page_keys(segments: Sequence[Segment]) -> list[range]:
    """One range of keys per segment. A page belongs to the segment in which it ends, and stands for all before it."""
    keys, chain, tokens = [], 0, 0
    for segment in segments:
        chain = hash((chain, segment.id, segment.tokens))
        first = tokens // PAGE_TOKENS
        tokens += segment.tokens
        pages = tokens // PAGE_TOKENS - first
        if pages:
            start = chain & ~0xFFFFF  # room for a million pages before the next chain's keys
            keys.append(range(start, start + pages))
    return keys


@functools.lru_cache(maxsize=8192)
def _message(segment: Segment) -> bytes:
    """Text without two equal stretches: a block that matches by chance would be a wrong claim."""
    text = random.Random(segment.id).randbytes(segment.tokens * BYTES_PER_TOKEN // 2).hex()
    return json.dumps({"role": segment.role, "content": text}, separators=(",", ":")).encode()
