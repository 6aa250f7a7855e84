"""Whatever takes too long ends, with an answer that says what: each with its flag. And what may not be too much."""

import asyncio
import json
import socket

import pytest

from tests.fake_worker import FakeWorker, Script
from tests.router.plane import Plane, running
from tests.router.test_dataplane import CHAT, chat, request


def error_of(got: bytes) -> tuple[int, str]:
    """Status and code of an error response."""
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head[9:12]), json.loads(body)["error"]["code"]


async def test_no_first_byte_goes_to_one_other_worker() -> None:
    async with (
        FakeWorker() as a,
        FakeWorker() as b,
        FakeWorker() as c,
        running([a, b, c], first_byte_timeout_secs=0.5, policy="round_robin") as router,
    ):
        a.script = b.script = c.script = Script(stall=True)
        answer = await router.client.post(CHAT, json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_first_byte_timeout")
        assert sorted(worker.record.received for worker in (a, b, c)) == [0, 1, 1]
        await router.quiet()
        await asyncio.sleep(0.05)
        assert sum(worker.record.cancelled for worker in (a, b, c)) == 2
        a.script, b.script, c.script = Script(stall=True), Script(), Script()
        for _ in range(3):
            assert (await router.client.post(CHAT, json=chat())).status_code == 200


async def test_a_stream_that_falls_silent_ends_with_an_error_event() -> None:
    async with FakeWorker() as worker, running([worker], stream_idle_timeout_secs=0.5) as router:
        worker.script = Script(chunks=10, chunk_seconds=0.01, stall_after_chunks=3)
        got = await router.raw(request(CHAT, json.dumps(chat(stream=True)).encode()))
        assert b"[DONE]" not in got
        assert not got.endswith(b"0\r\n\r\n")
        last = [line for line in got.split(b"\n") if line.startswith(b"data: ")][-1]
        assert json.loads(last[6:])["error"]["code"] == "upstream_stalled"
        await router.quiet()
        await asyncio.sleep(0.05)
        assert worker.record.cancelled == 1


async def test_a_client_that_does_not_read_makes_nobody_silent() -> None:
    async with FakeWorker() as worker, running([worker], stream_idle_timeout_secs=0.5) as router:
        worker.script = Script(chunks=4_000, chunk_bytes=4000, chunk_seconds=0.00001)
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1024)
        writer.write(request(CHAT, json.dumps(chat(stream=True)).encode()))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(2.5)
        last = b""
        async with asyncio.timeout(30):
            while not last.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
                data = await reader.read(1 << 20)
                assert data
                last = (last + data)[-64:]
        writer.close()


async def test_a_worker_that_cannot_be_reached_in_time() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # until its queue is full
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        worker = FakeWorker()
        worker.port = port
        async with running([worker], connect_timeout_secs=0.3, retry_max_retries=1) as router:
            answer = await router.client.post(CHAT, json=chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_connect_timeout")
        for one in waiting:
            one.close()


@pytest.mark.parametrize(
    ("piece", "flag", "expected"),
    [
        (b"", "client_header_timeout_secs", None),
        (b"POST /generate HTTP/1.1\r\nhost: h\r\n", "client_header_timeout_secs", (408, "request_timeout")),
        (
            b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n{",
            "client_body_timeout_secs",
            (408, "body_timeout"),
        ),
        (
            b"POST /generate HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{",
            "client_body_timeout_secs",
            (408, "body_timeout"),
        ),
    ],
)
async def test_a_slow_client(piece: bytes, flag: str, expected: tuple[int, str] | None) -> None:
    async with running([], **{flag: 0.5}) as router:
        got = await router.raw(piece, seconds=6.0)
        assert (error_of(got) if expected else got) == (expected or b"")
        assert router.plane.buffered_bytes == 0


async def test_a_body_that_keeps_coming_is_not_too_slow() -> None:
    async with FakeWorker() as worker, running([worker], client_body_timeout_secs=1.5) as router:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        data = request(CHAT, json.dumps(chat()).encode())
        end = data.index(b"\r\n\r\n") + 4
        writer.write(data[:end])
        for at in range(end, len(data), len(data) // 6):
            writer.write(data[at : at + len(data) // 6])
            await asyncio.sleep(0.5)
        assert b" 200 " in await reader.readuntil(b"\r\n")
        writer.close()


async def test_an_idle_connection_is_closed_and_one_in_use_is_not() -> None:
    async with FakeWorker() as worker, running([worker], client_idle_timeout_secs=0.5) as router:
        worker.script = Script(first_byte_seconds=2.5)
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(request(CHAT, json.dumps(chat()).encode()))
        answer = await reader.read()
        assert b" 200 " in answer[:20]
        writer.close()


async def test_connections_are_limited() -> None:
    async with running([], max_connections=3) as router:
        opened = [await asyncio.open_connection("127.0.0.1", router.port) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert error_of(await router.raw(b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n")) == (503, "router_busy")
        for _, writer in opened[:1]:
            writer.close()
        await asyncio.sleep(0.05)
        assert (await router.client.get("/health")).status_code == 200
        for _, writer in opened:
            writer.close()


async def test_buffered_bodies_are_limited() -> None:
    limits = {"max_payload_size": 100_000, "max_buffered_bytes": 250_000}
    async with FakeWorker() as worker, running([worker], **limits) as router:

        async def begun(length: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 100000\r\n\r\n" + b" " * length)
            return reader, writer

        opened = [await begun(80_000) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert router.plane.buffered_bytes == 240_000
        reader, writer = await begun(50_000)
        assert b"503" in await reader.readuntil(b"\r\n")
        assert b"router_busy" in await reader.read()
        writer.close()
        # Small requests that come whole are not kept.
        assert (await router.client.post(CHAT, json=chat())).status_code == 200
        for _, writer in opened:
            writer.close()
        await gone(router)


async def gone(router: Plane) -> None:
    for _ in range(100):
        if router.plane.buffered_bytes == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{router.plane.buffered_bytes} bytes are left")


async def test_no_file_left_for_a_worker_is_said_and_is_not_the_workers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeWorker() as worker, running([worker]) as router:

        async def no_more_files(*arguments: object, **options: object) -> None:
            raise OSError(24, "Too many open files")

        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        monkeypatch.setattr(router.plane.loop, "create_connection", no_more_files)
        writer.write(request(CHAT, json.dumps(chat()).encode()))
        got = await reader.readuntil(b"}}")
        writer.close()
        assert error_of(got) == (503, "router_busy")
        assert b"Too many open files" in got
        assert router.core.targets()[0].failures == 0
