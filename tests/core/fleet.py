"""A core with ready workers, for the tests of the extension."""

from __future__ import annotations

import json
from typing import Any

from warmroute._core import Core, Lease, OutcomeKind, RoutedRequest, Transition

SECOND = 1_000_000_000
NOW = 1_000 * SECOND
CHAT = b"/v1/chat/completions"
MODEL = "llama"


def core(workers: int = 0, **changed: Any) -> Core:
    settings: dict[str, Any] = {
        "region_file": None,
        "region_fd": None,
        "slab_fd": None,
        "processes": 1,
        "process": 0,
        "any_hash_seed": False,
        "policy": "cache_aware",
        "shadow_policy": None,
        "cache_threshold": 0.5,
        "balance_abs_threshold": 32,
        "balance_rel_threshold": 1.5,
        "assignment_mode": "random",
        "max_idle_ns": 4 * 3600 * SECOND,
        "max_tree_size": 1 << 26,
        "eviction_interval_ns": 120 * SECOND,
        "index_memory_bytes": 1 << 20,
        "hash_seed": 1,
        "seed": 1,
        "strict_model": False,
        "health_failure_threshold": 3,
        "health_success_threshold": 1,
        "breaker_enabled": True,
        "breaker_failure_threshold": 10,
        "breaker_success_threshold": 3,
        "breaker_timeout_ns": 60 * SECOND,
        "breaker_window_ns": 120 * SECOND,
        "max_concurrent_requests": 0,
        "queue_size": 0,
        "requests_per_second": 0.0,
        "duration_buckets_ns": [SECOND // 100, SECOND],
    }
    made = Core(**settings | changed)
    for _ in range(workers):
        add(made)
    return made


def add(core: Core, models: tuple[str, ...] = (MODEL,), dp_size: int = 1) -> list[int]:
    """A ready worker."""
    slots = core.add_worker(models, dp_size, 0, None, NOW)
    core.observe_probe(slots[0], True, NOW)
    return slots


def chat(*contents: str, **fields: Any) -> bytes:
    """A chat in which user and assistant alternate."""
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]
    return json.dumps({"model": MODEL, "messages": messages} | fields).encode()


def read(core: Core, body: bytes) -> RoutedRequest:
    return core.read(CHAT, b"", body, NOW)


def select(core: Core, body: bytes) -> Lease:
    lease = core.select(read(core, body), NOW, False)
    assert lease is not None
    return lease


def release(lease: Lease, kind: OutcomeKind = OutcomeKind.ANSWERED, status: int = 200) -> tuple[Transition, ...]:
    return lease.release(kind, status, -1, None, None, -1, -1, -1, NOW)


def route(core: Core, body: bytes) -> int:
    """The slot that answered it."""
    lease = select(core, body)
    release(lease)
    return lease.slot
