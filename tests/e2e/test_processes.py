"""Many processes that act as one: answers, deaths, SIGTERM, SIGHUP. Real processes, a hundred streams."""

import asyncio
import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.load import Load, Reply, chat_body, closed_loop, post
from tests.e2e.fleet import FakeWorkerProcess, Fleet, RouterProcess, chat, eventually, words
from tests.processes import request

STREAMS = 100
STREAM = {"chunks": 40, "chunk_seconds": 0.05}
"""Two seconds."""


def children(router: RouterProcess) -> list[int]:
    """Pids of the data processes, in the order of their start."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(router.process.pid)], capture_output=True, text=True
    )
    lines = [line.split(None, 1) for line in found.stdout.splitlines()]
    return sorted(int(pid) for pid, command in lines if "warmroute.data_process" in command)


def streams(seed: int = 0, count: int = STREAMS) -> list[bytes]:
    return [post("/v1/chat/completions", chat_body(words(20, seed + i), stream=True)) for i in range(count)]


def with_streams(router: RouterProcess, act: Callable[[], None]) -> Load:
    """The replies of `STREAMS` streams, in whose middle `act` is called."""

    def in_the_middle() -> None:
        eventually("all streams run", lambda: sum(router.loads().values()) == STREAMS, 20)
        time.sleep(0.3)
        act()

    async def both() -> Load:
        load, _ = await asyncio.gather(
            closed_loop("127.0.0.1", router.port, streams(), STREAMS, count=STREAMS), asyncio.to_thread(in_the_middle)
        )
        return load

    return asyncio.run(both())


@pytest.fixture
def workers(fleet: Fleet) -> list[FakeWorkerProcess]:
    started = fleet.fake_workers(2)
    for worker in started:
        worker.script(**STREAM)
    return started


def test_two_processes_give_one_answer(fleet: Fleet, workers: list[FakeWorkerProcess]) -> None:
    for worker in workers:
        worker.script()
    router = fleet.router("--processes", "2", workers=workers)
    assert len(children(router)) == 2
    bodies = [post("/v1/chat/completions", json.dumps(chat("s", words(100, seed % 8))).encode()) for seed in range(64)]
    load = asyncio.run(closed_loop("127.0.0.1", router.port, bodies, 16, count=400))
    assert load.failed == []
    # Whatever process a connection falls to, it knows what the other one has sent where.
    seen = [Counter(words[:20] for words in texts(worker)) for worker in workers]
    assert not set(seen[0]) & set(seen[1]), "a prompt went to both workers"
    for _ in range(8):
        metrics = router.metrics()
        assert metrics.total("smg_router_requests_total") == 400
        assert metrics.total("smg_http_responses_total", path="/v1/chat/completions", status_code="200") == 400
        assert metrics.total("warmroute_requests_in_flight") == 0
        assert len(router.workers()) == 2
        assert router.get("/readiness")[1]["healthy_workers"] == 2
    answered = [child for child in children(router) if cpu_ticks(child) > 0]
    assert len(answered) == 2


def texts(worker: FakeWorkerProcess) -> list[str]:
    return [json.loads(seen.body)["messages"][-1]["content"] for seen in worker.requests()]


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_limits_hold_over_all_processes(fleet: Fleet) -> None:
    worker = fleet.fake_worker()
    worker.script(first_byte_seconds=0.05)
    router = fleet.router("--processes", "2", "--max-concurrent-requests", "4", workers=[worker])
    bodies = [post("/v1/chat/completions", chat_body(words(5, seed))) for seed in range(200)]
    most = 0
    watched = True

    def watch() -> None:
        nonlocal most
        while watched:
            most = max(most, worker.counts()["in_flight"])

    async def both() -> Load:
        nonlocal watched
        watching = asyncio.create_task(asyncio.to_thread(watch))
        load = await closed_loop("127.0.0.1", router.port, bodies, 32, count=200)
        watched = False
        await watching
        return load

    load = asyncio.run(both())
    assert load.failed == []
    assert most == 4
    # Four at a time and 50 ms each: whoever ends wakes who waits, also in the other process.
    assert load.seconds < 200 / 4 * 0.05 * 1.6
    metrics = router.metrics()
    assert metrics.total("smg_http_rate_limit_total", result="allowed") == 200
    assert metrics.total("smg_admission_inflight") == 0
    assert metrics.total("smg_admission_queue_depth") == 0


def test_kill_a_child_with_a_hundred_streams(fleet: Fleet, workers: list[FakeWorkerProcess]) -> None:
    router = fleet.router("--processes", "2", workers=workers)
    victim, other = children(router)
    freed: list[float] = []

    def kill() -> None:
        before = sum(router.loads().values())
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        # The streams of the other process go on: what is left must be theirs alone.
        while sum(worker.counts()["in_flight"] for worker in workers) == before:
            time.sleep(0.005)
        eventually(
            "the loads are what the workers have",
            lambda: sum(router.loads().values()) == sum(worker.counts()["in_flight"] for worker in workers) < before,
            1.0,
        )
        freed.append(time.monotonic() - began)

    load = with_streams(router, kill)
    broken = len(load.failed)
    assert 0 < broken < STREAMS, "the streams were all on one process"
    assert freed[0] <= 1.0
    metrics = router.metrics()
    assert metrics.total("warmroute_requests_lost_total") == broken
    assert metrics.total("smg_router_requests_total") == STREAMS
    assert set(router.loads().values()) == {0}
    eventually("there is another one", lambda: len(children(router)) == 2, 3)
    assert victim not in children(router)
    assert other in children(router)
    after = asyncio.run(closed_loop("127.0.0.1", router.port, streams(1000), 50, count=50))
    assert after.failed == []


def test_the_last_child_is_killed_and_nobody_is_refused(fleet: Fleet, workers: list[FakeWorkerProcess]) -> None:
    """The supervisor holds the listening socket: who connects meanwhile waits for the next child."""
    router = fleet.router(workers=workers)
    (victim,) = children(router)
    os.kill(victim, signal.SIGKILL)
    for _ in range(20):
        assert request("GET", router.url + "/health", timeout=10)[0] == 200
    assert children(router) != [victim]


@pytest.mark.slow
def test_a_child_that_stands_still_is_replaced(fleet: Fleet, workers: list[FakeWorkerProcess]) -> None:
    router = fleet.router(workers=workers)
    (stuck,) = children(router)
    os.kill(stuck, signal.SIGSTOP)
    began = time.monotonic()
    eventually("it is replaced", lambda: children(router) not in ([stuck], []), 12)
    assert time.monotonic() - began > 4
    assert request("GET", router.url + "/health", timeout=10)[0] == 200


@pytest.mark.parametrize("processes", ["0", "1", "2"])
def test_sigterm_with_a_hundred_streams(fleet: Fleet, workers: list[FakeWorkerProcess], processes: str) -> None:
    router = fleet.router("--processes", processes, workers=workers)
    load = with_streams(router, lambda: router.process.send(signal.SIGTERM))
    assert load.failed == []
    assert router.process.wait(5) == 0


@pytest.mark.parametrize("processes", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_sighup_with_a_hundred_streams(fleet: Fleet, workers: list[FakeWorkerProcess], processes: str) -> None:
    router = fleet.router("--processes", processes, workers=workers)
    old = children(router)
    known = chat("s", words(400, 7777))
    for worker in workers:
        worker.script()
    assert router.post("/v1/chat/completions", known)[0] == 200
    for worker in workers:
        worker.script(**STREAM)
    ids = {worker["id"] for worker in router.workers()}
    stop = False
    unary: list[Reply] = []

    async def meanwhile() -> None:
        """New connections all the time, and old ones that are used again."""
        while not stop:
            load = await closed_loop(
                "127.0.0.1", router.port, [post("/debug/route", json.dumps(known).encode())], 4, count=20
            )
            unary.extend(load.replies)

    async def all_of_it() -> Load:
        nonlocal stop
        asking = asyncio.create_task(meanwhile())
        running = asyncio.create_task(closed_loop("127.0.0.1", router.port, streams(), STREAMS, count=STREAMS))
        await asyncio.to_thread(
            functools.partial(eventually, "all streams run", lambda: sum(router.loads().values()) == STREAMS, 20)
        )
        router.process.send(signal.SIGHUP)
        load = await running
        await asyncio.sleep(0.2)
        stop = True
        await asking
        return load

    load = asyncio.run(all_of_it())
    assert load.failed == [], router.process.log_tail()
    assert [reply for reply in unary if not reply.ok] == [], router.process.log_tail()
    eventually("new children serve", lambda: not set(children(router)) & set(old) and len(children(router)) == len(old))
    assert router.process.exit_code is None
    # The same workers, the same index, counters that go on.
    assert {worker["id"] for worker in router.workers()} == ids
    explained = router.post("/debug/route", known)[1]
    assert max(candidate["match_bytes"] for candidate in explained["candidates"]) > 2000, explained
    assert router.metrics().total("smg_router_requests_total") == STREAMS + 1
    assert set(router.loads().values()) == {0}
    # And once more.
    router.process.send(signal.SIGHUP)
    now = children(router)
    eventually("again", lambda: not set(children(router)) & set(now) and len(children(router)) == len(old), 20)
    for worker in workers:
        worker.script()
    assert router.post("/v1/chat/completions", known)[0] == 200


def test_connections_that_alternate_between_paths(fleet: Fleet) -> None:
    """Hot paths, the control app behind the data plane, probes, refusals: in turn on one connection, in order."""
    worker = fleet.fake_worker()
    router = fleet.router("--processes", "2", workers=[worker])
    body = json.dumps(chat("s", "u"))
    streaming = json.dumps(chat("s", "u", stream=True))
    wanted = [
        ("POST", "/v1/chat/completions", body, 200),
        ("GET", "/workers", None, 200),
        ("POST", "/v1/chat/completions", streaming, 200),
        ("GET", "/nothing", None, 404),
        ("POST", "/generate", "{", 400),
        ("GET", "/health", None, 200),
        ("HEAD", "/health", None, 200),
        ("GET", "/metrics", None, 200),
        ("DELETE", "/workers/x", None, 400),
        ("GET", "/v1/chat/completions", None, 405),
    ]
    for _ in range(4):
        connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=10)
        connection.connect()
        opened = connection.sock
        for _ in range(5):
            for method, path, content, status in wanted:
                connection.request(method, path, content, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                assert answer.status == status, (method, path)
        assert connection.sock is opened
        connection.close()


def test_children_end_with_their_supervisor(fleet: Fleet) -> None:
    router = fleet.router("--processes", "2", workers=fleet.fake_workers(1))
    pids = children(router)
    assert len(pids) == 2
    os.kill(router.process.pid, signal.SIGKILL)
    eventually("they are gone", lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 2)


def test_the_service_manager_is_told(fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sd_notify(3), with the socket that systemd would have made."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        router = fleet.router(workers=fleet.fake_workers(1))
        assert manager.recv(1000) == b"READY=1"
        router.process.send(signal.SIGHUP)
        assert manager.recv(1000).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(1000) == b"READY=1"
        router.process.send(signal.SIGTERM)
        assert manager.recv(1000) == b"STOPPING=1"
        assert router.process.wait(10) == 0
