"""The benches run: numbers of a broken bench would be noticed too late."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY


@pytest.mark.slow
def test_router_bench_runs(tmp_path: Path) -> None:
    out = tmp_path / "cells.json"
    workloads = ["unary-100", "unary-32k", "stream-paced", "stream-saturated"]
    bench = subprocess.run(
        [
            *(sys.executable, "-m", "bench.bench_router", "--routers", "warmroute", "--workloads", *workloads),
            *("--rounds", "1", "--seconds", "0.5", "--repeats", "1", "--json", str(out)),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert bench.returncode == 0, bench.stdout + bench.stderr
    cells = json.loads(out.read_text())
    assert [cell["workload"] for cell in cells] == workloads
    for cell in cells:
        assert cell["failed"] == 0
        assert max(cell["cpu_saturated"], cell["cpu_paced"]) > 0
        assert cell["per_second"] > 0


def test_scheduler_bench_runs() -> None:
    command = (sys.executable, "-m", "bench.bench_scheduler", "--running", "1", "3", "--steps", "20", "--rounds", "1")
    bench = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert bench.returncode == 0, bench.stderr
    table = [line.split() for line in bench.stdout.splitlines()[1:]]
    assert [row[:2] for row in table] == [["1", "running"], ["3", "running"]]
    for *_, plan, tokens, together in table:
        assert abs(float(plan) + float(tokens) - float(together)) < 0.2
