"""What DP attention is worth at equal pool bytes: how many requests run before the first has to give way, and tokens/s.

`python -m bench.bench_dp_attention [--ranks 2 4] [--rounds 2]`. The embedded model demo-moe (as DeepSeek-V3,
latent attention, 16 experts); every rank has a KV pool of the same bytes. With plain tensor parallelism each rank
stores the latent rows of all tokens, with DP attention of its own requests only. Without HTTP; in turn A B, B A.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from warmroute_worker import offline_drivers
from warmroute_worker.args import WorkerArgs
from warmroute_worker.messages import Generate, Sampling

PROMPT_TOKENS, NEW_TOKENS = 96, 64
POOL_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    for ranks in options.ranks:
        settings: dict[str, dict[str, Any]] = {
            f"tp {ranks}": {"tp_size": ranks},
            f"tp {ranks}, dp {ranks}, ep {ranks}": {
                "tp_size": ranks,
                "dp_size": ranks,
                "ep_size": ranks,
                "enable_dp_attention": True,
            },
        }
        found: dict[str, list[tuple[int, float, int, int]]] = {name: [] for name in settings}
        for round_ in range(options.rounds):
            for name in list(settings)[:: 1 if round_ % 2 == 0 else -1]:
                found[name].append(measure(settings[name], options.requests))
        plain = None
        for name, results in found.items():
            running = statistics.median(result[0] for result in results)
            speed = statistics.median(result[1] for result in results)
            plain = plain or (running, speed)
            print(
                f"{name:22s} {running:4.0f} running before the first retraction ({running / plain[0]:.2f}x), "
                f"{speed:6.0f} tok/s ({speed / plain[1]:.2f}x), {results[0][2]} retractions, "
                f"pool {results[0][3] / 1e6:.2f} MB on each rank"
            )


def measure(changes: dict[str, Any], count: int) -> tuple[int, float, int, int]:
    """Most that ran at once before the first retraction; tokens/s; retractions; bytes of a rank's pool."""
    # Optimistic, so that retractions come: the default keeps a share of the future tokens free.
    args = WorkerArgs(
        "demo-moe", "demo-moe", device="cpu", threads=1, max_total_tokens=POOL_TOKENS, max_running_requests=256,
        schedule_conservativeness=0.01, **changes,
    )  # fmt: skip
    sampling = Sampling(temperature=0)
    with offline_drivers.drivers(args) as worker:
        requests = [
            Generate(str(n), [(7 * n + 3 * k) % 256 for k in range(PROMPT_TOKENS)], NEW_TOKENS, True, sampling=sampling)
            for n in range(count)
        ]
        begin = time.perf_counter()
        for n, request in enumerate(requests):
            worker.send(n % args.dp_size, request)
        worker.until(worker.finished([request.rid for request in requests]))
        seconds = time.perf_counter() - begin
        running, most = [0] * args.dp_size, 0
        for dp_rank, output in worker.outputs:
            if output.load.retractions_total:
                break
            running[dp_rank] = output.load.running
            most = max(most, sum(running))
        last = {dp_rank: output.load.retractions_total for dp_rank, output in worker.outputs}
        pool = worker.statuses()[0]["pool_bytes"]
    return most, count * NEW_TOKENS / seconds, sum(last.values()), pool


if __name__ == "__main__":
    main()
