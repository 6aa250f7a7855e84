"""`launch_server` as a process, with the scripted fake worker in the place of the real one."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.processes import free_port
from warmroute.launch_server import worker_plan
from warmroute.worker_processes import hold_ports

REPOSITORY = Path(__file__).parents[2]

# Stands for warmroute_worker.launch_worker: notes its pid and flags, then is the fake worker, or dies as told.
STAND_IN = """
    import os, sys, time
    from pathlib import Path
    port = sys.argv[sys.argv.index("--port") + 1]
    Path(os.environ["STAND_IN_NOTES"], port).write_text(f"{os.getpid()}\\n{' '.join(sys.argv[1:])}")
    fate = os.environ.get("STAND_IN_FATE", "")
    if fate == "die" or (fate == "one dies" and sys.argv[0] and port == os.environ["STAND_IN_PORT"]):
        time.sleep(0.5)
        sys.exit("the model is too large")
    from tests.fake_worker.__main__ import main
    sys.argv[1:] = ["--port", port]
    main()
"""


class Server:
    def __init__(self, process: subprocess.Popen[bytes], notes: Path, log_path: Path, url: str, base_port: int) -> None:
        self.process = process
        self.url = url
        self.base_port = base_port
        self._notes = notes
        self._log_path = log_path

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def workers(self) -> dict[int, tuple[int, str]]:
        """Port -> (pid, flags) of every worker that was started."""
        found = {}
        for path in sorted(self._notes.iterdir()):
            pid, flags = path.read_text().split("\n")
            found[int(path.name)] = (int(pid), flags)
        return found

    def leaves_nothing(self) -> bool:
        """Whether all workers are gone within a moment."""
        for _ in range(100):
            if not any(Path(f"/proc/{pid}").exists() for pid, _ in self.workers().values()):
                return True
            time.sleep(0.05)
        return False

    async def ready_workers(self, count: int) -> None:
        async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(20.0):
            while True:
                try:
                    answer = (await http.get(f"{self.url}/readiness")).json()
                    if answer["healthy_workers"] == count:
                        return
                except httpx.TransportError:
                    assert self.process.poll() is None, self.log
                await asyncio.sleep(0.05)


@contextmanager
def launched(tmp_path: Path, *flags: str, fate: str = "", port: int = 0) -> Iterator[Server]:
    package, notes, log_path = tmp_path / "warmroute_worker", tmp_path / "notes", tmp_path / "log"
    package.mkdir()
    notes.mkdir()
    (package / "__init__.py").write_text("")
    (package / "launch_worker.py").write_text(textwrap.dedent(STAND_IN))
    base_port = free_port()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "STAND_IN_NOTES": str(notes),
        "STAND_IN_FATE": fate,
        "STAND_IN_PORT": str(base_port + 1),
    }
    port = port or free_port()
    command = [sys.executable, "-m", "warmroute.launch_server", "--model-path", "demo", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--router-dp-worker-base-port", str(base_port)]
    command += ["--router-prometheus-host", "127.0.0.1", "--router-prometheus-port", str(free_port()), *flags]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env=environment, cwd=REPOSITORY)
    server = Server(process, notes, log_path, f"http://127.0.0.1:{port}", base_port)
    try:
        yield server
    finally:
        process.kill()
        process.wait()
        assert server.leaves_nothing(), server.log


async def test_two_workers_and_a_router(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp-size", "2", "--router-policy", "round_robin", "--page-size", "32") as server:
        await server.ready_workers(2)
        assert len(server.workers()) == 2
        threads = max(1, len(os.sched_getaffinity(0)) // 2)
        for port, (_, flags) in server.workers().items():
            expected = f"--model-path demo --page-size 32 --threads {threads} --host 127.0.0.1 --port {port}"
            assert flags == expected
        async with httpx.AsyncClient(trust_env=False, base_url=server.url) as http:
            assert (await http.get("/config")).json()["policy"]["value"] == "round_robin"
            body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            seen = {(await http.post("/v1/chat/completions", json=body)).headers["x-fake-worker"] for _ in range(4)}
            assert len(seen) == 2
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, 10) == 0
        assert server.leaves_nothing()
        assert "Traceback" not in server.log


async def test_interrupt_of_the_whole_foreground_group_ends_it_in_order(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp", "2") as server:
        await server.ready_workers(2)
        server.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(server.process.wait, 10) == 0
        assert server.leaves_nothing()


@pytest.mark.parametrize("fate", ["die", "one dies"])
async def test_worker_that_cannot_start_ends_everything(tmp_path: Path, fate: str) -> None:
    with launched(tmp_path, "--data-parallel-size", "2", fate=fate) as server:
        assert await asyncio.to_thread(server.process.wait, 20) == 1
        assert "the model is too large" in server.log
        assert "launch_server: error: worker" in server.log
        assert "ended with status 1 before it was ready" in server.log
        assert server.leaves_nothing()


async def test_router_that_cannot_start_ends_everything(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with launched(tmp_path, "--dp", "2", port=port) as server:
            assert await asyncio.to_thread(server.process.wait, 20) == 1
            assert f"launch_server: error: cannot listen on 127.0.0.1:{port}" in server.log
            assert server.leaves_nothing()


async def test_death_of_the_launcher_leaves_no_worker(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp", "2") as server:
        await server.ready_workers(2)
        server.process.kill()
        server.process.wait()
        assert server.leaves_nothing()


async def test_one_worker_may_die_later_but_not_all(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp", "2", "--router-health-check-interval-secs", "0.2") as server:
        await server.ready_workers(2)
        await asyncio.sleep(0.5)  # the launcher has its own look at them
        first, second = (pid for pid, _ in server.workers().values())
        os.kill(first, signal.SIGKILL)
        await server.ready_workers(1)
        assert server.process.poll() is None
        os.kill(second, signal.SIGKILL)
        assert await asyncio.to_thread(server.process.wait, 10) == 1
        assert "no worker is left" in server.log


PLANS = [
    (2, False, [], (2, ["--model-path", "m", "--threads", "4"])),
    (3, False, ["--threads", "1"], (3, ["--model-path", "m", "--threads", "1"])),
    (3, False, ["--threads=1"], (3, ["--model-path", "m", "--threads=1"])),
    (1, False, ["--tp", "2"], (1, ["--model-path", "m", "--tp", "2", "--threads", "4"])),
    (
        2,
        False,
        ["--tp-size=2", "--pp-size", "2"],
        (2, ["--model-path", "m", "--tp-size=2", "--pp-size", "2", "--threads", "1"]),
    ),
    (1, False, ["--tp", "x"], (1, ["--model-path", "m", "--tp", "x", "--threads", "8"])),
    (1, False, ["--page-size", "8", "--tp"], (1, ["--model-path", "m", "--page-size", "8", "--tp", "--threads", "8"])),
    (16, False, [], (16, ["--model-path", "m", "--threads", "1"])),
    (
        2,
        True,
        ["--tp", "2"],
        (1, ["--model-path", "m", "--tp", "2", "--dp-size", "2", "--enable-dp-attention", "--threads", "4"]),
    ),
]


@pytest.mark.parametrize(("dp_size", "dp_attention", "rest", "plan"), PLANS)
def test_worker_plan(dp_size: int, dp_attention: bool, rest: list[str], plan: tuple[int, list[str]]) -> None:
    assert worker_plan("m", dp_size, dp_attention, rest, cores=8) == plan


def test_held_ports_are_taken_for_everybody_else() -> None:
    base = free_port()
    first = hold_ports(2, base)
    second = hold_ports(2, base)
    ports = [held.port for held in (*first, *second)]
    assert len(set(ports)) == 4
    assert ports == sorted(ports)
    for held in (*first, *second):
        held.close()


BAD_LINES = [
    ("", "--model-path"),
    ("--model-path demo --dp 0", "dp_size: 0"),
    ("--model-path demo --router-policy best", "--router-policy"),
    ("--model-path demo --router-cache-threshold 7", "cache_threshold: 7.0"),
    ("--model-path demo --router-mini-lb", "--router-mini-lb: prefill/decode"),
    ("--model-path demo --router-no-such-flag 1", "--router-no-such-flag: the router has no such flag"),
    ("--model-path demo --router-dp-worker-base-port 0", "router_dp_worker_base_port"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES)
def test_complaints(line: str, complaint: str) -> None:
    command = [sys.executable, "-m", "warmroute.launch_server", *line.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert ended.stderr.count("\n") == 1
