"""python -m bench.simulator.ranks: what choosing the rank is worth where the ranks of a worker step together.

Workload W10-full. Throughput as a multiple of round_robin's over the ranks, hit rate as a share of what nothing but
affinity reaches (preset:affinity); means over the seeds.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.simulator.__main__ import run
from bench.simulator.workloads import full_ranks

if TYPE_CHECKING:
    from bench.simulator.report import Row

EVEN, AFFINITY = "round_robin", "preset:affinity"
ROUTERS = (EVEN, AFFINITY, "preset:sglang-router", "preset:dynamo", "least_cost", "cache_aware")


@dataclass(frozen=True)
class Worth:
    hit_rate: float
    tokens_per_second: float
    first_token_p99: float
    throughput: float
    """Of round_robin's."""
    hits: float
    """Of those of preset:affinity."""


def measure(routers: Sequence[str], seeds: int, concurrency: int) -> dict[str, Worth]:
    """By router; the two that the others are compared with are always among them."""
    names = [*dict.fromkeys((EVEN, AFFINITY, *routers))]
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for seed in range(1, seeds + 1):
        workload = full_ranks(seed, concurrency)
        for name in names:
            rows[name].append(run(workload, name, seed)[0])
    speed = {name: statistics.mean(row.tokens_per_second for row in rows[name]) for name in names}
    hits = {name: statistics.mean(row.hit_rate for row in rows[name]) for name in names}
    late = {name: statistics.mean(row.first_token_p99 for row in rows[name]) for name in names}
    return {
        name: Worth(hits[name], speed[name], late[name], speed[name] / speed[EVEN], hits[name] / hits[AFFINITY])
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulator.ranks", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 128, 256], metavar="REQUESTS")
    parser.add_argument("--routers", nargs="+", default=list(ROUTERS), metavar="NAME")
    arguments = parser.parse_args()
    for concurrency in arguments.concurrency:
        print(f"\n### {concurrency} at a time on 8 ranks, {arguments.seeds} seeds\n")
        print("| router | hit rate | of affinity's | tokens/s | of round_robin's | TTFT p99 s |")
        print("|---|---|---|---|---|---|")
        for name, worth in measure(arguments.routers, arguments.seeds, concurrency).items():
            print(
                f"| {name} | {worth.hit_rate:.1%} | {worth.hits:.1%} | {worth.tokens_per_second:,.0f} "
                f"| {worth.throughput:.2f} | {worth.first_token_p99:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
