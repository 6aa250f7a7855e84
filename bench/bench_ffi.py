"""What a decision costs through Python: `read` + `select` + `release` + `finish`, medians on one core.

    python -m bench.bench_ffi [--targets 16]

Chats of natural text in one message, all but the last KB known. `cargo bench` measures the same without Python.
"""

import argparse
import itertools
import json
import os
import statistics
from time import monotonic_ns, perf_counter_ns

from warmroute._core import Core, OutcomeKind
from warmroute.config import RouterConfig
from warmroute.engine import build_core

SIZES = (100, 1_000, 32_000, 220_000)
NEW_BYTES = 1_000
SENTENCE = "The quick brown fox jumps over the lazy dog and runs away.\n"
CHAT = b"/v1/chat/completions"
STEPS = ("read", "select", "release", "finish")


def core_with(targets: int) -> Core:
    core = build_core(RouterConfig(seed=1, hash_seed=1, index_memory=64 << 20))
    for _ in range(targets):
        head = core.add_worker(["demo"], 1, 1 << 24, None, 0)[0]
        for _ in range(2):
            core.observe_probe(head, True, 0)
    return core


def bodies(size: int) -> list[bytes]:
    new = min(NEW_BYTES, size // 4)

    def text(length: int) -> str:
        return (SENTENCE * (length // len(SENTENCE) + 1))[:length]

    contents = [f"{turn % 2} {text(size - new)} {turn} {text(new)}" for turn in range(64)]
    messages = [[{"role": "user", "content": content}] for content in contents]
    return [json.dumps({"model": "demo", "messages": message, "stream": True}).encode() for message in messages]


def one(core: Core, body: bytes) -> tuple[int, ...]:
    """ns that each step took."""
    now = monotonic_ns()
    times = [perf_counter_ns()]
    request = core.read(CHAT, b"", body, now)
    times.append(perf_counter_ns())
    lease = core.select(request, now, False)
    times.append(perf_counter_ns())
    assert lease is not None
    lease.release(OutcomeKind.ANSWERED, 200, now, None, None, 100, 10, 0, now)
    times.append(perf_counter_ns())
    request.finish(200, now, now)
    times.append(perf_counter_ns())
    return tuple(later - earlier for earlier, later in itertools.pairwise(times))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_ffi", description=__doc__)
    parser.add_argument("--targets", type=int, default=16)
    targets = parser.parse_args().targets
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(f"| us, {targets} targets | {' | '.join(STEPS)} | all |\n|{'---|' * (len(STEPS) + 2)}")
    for size in SIZES:
        core = core_with(targets)
        sent = bodies(size)
        rounds = [one(core, sent[turn % len(sent)]) for turn in range(6_000)][1_000:]
        steps = [statistics.median(column) / 1e3 for column in zip(*rounds, strict=True)]
        total = statistics.median(sum(each) for each in rounds) / 1e3
        print(f"| {size:,} bytes | {' | '.join(f'{step:.2f}' for step in steps)} | {total:.2f} |")


if __name__ == "__main__":
    main()
