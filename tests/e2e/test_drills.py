"""Slow drills, for `make test-all`."""

import asyncio
import http.client
import json
import time

import pytest

from bench.load import chat_body, closed_loop, post
from tests.e2e.fleet import Fleet, chat, eventually, words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_workers_keep_idle_connections_for_75_seconds(fleet: Fleet) -> None:
    """Routers pool connections for 50 s and more; a worker that closes earlier causes errors at random."""
    url = fleet.real_worker()
    connection = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=30)
    connection.connect()
    opened = connection.sock
    for pause in (75.0, 0.0):
        body = json.dumps(chat("s", "hello", max_tokens=2))
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        time.sleep(pause)
    assert connection.sock is opened
    connection.close()


def test_ten_thousand_disconnects(fleet: Fleet) -> None:
    """Clients that leave in the middle of a stream: every load falls, the workers see every cancel."""
    workers = fleet.fake_workers(2)
    router = fleet.router(workers=workers)
    for worker in workers:
        worker.script(chunks=1000, chunk_seconds=0.05)
    request = post("/v1/chat/completions", chat_body("leave", stream=True))
    count = 10_000

    async def leave_early() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(request)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def all_of_them() -> None:
        for _ in range(count // 100):
            await asyncio.gather(*(leave_early() for _ in range(100)))

    asyncio.run(all_of_them())
    eventually("loads are 0", lambda: set(router.loads().values()) == {0}, 10)
    eventually("cancels arrived", lambda: sum(worker.counts()["cancelled"] for worker in workers) == count, 10)
    assert router.process.exit_code is None


def test_kill_and_restart_over_and_over(fleet: Fleet) -> None:
    """Four workers at C=64; every second one of them dies and comes back."""
    workers = fleet.fake_workers(4)
    router = fleet.router(workers=workers)
    for worker in workers:
        worker.script(first_byte_seconds=0.005)
    requests = [post("/v1/chat/completions", json.dumps(chat("s", words(20, seed))).encode()) for seed in range(500)]

    def kill_in_turn() -> None:
        for worker in workers * 3:
            worker.kill()
            time.sleep(0.5)
            worker.restart()
            worker.script(first_byte_seconds=0.005)
            time.sleep(0.5)

    async def both() -> None:
        load, _ = await asyncio.gather(
            closed_loop("127.0.0.1", router.port, requests, 64, seconds=12.0), asyncio.to_thread(kill_in_turn)
        )
        assert load.failed == []
        assert len(load.replies) > 10_000

    asyncio.run(both())
    eventually("loads are 0", lambda: set(router.loads().values()) == {0}, 5)
