"""`python -m bench.side_by_side`: router CPU per request where the machine cannot be kept quiet.

All routers run at once before the same workers, and are asked in turn, a moment each, A B C, C B A, and so on. What
else the machine does hits neighbouring moments alike: ratios are medians over pairs of them.
"""

import argparse
import os
import statistics
import sys
import time

import uvloop

from bench.bench_router import LOGS, WARM_UP_SECONDS, Bench
from bench.contenders import CONTENDERS
from bench.cpu import Snapshot, tree, tree_cpu_ns
from bench.load import closed_loop
from bench.workloads import WORKLOADS
from tests.processes import ProcessError, Processes


def measure(bench: Bench, workload_name: str, names: list[str], turns: int, seconds: float) -> None:
    workload = WORKLOADS[workload_name]
    requests = workload.build()
    workers = [bench.start_worker(workload, number) for number in range(workload.workers)]
    urls = [url for url, _ in workers]
    routers = {name: bench.start_router(CONTENDERS[name], workload, urls) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    foreign: list[float] = []
    for port, _ in routers.values():
        uvloop.run(closed_loop("127.0.0.1", port, requests, 8, seconds=WARM_UP_SECONDS))
    for turn in range(turns):
        for name in names if turn % 2 == 0 else names[::-1]:
            port, router = routers[name]
            own, before, start = set(tree(os.getpid())), Snapshot.take(), time.perf_counter()
            cpu_before = tree_cpu_ns(router.pid)
            load = uvloop.run(closed_loop("127.0.0.1", port, requests, workload.connections, seconds=seconds))
            cpu_ns = tree_cpu_ns(router.pid) - cpu_before
            foreign.append(Snapshot.take().foreign_ns(before, own) / 1e9 / (time.perf_counter() - start))
            if load.failed:
                sys.exit(f"{name}: {len(load.failed)} requests failed")
            spent[name].append(cpu_ns / len(load.replies) / 1e3)
    print(f"\n### {workload_name}: CPU us per request; others used {statistics.median(foreign):.2f} CPUs\n")
    print("| | median | lowest | highest | " + names[0] + " / it, median of pairs |")
    print("|---|---|---|---|---|")
    for name in names:
        values = spent[name]
        ratio = statistics.median(one / other for one, other in zip(spent[names[0]], values, strict=True))
        print(
            f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} | {ratio:.2f} |",
            flush=True,
        )
    for process in (*(process for _, process in routers.values()), *(process for _, process in workers)):
        bench.processes.stop(process)


def main() -> None:
    parser = argparse.ArgumentParser(description="Routers in turn, side by side.")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["unary-100", "unary-1k"])
    parser.add_argument("--routers", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each turn (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        for name in arguments.routers:
            CONTENDERS[name].python()
        with Processes(LOGS) as processes:
            bench = Bench(processes, arguments.seconds, 1, (os.cpu_count() or 1) > 1)
            for workload in arguments.workloads:
                measure(bench, workload, arguments.routers, arguments.turns, arguments.seconds)
    except (ProcessError, OSError) as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
