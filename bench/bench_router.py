"""`python -m bench.bench_router`: router CPU per request or chunk, throughput and latency, ours against the peers.

The router has CPU 1 to itself; the load generator (this process) and the lean fake workers share CPU 0. Every cell
starts a fresh router. Rounds run A B C, then C B A, and so on; the tables show medians. A measurement that other
processes disturbed is repeated, and marked when it stays disturbed.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from bench.cells import Cell, report
from bench.contenders import API_KEY, CONTENDERS, Contender, Ports
from bench.cpu import Snapshot, resident_bytes, tree, tree_cpu_ns
from bench.load import Load, closed_loop, open_loop
from bench.workloads import WORKLOADS, Workload
from tests.processes import REPOSITORY, Process, ProcessError, Processes, free_port, request

LOGS = REPOSITORY / ".run" / "bench"
WARM_UP_SECONDS = 1.0
FOREIGN_SHARE = 0.10
"""Of one CPU, used by other processes: above it a measurement is repeated. Undisturbed ones mostly stay below 3 %."""
READY_SECONDS = 60.0


@dataclass(frozen=True)
class Measured:
    load: Load
    router_ns: int
    foreign_share: float


class Bench:
    """Starts routers and workers, pinned, and measures."""

    def __init__(self, processes: Processes, seconds: float, repeats: int, pinned: bool) -> None:
        self.processes, self.seconds, self.repeats = processes, seconds, repeats
        self.router_cpus = {1} if pinned else None
        self.load_cpus = {0} if pinned else None
        if self.load_cpus is not None:
            os.sched_setaffinity(0, self.load_cpus)

    def cell(self, contender: Contender, workload: Workload, requests: Sequence[bytes]) -> Cell:
        cell = Cell(contender.name, workload.name)
        workers = [self.start_worker(workload, number) for number in range(workload.workers)]
        port, router = self.start_router(contender, workload, [url for url, _ in workers])
        try:
            uvloop.run(closed_loop("127.0.0.1", port, requests, 8, seconds=WARM_UP_SECONDS))
            if workload.streams:
                self._measure_streams(cell, workload, port, router, requests)
            else:
                self._measure_unary(cell, workload, port, router, requests)
            cell.resident_mb = resident_bytes(router.pid) / 1e6
        finally:
            for process in (router, *(process for _, process in workers)):
                self.processes.stop(process)
        return cell

    def _measure_unary(
        self, cell: Cell, workload: Workload, port: int, router: Process, requests: Sequence[bytes]
    ) -> None:
        for connections in workload.latency_connections:
            once = functools.partial(closed_loop, "127.0.0.1", port, requests, connections, seconds=self.seconds / 2)
            load = self._undisturbed(cell, router, once).load
            cell.latency[f"C={connections} p50"] = load.quantile(0.5) * 1e6
            cell.latency[f"C={connections} p99"] = load.quantile(0.99) * 1e6
        saturated = self._undisturbed(
            cell, router, lambda: closed_loop("127.0.0.1", port, requests, workload.connections, seconds=self.seconds)
        )
        answered = len(saturated.load.replies)
        cell.cpu_saturated = saturated.router_ns / answered / 1e3
        cell.per_second = answered / saturated.load.seconds
        cell.p50, cell.p99 = saturated.load.quantile(0.5) * 1e6, saturated.load.quantile(0.99) * 1e6
        if workload.rate:
            paced = self._undisturbed(
                cell, router, lambda: open_loop("127.0.0.1", port, requests, workload.rate, self.seconds)
            )
            cell.cpu_paced = paced.router_ns / len(paced.load.replies) / 1e3

    def _measure_streams(
        self, cell: Cell, workload: Workload, port: int, router: Process, requests: Sequence[bytes]
    ) -> None:
        measured = self._undisturbed(
            cell,
            router,
            lambda: closed_loop("127.0.0.1", port, requests, workload.streams, seconds=self.seconds, timestamps=True),
        )
        load = measured.load
        per_chunk = measured.router_ns / max(load.chunks, 1) / 1e3
        if workload.chunk_seconds:
            cell.cpu_paced = per_chunk
        else:
            cell.cpu_saturated = per_chunk
        cell.per_second = load.chunks / load.seconds
        cell.transit_p50 = load.quantile(0.5, load.transit_ns) / 1e3
        cell.transit_p99 = load.quantile(0.99, load.transit_ns) / 1e3
        cell.first_byte_p99 = load.quantile(0.99, [reply.first_byte_seconds for reply in load.replies]) * 1e6

    def _undisturbed(self, cell: Cell, router: Process, run: Callable[[], Coroutine[None, None, Load]]) -> Measured:
        """Repeat until nobody else used the machine, at most `repeats` times; the quietest counts."""
        best: Measured | None = None
        for _ in range(self.repeats):
            own = set(tree(os.getpid()))
            before, router_before, start = Snapshot.take(), tree_cpu_ns(router.pid), time.perf_counter()
            load = uvloop.run(run())
            router_ns, seconds = tree_cpu_ns(router.pid) - router_before, time.perf_counter() - start
            foreign = Snapshot.take().foreign_ns(before, own) / 1e9 / seconds
            cell.failed += len(load.failed)
            if best is None or foreign < best.foreign_share:
                best = Measured(load, router_ns, foreign)
            if foreign <= FOREIGN_SHARE:
                return best
        assert best is not None
        cell.disturbed = True
        return best

    def start_worker(self, workload: Workload, number: int) -> tuple[str, Process]:
        port = free_port()
        process = self.processes.start_module(
            f"worker-{number}",
            "tests.fake_worker",
            *("--port", str(port), "--lean", "--chunks", str(workload.chunks)),
            *("--chunk-seconds", str(workload.chunk_seconds)),
            cpus=self.load_cpus,
        )
        url = f"http://127.0.0.1:{port}"
        process.wait_until_ready(url + "/health", READY_SECONDS)
        return url, process

    def start_router(self, contender: Contender, workload: Workload, urls: list[str]) -> tuple[int, Process]:
        ports = Ports(free_port(), free_port())
        command = contender.command(contender.python(), ports, workload.policy, urls)
        process = self.processes.start(contender.name, command, cpus=self.router_cpus)
        base = f"http://127.0.0.1:{ports.http}"
        process.wait_until_ready(base + "/health", READY_SECONDS)
        probe = json.dumps({"model": "fake-model", "messages": [{"role": "user", "content": "ready?"}]}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {API_KEY}"}
        deadline = time.monotonic() + READY_SECONDS
        while request("POST", base + "/v1/chat/completions", probe, headers)[0] != 200:
            if time.monotonic() > deadline:
                raise process.error("did not answer a chat in time")
            time.sleep(0.1)
        return ports.http, process


def main() -> None:
    parser = argparse.ArgumentParser(description="warmroute against its peers.")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["unary-100"])
    parser.add_argument("--routers", nargs="+", choices=list(CONTENDERS), default=["warmroute", "vllm-router"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of a disturbed measurement (default: %(default)s)")
    parser.add_argument("--unpinned", action="store_true", help="let the scheduler place everything")
    parser.add_argument("--json", type=Path, help="write every cell there")
    arguments = parser.parse_args()
    pinned = not arguments.unpinned and (os.cpu_count() or 1) > 1
    cells: list[Cell] = []
    try:
        for name in arguments.routers:
            CONTENDERS[name].python()
        with Processes(LOGS) as processes:
            bench = Bench(processes, arguments.seconds, arguments.repeats, pinned)
            for workload in (WORKLOADS[name] for name in arguments.workloads):
                requests = workload.build()
                for turn in range(arguments.rounds):
                    order = arguments.routers if turn % 2 == 0 else arguments.routers[::-1]
                    for name in order:
                        cell = bench.cell(CONTENDERS[name], workload, requests)
                        cells.append(cell)
                        cpu = cell.cpu_saturated if cell.cpu_saturated >= 0 else cell.cpu_paced
                        print(f"{workload.name} round {turn + 1} {name}: CPU {cpu:.1f} us", flush=True)
                report(workload, [cell for cell in cells if cell.workload == workload.name], arguments.routers)
    except (ProcessError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench: {error}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))


if __name__ == "__main__":
    main()
