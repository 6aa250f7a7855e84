"""What the routers are asked to do. Every body is built before the clock starts."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.contenders import API_KEY
from bench.load import chat_body, post

CHAT = "/v1/chat/completions"
KEY = f"authorization: Bearer {API_KEY}\r\n"


@dataclass(frozen=True)
class Workload:
    """`connections` saturate the router; `latency_connections` are closed loops for the latency columns."""

    name: str
    policy: str
    build: Callable[[], list[bytes]]
    connections: int
    rate: float = 0.0
    """Requests per second of the paced part; 0: none."""
    latency_connections: tuple[int, ...] = ()
    workers: int = 1
    streams: int = 0
    """Concurrent streams of the paced part of a streaming workload; 0: unary."""
    chunks: int = 4
    chunk_seconds: float = 0.0


def text(characters: int, seed: int) -> str:
    generator = random.Random(seed)
    words = ("".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(10**9))
    out, length = [], 0
    while length < characters:
        word = next(words)
        out.append(word)
        length += len(word) + 1
    return " ".join(out)[:characters]


def _unary(characters: int, variants: int) -> Callable[[], list[bytes]]:
    return lambda: [post(CHAT, chat_body(text(characters, seed)), headers=KEY) for seed in range(variants)]


def _users(characters: int, users: int, questions: int) -> Callable[[], list[bytes]]:
    """Users with one long prefix each, asking different questions in random order."""

    def build() -> list[bytes]:
        prefixes = [text(characters, seed) for seed in range(users)]
        requests = [
            post(CHAT, chat_body(f"{prefix} question {number}"), headers=KEY)
            for prefix in prefixes
            for number in range(questions)
        ]
        random.Random(0).shuffle(requests)
        return requests

    return build


def _streams() -> list[bytes]:
    return [post(CHAT, chat_body(text(100, seed), stream=True), headers=KEY) for seed in range(64)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("unary-100", "round_robin", _unary(100, 256), 32, rate=2_000, latency_connections=(1, 8)),
        Workload("unary-1k", "round_robin", _unary(1_000, 256), 32, rate=2_000, latency_connections=(8,)),
        Workload("unary-100-cache", "cache_aware", _unary(100, 256), 32, rate=2_000, workers=2),
        Workload("unary-32k", "cache_aware", _users(32_000, 64, 16), 16, rate=300, workers=2),
        Workload("unary-220k", "cache_aware", _users(220_000, 16, 8), 16, workers=2),
        Workload("stream-paced", "round_robin", _streams, 200, streams=200, chunks=100, chunk_seconds=0.02),
        Workload("stream-saturated", "round_robin", _streams, 64, streams=64, chunks=100),
    )
}
