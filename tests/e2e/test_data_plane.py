"""Drills of the data plane on real processes: bad workers, bad clients, aborts, the books."""

import asyncio
import functools
import json
import os
import threading
import time
from pathlib import Path

import pytest

from bench.load import Load, chat_body, closed_loop, post
from tests.e2e.fleet import FakeWorkerProcess, Fleet, RouterProcess, chat, eventually, words
from tests.e2e.test_processes import children
from tests.processes import request

CHAT = "/v1/chat/completions"
CONNECTIONS = 64


def bodies(count: int, first: int = 0, *, stream: bool = False) -> list[bytes]:
    return [post(CHAT, chat_body(words(20, first + i), stream=stream)) for i in range(count)]


def run(router: RouterProcess, requests: list[bytes], connections: int = CONNECTIONS) -> Load:
    return asyncio.run(closed_loop("127.0.0.1", router.port, requests, connections, count=len(requests)))


@pytest.mark.parametrize(
    "misbehaviour",
    [
        {"stall": True},
        {"reset_before_answer": True},
        {"garbage": True},
        pytest.param({"idle_close_seconds": 1.0}, marks=pytest.mark.slow),
        {"status": 503},
    ],
    ids=lambda script: "-".join(script),
)
def test_one_bad_worker_of_two_costs_no_request(fleet: Fleet, misbehaviour: dict[str, object]) -> None:
    bad, good = fleet.fake_workers(2)
    router = fleet.router("--first-byte-timeout-secs", "0.5", workers=[bad, good])
    bad.script(**misbehaviour)
    good.script(first_byte_seconds=0.002)
    load = run(router, bodies(1500))
    assert [reply.status for reply in load.failed] == []
    if "idle_close_seconds" in misbehaviour:  # right at the moment of the close, again and again
        for seed in range(20):
            time.sleep(0.9 + seed * 0.01)
            burst = run(router, bodies(64, 10_000 + 64 * seed))
            assert [reply.status for reply in burst.failed] == []
            if seed >= 6:
                break
    eventually("loads are 0", lambda: set(router.loads().values()) == {0})


def test_a_worker_that_resets_after_k_chunks(fleet: Fleet) -> None:
    """What has begun cannot go elsewhere: it ends with an error event, and nothing else is touched."""
    bad, good = fleet.fake_workers(2)
    router = fleet.router("--policy", "round_robin", workers=[bad, good])
    bad.script(chunks=6, chunk_seconds=0.005, reset_after_chunks=3)
    good.script(chunks=6, chunk_seconds=0.005)
    load = asyncio.run(
        closed_loop("127.0.0.1", router.port, bodies(400, stream=True), CONNECTIONS, count=400, keep_bodies=True)
    )
    assert {reply.status for reply in load.replies} == {200}
    assert load.failed
    for reply in load.failed:
        assert b'"upstream_stream_broken"' in reply.body
        assert b"[DONE]" not in reply.body
    eventually("loads are 0", lambda: set(router.loads().values()) == {0})
    assert len(load.failed) == bad.counts()["broken"]


def test_an_abort_reaches_the_worker_that_has_the_request(fleet: Fleet) -> None:
    workers = fleet.fake_workers(3)
    router = fleet.router("--processes", "2", workers=workers)
    for worker in workers:
        worker.script(chunks=2000, chunk_seconds=0.02)
    one = post(CHAT, json.dumps(chat("s", "first", stream=True, rid="mine-1")).encode())
    two = post(CHAT, chat_body("second", stream=True), headers="x-request-id: mine-2\r\n")
    three = post(CHAT, chat_body("third", stream=True))

    def aborted() -> list[int]:
        return [worker.counts()["aborted"] for worker in workers]

    def abort() -> None:
        eventually("all run", lambda: sum(router.loads().values()) == 3)
        for name in ("mine-1", "mine-2"):
            before = sum(aborted())
            status, answer = router.post("/abort_request", {"rid": name})
            assert (status, answer["status"], len(answer["told"])) == (200, "success", 1)
            eventually("it is aborted", functools.partial(lambda was: sum(aborted()) == was + 1, before))
        status, answer = router.post("/abort_request", {"rid": "nobody-knows"})
        assert (status, len(answer["told"])) == (200, 3)
        assert sum(aborted()) == 2
        assert router.post("/abort_request", {"abort_all": True})[0] == 200
        assert router.post("/abort_request", {})[0] == 400
        assert router.post_bytes("/abort_request", b"[]")[0] == 400

    async def both() -> Load:
        load, _ = await asyncio.gather(
            closed_loop("127.0.0.1", router.port, [one, two, three], 3, count=3), asyncio.to_thread(abort)
        )
        return load

    load = asyncio.run(both())
    assert load.failed == []
    assert sum(aborted()) == 3
    assert set(router.loads().values()) == {0}


def test_the_books_balance_at_every_moment(fleet: Fleet) -> None:
    """Accepted, answered and in flight are counted in three places; answers, errors, cancels and refusals all count."""
    workers = fleet.fake_workers(2)
    router = fleet.router("--processes", "2", "--retry-initial-backoff-ms", "1", workers=workers)
    workers[0].script(first_byte_seconds=0.003, status=503, times=300)
    workers[1].script(first_byte_seconds=0.003, chunk_seconds=0.001)
    over = threading.Event()
    unbalanced: list[object] = []
    snapshots = 0

    def look() -> None:
        nonlocal snapshots
        while not over.is_set():
            for ledger in router.get("/debug/ledgers")[1]:
                snapshots += 1
                if ledger["accepted"] != ledger["answered"] + ledger["in_flight"]:
                    unbalanced.append(ledger)

    async def leave_early() -> None:
        for _ in range(40):
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(bodies(1, 99, stream=True)[0])
            await asyncio.sleep(0.002)
            writer.close()
            del reader

    async def everything() -> None:
        watching = asyncio.create_task(asyncio.to_thread(look))
        mixed = [*bodies(900), *bodies(600, stream=True), post(CHAT, b'{"broken"')] * 2
        loads = closed_loop("127.0.0.1", router.port, mixed, CONNECTIONS, count=len(mixed))
        await asyncio.gather(loads, *(leave_early() for _ in range(4)))
        over.set()
        await watching

    asyncio.run(everything())
    assert snapshots > 100  # how many there are depends on how fast the router is beside the one who looks
    assert unbalanced == []
    eventually("nothing is in flight", lambda: sum(x["in_flight"] for x in router.get("/debug/ledgers")[1]) == 0)
    ledgers = router.get("/debug/ledgers")[1]
    assert sum(ledger["accepted"] for ledger in ledgers) >= 3002
    assert router.metrics().total("smg_router_requests_total") == sum(ledger["accepted"] for ledger in ledgers)


def resident_bytes(pids: list[int]) -> int:
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_slow_client_beside_a_fast_stream(fleet: Fleet) -> None:
    """1 kB/s for 30 s: the worker waits, the memory does not grow, and the fast stream does not notice."""
    worker = fleet.fake_worker()
    router = fleet.router(workers=[worker])
    run(router, bodies(200), 8)
    worker.script(chunks=30_000, chunk_bytes=1000, chunk_seconds=0.001)
    stream = post(CHAT, chat_body("slow", stream=True))
    pids = [router.process.pid, *children(router)]

    async def slow() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1024)
        writer.write(stream)
        await reader.readuntil(b"\r\n\r\n")
        got = 0
        loop = asyncio.get_running_loop()
        end = loop.time() + 30
        while loop.time() < end:
            await asyncio.sleep(1)
            got += len(await reader.read(1000))
        writer.transport.abort()
        return got

    async def fast() -> float:
        """The longest pause between two reads."""
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(post(CHAT, chat_body("fast", stream=True)))
        loop = asyncio.get_running_loop()
        end = loop.time() + 30
        longest, last = 0.0, end
        while loop.time() < end:
            assert await reader.read(1 << 16)
            if loop.time() > end - 25:  # the worker makes its answer up before it begins
                longest = max(longest, loop.time() - last)
            last = loop.time()
        writer.transport.abort()
        return longest

    async def both() -> tuple[int, float, int]:
        running = asyncio.gather(slow(), fast())
        await asyncio.sleep(3)  # sockets and buffers have what they need
        before = resident_bytes(pids)
        got, longest = await running
        return got, longest, resident_bytes(pids) - before

    got, longest, grown = asyncio.run(both())
    assert 0 < got < 100_000
    assert longest < 1.0
    assert grown < 2_000_000
    eventually("loads are 0", lambda: set(router.loads().values()) == {0})


@pytest.fixture
def access_log(fleet: Fleet, tmp_path: Path) -> tuple[RouterProcess, FakeWorkerProcess, Path]:
    path = tmp_path / "access.log"
    worker = fleet.fake_worker()
    return fleet.router("--access-log", str(path), "--processes", "2", workers=[worker]), worker, path


def test_access_log(access_log: tuple[RouterProcess, FakeWorkerProcess, Path]) -> None:
    router, worker, path = access_log
    load = run(router, [*bodies(100), *bodies(100, stream=True)], 16)
    assert load.failed == []
    worker.script(status=500)
    assert router.post(CHAT, chat("s", "u", rid="x"))[0] == 500
    eventually("all lines are there", lambda: len(path.read_text().splitlines()) == 201)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(line["status"] == 200 and line["stream"] for line in lines) == 100
    assert len({line["request_id"] for line in lines}) == 201
    (failed,) = [line for line in lines if line["status"] == 500]
    assert failed["attempts"] == 5
    assert failed["path"] == CHAT
    answered = lines[0]
    assert answered["worker"] == router.workers()[0]["id"]
    assert answered["prompt_tokens"] > 0
    assert 0 < answered["first_byte_ms"] <= answered["duration_ms"]
    assert request("GET", router.url + "/health")[0] == 200
