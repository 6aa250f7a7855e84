"""`make demo`, without its set-up."""

import os
import subprocess
import sys

import pytest

from tests.processes import REPOSITORY


@pytest.mark.timeout(240)
def test_demo_proves_its_point_and_leaves_nothing() -> None:
    demo = subprocess.run(
        [sys.executable, "-m", "bench.demo"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
        env=os.environ | {"NO_COLOR": "1"},
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""
    rows = [line for line in demo.stdout.splitlines() if "│" in line or "|" in line]
    assert len(rows) >= 40, demo.stdout
    assert "hit rate" in demo.stdout
