"""python -m bench.simulator: routing policies on simulated fleets."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from bench.simulator.engine import Worker
from bench.simulator.plots import draw
from bench.simulator.presets import PRESETS
from bench.simulator.report import Row, reachable, row, table
from bench.simulator.routers import make_router
from bench.simulator.simulation import Outcome, Simulation
from bench.simulator.trace import read_trace
from bench.simulator.workload import Workload
from bench.simulator.workloads import WORKLOADS
from warmroute._core import policy_names


def run(workload: Workload, router: str, seed: int) -> tuple[Row, Outcome]:
    workers = [Worker(workload.engine, workload.ranks) for _ in range(workload.workers)]
    outcome = Simulation(workload, workers, make_router(router, workload, workers, seed)).run()
    return row(router, workload, outcome), outcome


def simulate(workload: Workload, routers: list[str], seed: int, plots: Path | None = None) -> list[Row]:
    """One row per router; prints a table, and draws a picture into the folder `plots`."""
    rows: list[Row] = []
    runs: list[tuple[Row, Outcome]] = []
    limits = (0.0, 0.0)
    for name in routers:
        result, outcome = run(workload, name, seed)
        if not rows:
            limits = reachable(workload, outcome.reached)
        rows.append(result)
        if plots is not None:
            runs.append((result, outcome))
        print(f"{workload.name} {name} done", file=sys.stderr, flush=True)
    print(table(workload, rows, limits), flush=True)
    if plots is not None:
        print(f"drawn: {draw(plots, workload, runs, limits)}", file=sys.stderr)
    return rows


def main() -> None:
    routers = [*policy_names(), *PRESETS]
    parser = argparse.ArgumentParser(prog="python -m bench.simulator", description="Policies on simulated fleets.")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="W")
    parser.add_argument(
        "--routers", nargs="+", choices=routers, default=routers, metavar="NAME", help=", ".join(routers)
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a request trace (trace.py) instead of workloads")
    parser.add_argument("--requests", type=int, default=0, help="of the trace, from its beginning; 0: all")
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster than recorded the trace arrives")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw a picture of each workload there")
    arguments = parser.parse_args()
    if arguments.plots is not None and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install 'warmroute[plots]'")
    if arguments.trace is not None:
        try:
            workload = read_trace(arguments.trace, arguments.requests, arguments.speed)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        simulate(workload, arguments.routers, arguments.seed, arguments.plots)
        return
    for name in arguments.workloads:
        simulate(WORKLOADS[name](arguments.seed), arguments.routers, arguments.seed, arguments.plots)


if __name__ == "__main__":
    main()
