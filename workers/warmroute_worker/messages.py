"""provisional"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass
from typing import Any

import msgpack


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_k: int
    top_p: float
    seed: int | None


@dataclass(frozen=True)
class Generate:
    rid: str
    token_ids: list[int]
    max_new_tokens: int
    ignore_eos: bool
    stop_token_ids: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class Abort:
    rid: str


@dataclass(frozen=True)
class Flush:
    id: int


@dataclass(frozen=True)
class Shutdown:
    pass


@dataclass(frozen=True)
class Ready:
    context_length: int
    vocab_size: int
    max_total_tokens: int
    page_size: int
    max_running_requests: int
    eos_token_ids: list[int]
    model_type: str
    architectures: list[str]
    dtype: str
    device: str
    weight_bytes: int
    kv_pool_bytes: int


@dataclass(frozen=True)
class Failed:
    message: str


@dataclass(frozen=True)
class Load:
    running: int = 0
    waiting: int = 0
    used_tokens: int = 0
    total_tokens: int = 0
    cached_tokens_total: int = 0
    prompt_tokens_total: int = 0
    generation_tokens_total: int = 0
    evicted_tokens_total: int = 0
    waiting_uncached_tokens: int = 0


@dataclass(frozen=True)
class StepOutput:
    rows: list[Any]
    load: Load


@dataclass(frozen=True)
class FlushResult:
    id: int
    ok: bool
    message: str


ToDriver = Generate | Abort | Flush | Shutdown
FromDriver = Ready | Failed | StepOutput | FlushResult
_KINDS = {c.__name__: c for c in (Generate, Abort, Flush, Shutdown, Ready, Failed, StepOutput, FlushResult)}


def encode(message: Any) -> bytes:
    body: bytes = msgpack.packb({"kind": type(message).__name__, **asdict(message)})
    return struct.pack("<I", len(body)) + body


def decode(body: bytes) -> Any:
    m = msgpack.unpackb(body)
    kind = _KINDS[m.pop("kind")]
    if kind is Generate:
        m["sampling"] = Sampling(**m["sampling"])
    if kind is StepOutput:
        m["load"] = Load(**m["load"])
    return kind(**m)


class FrameReader:
    def __init__(self) -> None:
        self._b = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        self._b += data
        out = []
        while len(self._b) >= 4:
            n = int.from_bytes(self._b[:4], "little")
            if len(self._b) < 4 + n:
                break
            out.append(decode(bytes(self._b[4 : 4 + n])))
            del self._b[: 4 + n]
        return out
