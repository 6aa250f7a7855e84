"""`launch_server` as a process, with the scripted fake worker in the place of the real one."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.processes import free_port
from warmroute.worker_processes import hold_ports

REPOSITORY = Path(__file__).parents[2]

# Stands for warmroute_worker.launch_worker: notes its pid and flags, then is the fake worker, or dies as told.
STAND_IN = """
    import os, sys, time
    from pathlib import Path
    port = sys.argv[sys.argv.index("--port") + 1]
    if "--dry-run" in sys.argv:
        print("the ranks of", port)
        sys.exit("launch_worker: error: no" if "--bad" in sys.argv else 0)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    Path(os.environ["STAND_IN_NOTES"], port).write_text(f"{os.getpid()}\\n{' '.join(sys.argv[1:])}\\n{devices}")
    fate = os.environ.get("STAND_IN_FATE", "")
    if fate == "die" or (fate == "one dies" and sys.argv[0] and port == os.environ["STAND_IN_PORT"]):
        time.sleep(0.5)
        print("the model is too large", file=sys.stderr)
        sys.exit(7)
    from tests.fake_worker.__main__ import main
    sys.argv[1:] = ["--port", port]
    main()
"""


@dataclass(frozen=True)
class Started:
    """What a stand-in noted."""

    pid: int
    flags: str
    devices: str


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

    def workers(self) -> dict[int, Started]:
        """By port, every worker that was started."""
        found = {}
        for path in sorted(self._notes.iterdir()):
            pid, flags, devices = path.read_text().split("\n")
            found[int(path.name)] = Started(int(pid), flags, devices)
        return found

    def leaves_nothing(self) -> bool:
        """Whether all workers are gone within a moment."""
        for _ in range(100):
            if not any(Path(f"/proc/{started.pid}").exists() for started in self.workers().values()):
                return True
            time.sleep(0.05)
        return False

    async def ready_workers(self, count: int) -> None:
        async with httpx.AsyncClient(trust_env=False) as http, asyncio.timeout(60.0):
            while True:
                try:
                    answer = (await http.get(f"{self.url}/readiness")).json()
                    if answer["healthy_workers"] == count:
                        return
                except httpx.TransportError:
                    assert self.process.poll() is None, self.log
                await asyncio.sleep(0.05)


@contextmanager
def launched(tmp_path: Path, *flags: str, fate: str = "", port: int = 0, devices: str = "") -> Iterator[Server]:
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
        "CUDA_VISIBLE_DEVICES": devices,
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
        for port, started in server.workers().items():
            expected = f"--model-path demo --page-size 32 --threads {threads} --host 127.0.0.1 --port {port}"
            assert started.flags == expected
        async with httpx.AsyncClient(trust_env=False, base_url=server.url) as http:
            assert (await http.get("/config")).json()["policy"]["value"] == "round_robin"
            body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            seen = {(await http.post("/v1/chat/completions", json=body)).headers["x-fake-worker"] for _ in range(4)}
            assert len(seen) == 2
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert server.leaves_nothing()
        assert "Traceback" not in server.log


async def test_sigterm_stops_accepting_then_drains_then_stops_the_workers(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp-size", "2") as server:
        await server.ready_workers(2)
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            for port in server.workers():
                script = {"chunks": 30, "chunk_seconds": 0.1}
                assert (await http.post(f"http://127.0.0.1:{port}/_script", json=script)).status_code == 200
            body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True}
            async with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
                pieces = answer.aiter_text()
                text = await anext(pieces)
                server.process.send_signal(signal.SIGTERM)
                await _until(lambda: refuses(server.url))
                loads = [(await http.get(f"http://127.0.0.1:{port}/get_load")).json() for port in server.workers()]
                running = sum(rank["num_reqs"] for load in loads for rank in load)
                assert running == 1, "all workers are there, and the answer is not over, when nobody else is let in"
                async for piece in pieces:
                    text += piece
            assert text.rstrip().endswith("data: [DONE]")
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert server.leaves_nothing()


def refuses(url: str) -> bool:
    """Whether new connections are refused, or their requests answered 503."""
    try:
        return httpx.post(f"{url}/v1/chat/completions", json={"model": "m", "messages": []}).status_code == 503
    except httpx.TransportError:
        return True


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.02)


async def test_each_worker_has_devices_of_its_own(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp", "2", "--tp", "2", devices="4,5,6,GPU-7") as server:
        await server.ready_workers(2)
        assert [started.devices for started in server.workers().values()] == ["4,5", "6,GPU-7"]


async def test_dry_run_says_everything_and_starts_nothing(tmp_path: Path) -> None:
    flags = ("--dp", "2", "--tp", "2", "--router-policy", "least_load", "--api-key", "hidden", "--router-seed", "7")
    with launched(tmp_path, *flags, "--page-size", "8", "--dry-run", devices="0,1,2") as server:
        assert await asyncio.to_thread(server.process.wait, 60) == 0
        assert server.workers() == {}, "none was started"
        first, second = server.base_port, server.base_port + 1
        threads = max(1, len(os.sched_getaffinity(0)) // 4)
        lines = server.log.splitlines()
        assert lines[:2] == [
            "2 workers of 2 ranks, and the router in front",
            "4 ranks share 3 CUDA devices: say --mem-fraction-static, or the worker that starts first takes the memory "
            "that others need",
        ]
        router = next(line for line in lines if line.startswith("    launch_router "))
        assert f"--worker-urls http://127.0.0.1:{first} http://127.0.0.1:{second} " in router
        assert "--policy least_load" in router
        assert "--seed 7" in router
        assert "--api-key '***'" in router
        assert "hidden" not in server.log
        common = f"python -m warmroute_worker.launch_worker --model-path demo --tp 2 --page-size 8 --threads {threads}"
        for index, (port, devices) in enumerate([(first, "0,1"), (second, "2,0")]):
            at = lines.index(f"worker {index} at http://127.0.0.1:{port}, CUDA devices {devices.replace(',', ', ')}")
            command = f"  CUDA_VISIBLE_DEVICES={devices} {common} --host 127.0.0.1 --port {port}"
            assert lines[at + 1 : at + 3] == [command, f"  the ranks of {port}"]


async def test_dry_run_of_what_a_worker_refuses(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp", "2", "--dry-run", "--bad") as server:
        assert await asyncio.to_thread(server.process.wait, 60) == 1
        assert server.log == "launch_worker: error: no\nlaunch_server: error: worker 0 would not start\n"


async def test_interrupt_of_the_whole_foreground_group_ends_it_in_order(tmp_path: Path) -> None:
    with launched(tmp_path, "--dp", "2") as server:
        await server.ready_workers(2)
        server.process.send_signal(signal.SIGINT)
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert server.leaves_nothing()


@pytest.mark.parametrize("fate", ["die", "one dies"])
async def test_worker_that_cannot_start_ends_everything(tmp_path: Path, fate: str) -> None:
    with launched(tmp_path, "--data-parallel-size", "2", fate=fate) as server:
        assert await asyncio.to_thread(server.process.wait, 60) == 7, "the worker's status"
        assert "the model is too large" in server.log
        assert "launch_server: error: worker" in server.log
        assert "ended with status 7 before it was ready" in server.log
        assert server.leaves_nothing()


async def test_router_that_cannot_start_ends_everything(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with launched(tmp_path, "--dp", "2", port=port) as server:
            assert await asyncio.to_thread(server.process.wait, 60) == 1
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
        first, second = (started.pid for started in server.workers().values())
        os.kill(first, signal.SIGKILL)
        await server.ready_workers(1)
        assert server.process.poll() is None
        os.kill(second, signal.SIGKILL)
        assert await asyncio.to_thread(server.process.wait, 30) == 1
        assert "no worker is left" in server.log


def test_held_ports_are_taken_for_everybody_else() -> None:
    base = free_port()
    first = hold_ports(2, base)
    second = hold_ports(2, base)
    ports = [held.port for held in (*first, *second)]
    assert len(set(ports)) == 4
    assert ports == sorted(ports)
    for held in (*first, *second):
        held.close()


def test_ports_that_the_router_wants_are_left_to_it() -> None:
    base = free_port()
    held = hold_ports(2, base, (base, base + 1))
    assert all(one.port > base + 1 for one in held)
    for one in held:
        one.close()


async def test_the_router_may_have_the_first_ports_of_the_workers(tmp_path: Path) -> None:
    first = free_port()
    ports = ("--router-dp-worker-base-port", str(first), "--router-prometheus-port", str(first + 1))
    with launched(tmp_path, "--dp", "2", *ports, "--dry-run", port=first) as server:
        assert await asyncio.to_thread(server.process.wait, 60) == 0
        assert f"router at http://127.0.0.1:{first}, metrics at http://127.0.0.1:{first + 1}:" in server.log
        urls = [line.split(" at ")[1] for line in server.log.splitlines() if line.startswith("worker ")]
        assert len(urls) == 2
        assert not {f"http://127.0.0.1:{first}", f"http://127.0.0.1:{first + 1}"} & set(urls)


BAD_LINES = [
    ("", "--model-path"),
    ("--model-path demo --dp 0", "dp_size: 0"),
    ("--model-path demo --router-policy best", "--router-policy"),
    ("--model-path demo --router-cache-threshold 7", "cache_threshold: 7.0"),
    ("--model-path demo --router-mini-lb", "--router-mini-lb: prefill/decode"),
    ("--model-path demo --router-no-such-flag 1", "--router-no-such-flag: the router has no such flag"),
    ("--model-path demo --router-dp-worker-base-port 0", "router_dp_worker_base_port"),
    ("--model-path demo --tp 2 --nnodes 2 --node-rank 0", "--nnodes: start launch_worker on each node"),
    ("--model-path demo --nnodes=2", "--nnodes: start launch_worker on each node"),
]


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES)
def test_complaints(line: str, complaint: str) -> None:
    command = [sys.executable, "-m", "warmroute.launch_server", *line.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert ended.stderr.count("\n") == 1
