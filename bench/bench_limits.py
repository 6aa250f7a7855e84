"""`python -m bench.bench_limits`: what the router may take. Memory, many streams, two processes, a worker's return.

Each part starts its own fleet; run them one by one on a quiet machine. Nothing is pinned.
"""

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence

import uvloop

from bench.bench_router import LOGS
from bench.cpu import resident_bytes, tree_cpu_ns
from bench.load import Load, chat_body, closed_loop, post
from bench.workloads import CHAT, text
from tests.e2e.fleet import FakeWorkerProcess, Fleet, RouterProcess, chat
from tests.processes import ProcessError, Processes

LEAN = "--lean"
STREAM_SECONDS = 60
PROMPTS, PROMPT_BYTES = 20_000, 4_000
REQUESTS = 1_000_000
USERS, QUESTIONS = 64, 40


def run(router: RouterProcess, requests: Sequence[bytes], connections: int, count: int | None = None) -> Load:
    count = len(requests) if count is None else count
    return uvloop.run(closed_loop("127.0.0.1", router.port, requests, connections, count=count))


def pss_mb(router: RouterProcess) -> float:
    return resident_bytes(router.process.pid) / 1e6


def memory(fleet: Fleet) -> None:
    router = fleet.router("--log-level", "warn", workers=fleet.fake_workers(2, LEAN))
    time.sleep(2)
    start = pss_mb(router)
    print(f"start: {start:.1f} MB (PSS of all processes)")
    few = [post(CHAT, chat_body(text(100, seed))) for seed in range(64)]
    run(router, few, 32, 20_000)
    before = pss_mb(router)
    prompts = [post(CHAT, chat_body(text(PROMPT_BYTES, seed))) for seed in range(1000, 1000 + PROMPTS)]
    load = run(router, prompts, 32)
    after, megabytes = pss_mb(router), PROMPTS * PROMPT_BYTES / 1e6
    cost = (after - before) / megabytes
    print(f"{PROMPTS} prompts of {PROMPT_BYTES} bytes: {before:.1f} -> {after:.1f} MB, {cost:.3f} MB per MB of text")
    # Until the index is full: from then on it must not grow.
    more = [post(CHAT, chat_body(text(PROMPT_BYTES, seed))) for seed in range(100_000, 130_000)]
    run(router, more, 32)
    full = pss_mb(router)
    failed = len(load.failed)
    for share in range(1, 5):
        failed += len(run(router, few, 32, REQUESTS // 4).failed)
        print(f"{share * REQUESTS // 4} requests more: {pss_mb(router) - full:+.2f} MB", flush=True)
    print(f"failed: {failed}")


def streams(fleet: Fleet) -> None:
    count = 2_000
    chunks = STREAM_SECONDS * 2
    worker = fleet.fake_worker(LEAN, "--chunks", str(chunks), "--chunk-seconds", "0.5")
    router = fleet.router("--log-level", "warn", workers=[worker])
    requests = [post(CHAT, chat_body(text(100, seed), stream=True)) for seed in range(64)]
    seen: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(5):
            seen.append(pss_mb(router))

    watcher = threading.Thread(target=watch)
    watcher.start()
    cpu = tree_cpu_ns(router.process.pid)
    load = uvloop.run(closed_loop("127.0.0.1", router.port, requests, count, count=count, timestamps=True))
    over.set()
    watcher.join()
    cpu = tree_cpu_ns(router.process.pid) - cpu
    print(f"{count} streams, 2 chunks/s, {load.seconds:.0f} s: failed {len(load.failed)}, chunks {load.chunks}")
    print(
        f"CPU per chunk {cpu / load.chunks / 1e3:.1f} us, transit p99"
        f" {load.quantile(0.99, load.transit_ns) / 1e6:.1f} ms"
    )
    print("PSS MB every 5 s: " + " ".join(f"{value:.0f}" for value in seen))


def two_processes(fleet: Fleet) -> None:
    """Against one, in turn."""
    results: dict[int, list[tuple[float, float, float, float]]] = {1: [], 2: []}
    for processes in (1, 2, 2, 1):
        results[processes].append(_processes(fleet, processes))
        print(f"{processes}: {results[processes][-1]}", flush=True)
    names = ("hit rate %", "CPU us/request", "largest share of connections %", "lock wait % of CPU")
    for column, name in enumerate(names):
        one, two = (statistics.median(row[column] for row in results[n]) for n in (1, 2))
        print(f"{name}: 1 process {one:.2f}, 2 processes {two:.2f}")


def _processes(fleet: Fleet, processes: int) -> tuple[float, float, float, float]:
    """(hit rate %, CPU us per request, largest share of the connections %, lock wait % of CPU)"""
    connections = 256
    workers = fleet.fake_workers(4, "--kv-tokens", "40000")
    router = fleet.router("--log-level", "warn", "--processes", str(processes), workers=workers)
    asked = [
        post(CHAT, json.dumps(chat(text(4_000, user), f"question {n}")).encode())
        for n in range(QUESTIONS)
        for user in range(USERS)
    ]
    load = run(router, asked, connections)
    assert load.failed == [], load.failed[:3]
    metrics = router.metrics()
    prompt = metrics.total("warmroute_prompt_tokens_total")
    hit_rate = metrics.total("warmroute_reported_cached_tokens_total") / prompt * 100
    _stop(fleet, router, workers)

    lean = fleet.fake_workers(2, LEAN)
    router = fleet.router("--log-level", "warn", "--processes", str(processes), workers=lean)
    small = [post(CHAT, chat_body(text(1_000, seed))) for seed in range(256)]
    run(router, small, connections, 20_000)
    cpu, waited = tree_cpu_ns(router.process.pid), router.metrics().total("warmroute_lock_wait_seconds_total")
    before = _accepted(router)
    load = run(router, small, connections, 150_000)
    assert load.failed == []
    cpu = tree_cpu_ns(router.process.pid) - cpu
    waited = router.metrics().total("warmroute_lock_wait_seconds_total") - waited
    taken = [now - then for now, then in zip(_accepted(router), before, strict=True)]
    _stop(fleet, router, lean)
    # With a closed loop a connection's share of the requests is its share of the connections.
    return hit_rate, cpu / len(load.replies) / 1e3, max(taken) / sum(taken) * 100, waited * 1e9 / cpu * 100


def _accepted(router: RouterProcess) -> list[int]:
    return [ledger["accepted"] for ledger in router.get("/debug/ledgers")[1]][1:]


def _stop(fleet: Fleet, router: RouterProcess, workers: Sequence[FakeWorkerProcess]) -> None:
    for process in (router.process, *(worker.process for worker in workers)):
        fleet.processes.stop(process)


def worker_return(fleet: Fleet) -> None:
    """From the first good answer of a restarted worker's /health to its first request."""
    workers = fleet.fake_workers(2)
    router = fleet.router("--log-level", "warn", workers=workers)
    fresh = [post(CHAT, chat_body(text(60, seed))) for seed in range(60_000)]
    took = []
    for _ in range(5):
        workers[0].kill()
        time.sleep(1.5)

        async def load() -> tuple[Load, float]:
            running = asyncio.create_task(closed_loop("127.0.0.1", router.port, fresh, 16, seconds=6))
            await asyncio.sleep(1)
            await asyncio.to_thread(workers[0].restart)
            answered = time.time()
            return await running, answered

        result, answered = asyncio.run(load())
        assert result.failed == [], result.failed[:3]
        took.append(workers[0].requests()[0].at - answered)
    print("seconds until a restarted worker has traffic: " + " ".join(f"{seconds:.2f}" for seconds in took))


PARTS: dict[str, Callable[[Fleet], None]] = {
    "memory": memory,
    "streams": streams,
    "processes": two_processes,
    "return": worker_return,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="What the router may take at most.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="all, unless given")
    for name in parser.parse_args().parts or PARTS:
        print(f"\n### {name}\n", flush=True)
        try:
            with Processes(LOGS) as processes:
                PARTS[name](Fleet(processes))
        except ProcessError as error:
            sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
