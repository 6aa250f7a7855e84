"""`launch_worker` as a real process, with the real driver or the scripted one."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ROOT = Path(__file__).parents[2]
_WITH_FAKE_DRIVER = (
    "import sys\n"
    "from warmroute_worker import launch_worker, supervisor\n"
    "supervisor.DRIVER_MODULE = 'tests.worker.fake_driver'\n"
    "sys.exit(launch_worker.main())\n"
)


@dataclass
class WorkerProcess:
    process: subprocess.Popen[str]
    stderr: list[str]
    _reader: threading.Thread

    def url(self, timeout: float = 60) -> str:
        """Where it listens, once it is ready."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"ready on (http://\S+)", "".join(self.stderr)):
                return found.group(1)
            time.sleep(0.01)
        raise AssertionError(f"not ready after {timeout} s: {self.stderr}")

    def child(self, module: str) -> int:
        """The pid of the process that runs `module`."""
        return next(pid for pid, command in children(self.process.pid).items() if module in command)

    def wait(self, timeout: float) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def worker_process(
    *argv: str,
    fake_driver: bool = False,
    program: str | None = None,
    prefix: Sequence[str] = (),
    **environment: str,
) -> Iterator[WorkerProcess]:
    """Killed at the end if it still runs; its children then die by themselves.

    `program`: Python code instead of the launcher. `prefix`: a command that runs another one, in its own process.
    """
    start = ["-c", _WITH_FAKE_DRIVER] if fake_driver else ["-m", "warmroute_worker.launch_worker"]
    start = start if program is None else ["-c", program]
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "workers")])
    process = subprocess.Popen(
        [*prefix, sys.executable, *start, *argv],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    lines: list[str] = []
    assert process.stderr is not None
    stream = process.stderr
    reader = threading.Thread(target=lambda: lines.extend(iter(stream.readline, "")), daemon=True)
    reader.start()
    try:
        yield WorkerProcess(process, lines, reader)
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        stream.close()


def children(pid: int) -> dict[int, str]:
    """Living processes that `pid` started, with their command lines (Linux)."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError, IndexError):
            continue
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def health(url: str) -> int | None:
    """The status; None when nobody listens."""
    try:
        return httpx.get(url + "/health", timeout=5).status_code
    except httpx.TransportError:
        return None


def until(condition: object, timeout: float) -> float:
    """Waits for `condition()` and returns the seconds that took."""
    assert callable(condition)
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, "waited too long"
        time.sleep(0.005)
    return time.monotonic() - started
