"""What the router counts is what clients and workers counted."""

import asyncio
import json
from collections import Counter

import pytest

from bench.load import closed_loop, post
from tests.e2e.fleet import Fleet, Metrics, chat, sse_events, words
from tests.processes import request

UNARY, STREAMED, BROKEN = 60, 40, 7


def test_counts_agree(fleet: Fleet) -> None:
    workers = fleet.fake_workers(2)
    router = fleet.router(workers=workers)
    # Three conversations' worth of shared prefixes, so that there is something cached to report.
    unary = [chat(words(60, i % 3), f"question {i}") for i in range(UNARY)]
    streamed = [
        chat(words(60, i % 3), f"asked {i}", stream=True, stream_options={"include_usage": True})
        for i in range(STREAMED)
    ]
    bodies = [json.dumps(value).encode() for value in unary + streamed]
    load = asyncio.run(
        closed_loop(
            "127.0.0.1",
            router.port,
            [post("/v1/chat/completions", body) for body in bodies],
            4,
            count=len(bodies),
            keep_bodies=True,
        )
    )
    assert load.failed == []
    for _ in range(BROKEN):
        assert router.post_bytes("/v1/chat/completions", b"{")[0] == 400
    usages = []
    for reply in load.replies:
        if reply.index < UNARY:
            usages.append(json.loads(reply.body)["usage"])
        else:
            usages.append(sse_events(dechunk(reply.body))[-2]["usage"])
    prompt = sum(usage["prompt_tokens"] for usage in usages)
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert 0.3 < cached / prompt < 1

    metrics = router.metrics()
    assert metrics.total("smg_router_requests_total", model="fake-model") == UNARY + STREAMED
    assert metrics.total("smg_router_request_duration_seconds_count", model="fake-model") == UNARY + STREAMED
    assert metrics.by("smg_worker_requests_active", "worker") == {worker.url: 0 for worker in workers}
    assert metrics.by("smg_worker_health", "worker") == {worker.url: 1 for worker in workers}
    rates = metrics.by("sglang_cache_hit_rate", "source")
    per_worker = {worker.url: worker.requests() for worker in workers}
    for url, seen in per_worker.items():
        if seen:
            expected = sum(r.cached_tokens for r in seen) / sum(r.prompt_tokens for r in seen)
            assert rates[url] == pytest.approx(expected, abs=1e-6)
    names = Counter(reply.header("x-fake-worker") for reply in load.replies)
    assert names == Counter({worker.name: len(per_worker[worker.url]) for worker in workers if per_worker[worker.url]})


def test_own_port_serves_the_same(fleet: Fleet) -> None:
    router = fleet.router(workers=fleet.fake_workers(1))
    router.chat("s", "u")
    status, text = request("GET", f"http://127.0.0.1:{router.prometheus_port}/metrics")
    assert status == 200
    assert Metrics(text.decode()).total("smg_router_requests_total", model="fake-model") == 1


def test_label_values_are_bounded(fleet: Fleet) -> None:
    """A single-model fleet takes any name; the metrics do not grow by it."""
    router = fleet.router(workers=fleet.fake_workers(1))
    for i in range(300):
        router.chat("s", "u", model=f"made-up-{i}")
    models = {
        sample.labels["model"] for sample in router.metrics().samples if sample.name == "smg_router_requests_total"
    }
    assert len(models) <= 65
    assert router.metrics().total("smg_router_requests_total") == 300


def test_retries_and_errors_are_counted(fleet: Fleet) -> None:
    bad, good = fleet.fake_workers(2)
    router = fleet.router("--policy", "round_robin", workers=[bad, good])
    bad.script(status=503)
    for _ in range(10):
        router.chat("s", "u")
    metrics = router.metrics()
    assert metrics.total("smg_router_requests_total", model="fake-model") == 10
    retried = bad.counts()["received"]
    assert retried >= 1
    assert metrics.total("smg_worker_retries_total") == retried


def dechunk(data: bytes) -> bytes:
    """Take the chunked coding off a whole body."""
    out = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        out += data[:length]
        data = data[length + 2 :]
    return out
