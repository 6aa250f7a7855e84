"""`python -m bench.bench_exchange`: one request and its answer through the data plane without sockets or kernel.

What it prints is the router's own work: protocols, exchange and core. CPU time depends on the machine's other work;
`--instructions` (Linux, valgrind) counts what hardly depends on anything.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import monotonic_ns
from typing import cast

from bench.contenders import API_KEY
from bench.workloads import WORKLOADS
from tests.fake_worker.lean import UNARY
from warmroute.config import RouterConfig
from warmroute.dataplane import DataPlane
from warmroute.dataplane.worker_connection import WorkerConnection
from warmroute.directory import Directory, WorkerAddress
from warmroute.engine import build_core

WORKLOAD_NAMES = ("unary-100", "unary-1k")
WARM_UP = 300
RUNS = 40


class _Transport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.last = b""
        self.writes = 0

    def write(self, data: bytes) -> None:
        self.last = data
        self.writes += 1

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        """The plane is closed."""

    abort = close


async def _exchanges(workload: str, count: int, runs: int) -> list[float]:
    """CPU us per exchange of each run."""
    config = RouterConfig(seed=1, hash_seed=1, policy="round_robin", api_key=API_KEY)
    core, directory = build_core(config), Directory()
    slots = core.add_worker(["fake-model"], 1, 262_144, None, monotonic_ns())
    address = WorkerAddress.of("worker", "http://127.0.0.1:9", None)
    directory.put(slots, address, ("fake-model",), [core.target(slots[0]).incarnation])
    for _ in range(2):
        core.observe_probe(slots[0], True, monotonic_ns())

    async def no_control_app() -> None:
        raise OSError

    plane = DataPlane(config, core, directory, no_control_app)  # type: ignore[arg-type]
    client_transport, worker_transport = _Transport(), _Transport()
    client, worker = plane.protocol_factory(), WorkerConnection(plane.new_pool(address))
    client.connection_made(cast(asyncio.Transport, client_transport))
    worker.connection_made(cast(asyncio.Transport, worker_transport))
    plane.pools[address.worker_id].idle.append(worker)
    requests = WORKLOADS[workload].build()[:64]

    def run(number: int) -> float:
        start = time.process_time()
        for index in range(number):
            client.data_received(requests[index % len(requests)])
            worker.data_received(UNARY)
        return (time.process_time() - start) / number * 1e6

    run(WARM_UP)
    spent = [run(count) for _ in range(runs)]
    assert client_transport.last.startswith(b"HTTP/1.1 200")
    assert client_transport.writes == worker_transport.writes
    plane.close()
    return spent


def _instructions(workload: str, count: int) -> int:
    """Of a whole process that makes so many exchanges."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={out}"]
        command += [sys.executable, "-m", "bench.bench_exchange", "--workloads", workload, "--once", str(count)]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        summary = next(line for line in out.read_text().splitlines() if line.startswith("summary:"))
        return int(summary.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="The data plane without sockets.")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOAD_NAMES, default=list(WORKLOAD_NAMES))
    parser.add_argument("--instructions", action="store_true", help="count them, too (valgrind; a minute)")
    parser.add_argument("--once", type=int, help="make so many exchanges, and print nothing")
    arguments = parser.parse_args()
    for workload in arguments.workloads:
        if arguments.once:
            asyncio.run(_exchanges(workload, arguments.once, 1))
            continue
        spent = asyncio.run(_exchanges(workload, 1_000, RUNS))
        line = f"{workload}: {min(spent):.2f} us at best, {statistics.median(spent):.2f} us at the median"
        if arguments.instructions:
            more, fewer = _instructions(workload, 3_000), _instructions(workload, 1_000)
            line += f", {(more - fewer) / 2_000:,.0f} instructions"
        print(line, flush=True)


if __name__ == "__main__":
    main()
