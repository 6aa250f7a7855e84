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
