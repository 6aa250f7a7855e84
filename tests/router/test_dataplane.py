"""The data plane against scripted workers, on real sockets: what a request meets from its first byte to its last."""

import asyncio
import json
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.simulator.trace import read_trace
from tests.fake_worker import FakeWorker, Script
from tests.router.plane import Plane, running

CHAT = "/v1/chat/completions"


def chat(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "fake-model", "messages": [{"role": "user", "content": text}], **fields}


def request(path: str, body: bytes, *lines: bytes, version: bytes = b"1.1") -> bytes:
    head = b"POST %b HTTP/%b\r\nhost: x\r\ncontent-type: application/json\r\n" % (path.encode(), version)
    return head + b"".join(line + b"\r\n" for line in lines) + b"content-length: %d\r\n\r\n" % len(body) + body


CHAT_BYTES = json.dumps(chat()).encode()


async def test_the_body_arrives_byte_for_byte() -> None:
    body = b'{"messages": [{"role":"user","content":"\\u00e9"}],\n "unkno": {"big": 1234567890123456789, "d": [[{}]]}}'
    async with FakeWorker() as worker, running([worker]) as router:
        answer = await router.client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200
        assert worker.record.requests[0].body == body


async def test_stream_and_unary_alternate_on_one_connection_with_control_paths() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        for _ in range(3):
            unary = await router.client.post(CHAT, json=chat())
            assert unary.json()["choices"]
            models = await router.client.get("/v1/models?x=1")
            assert models.json()["path"] == "/v1/models?x=1"
            async with router.client.stream("POST", CHAT, json=chat(stream=True)) as streamed:
                lines = [line async for line in streamed.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
        assert len(router.plane.connections) == 1


async def test_a_stream_is_relayed_piece_by_piece() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(chunks=5, chunk_seconds=0.05)
        loop = asyncio.get_running_loop()
        async with router.client.stream("POST", CHAT, json=chat(stream=True)) as streamed:
            times = [loop.time() async for line in streamed.aiter_lines() if line.startswith("data: {")]
        assert times[-1] - times[0] > 0.1


async def test_control_requests_keep_method_query_body_and_headers() -> None:
    async with running() as router:
        answer = await router.client.put("/workers/7?a=b", content=b"hello", headers={"x-own": "yes"})
        seen = answer.json()
        assert (seen["method"], seen["path"], seen["body"]) == ("PUT", "/workers/7?a=b", "hello")
        assert {name.lower(): value for name, value in seen["headers"].items()}["x-own"] == "yes"
        assert (await router.client.head("/workers")).status_code == 200
        assert (await router.client.get(CHAT)).json()["method"] == "GET"


async def test_probes_are_answered_from_the_core() -> None:
    async with FakeWorker() as worker, running() as router:
        assert (await router.client.get("/health")).status_code == 200
        assert (await router.client.get("/liveness")).status_code == 200
        assert (await router.client.get("/readiness")).status_code == 503
        router.add(worker)
        ready = await router.client.get("/readiness")
        assert ready.json() == {"status": "ready", "healthy_workers": 1, "total_workers": 1}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": 7}', b"\xff\xfe", b'{"messages": [' + b"[" * 5000])
async def test_a_body_that_cannot_be_read_is_the_clients_fault(body: bytes) -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        answer = await router.client.post(CHAT, content=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "code", "param"}
        assert answer.headers["x-smg-error-code"] == error["code"]
        assert worker.record.received == 0
        assert (await router.client.post(CHAT, json=chat())).status_code == 200


async def test_no_worker_is_503_with_retry_after() -> None:
    async with running() as router:
        answer = await router.client.post(CHAT, json=chat())
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "no_available_workers"


async def test_an_unknown_model_is_404_only_when_several_are_served() -> None:
    async with FakeWorker(models=("a",)) as a, FakeWorker(models=("b",)) as b, running([a]) as router:
        assert (await router.client.post(CHAT, json=chat() | {"model": "zzz"})).status_code == 200
        router.add(b)
        answer = await router.client.post(CHAT, json=chat() | {"model": "zzz"})
        assert answer.status_code == 404
        assert "a, b" in answer.json()["error"]["message"]
        assert (await router.client.post(CHAT, json=chat() | {"model": "b"})).status_code == 200
        assert b.record.received == 1


async def test_a_body_over_the_limit_is_413_and_at_the_limit_passes() -> None:
    body = CHAT_BYTES
    async with FakeWorker() as worker, running([worker], max_payload_size=len(body)) as router:
        assert (await router.client.post(CHAT, content=body)).status_code == 200
        refused = await router.raw(request(CHAT, body + b" "))
        assert refused.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in refused
        chunked = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode()
        refused = await router.raw(chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) + 1, body + b" "))
        assert refused.startswith(b"HTTP/1.1 413 ")


async def test_a_body_in_pieces_and_in_chunks() -> None:
    body = json.dumps(chat("x" * 300_000)).encode()
    async with FakeWorker() as worker, running([worker]) as router:
        whole = request(CHAT, body)
        pieces = [whole[i : i + 7000] for i in range(0, len(whole), 7000)]
        assert (await router.raw(*pieces, until=b'"usage"')).startswith(b"HTTP/1.1 200 ")
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode()
        chunks = [b"%x\r\n%b\r\n" % (len(body[i : i + 9999]), body[i : i + 9999]) for i in range(0, len(body), 9999)]
        assert (await router.raw(head, *chunks, b"0\r\n\r\n", until=b'"usage"')).startswith(b"HTTP/1.1 200 ")
        assert [seen.body for seen in worker.record.requests] == [body, body]


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(first_byte_seconds=0.05)
        texts = [f"number {i}" for i in range(5)]
        asks = b"".join(request(CHAT, json.dumps(chat(text)).encode()) for text in texts)
        bad = request(CHAT, b"{") * 1500
        got = await router.raw(asks, bad, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert got.count(b"HTTP/1.1 200 ") == 6
        assert got.count(b"HTTP/1.1 400 ") == 1500
        assert [json.loads(seen.body)["messages"][0]["content"] for seen in worker.record.requests] == texts


async def test_expect_continue() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        whole = request(CHAT, CHAT_BYTES, b"expect: 100-continue")
        cut = whole.index(b"\r\n\r\n") + 4
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(whole[:cut])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(whole[cut:])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_http_1_0_gets_an_unchunked_stream_and_a_close() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        body = json.dumps(chat(stream=True)).encode()
        got = await router.raw(request(CHAT, body, version=b"1.0"))
        assert b"transfer-encoding" not in got.lower()
        assert got.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
async def test_what_could_be_smuggled_is_refused(head: bytes) -> None:
    async with running() as router:
        got = await router.raw(head + b"hello")
        assert got.startswith(b"HTTP/1.1 400 ")
        assert b"connection: close" in got
        assert (await router.client.get("/health")).status_code == 200


async def test_a_client_that_goes_away_cancels_its_worker_at_once() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        for script in (Script(stall=True), Script(chunks=1000, chunk_seconds=0.01)):
            worker.script = script
            worker.record.reset()
            _, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(request(CHAT, json.dumps(chat(stream=True)).encode()))
            while worker.record.received == 0:
                await asyncio.sleep(0.005)
            assert router.loads() == 1
            writer.close()
            await router.quiet()
            while worker.record.cancelled == 0:
                await asyncio.sleep(0.005)
            assert worker.record.in_flight == 0


async def test_the_lease_of_a_client_that_leaves_while_connecting_is_returned() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        _, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(request(CHAT, CHAT_BYTES))
        while not router.plane.connections:
            await asyncio.sleep(0)
        next(iter(router.plane.connections)).data_received(b"")
        writer.transport.abort()
        await router.quiet()


async def test_a_dead_worker_is_passed_over() -> None:
    async with FakeWorker() as alive, FakeWorker() as dead, running([alive, dead]) as router:
        await dead.stop()
        for i in range(20):
            assert (await router.client.post(CHAT, json=chat(f"different {i}"))).status_code == 200
        assert alive.record.received == 20
        assert router.core.take_probe_requests()


async def test_a_worker_that_resets_before_it_answers_is_replaced() -> None:
    async with FakeWorker() as good, FakeWorker() as bad, running([good, bad]) as router:
        bad.script = Script(reset_before_answer=True)
        for i in range(10):
            assert (await router.client.post(CHAT, json=chat(f"different {i}"))).status_code == 200
        assert good.record.received == 10


async def test_garbage_is_not_relayed() -> None:
    async with FakeWorker() as good, FakeWorker() as bad, running([good, bad]) as router:
        bad.script = Script(garbage=True)
        for i in range(10):
            assert (await router.client.post(CHAT, json=chat(f"different {i}"))).status_code == 200


async def test_a_prompt_that_kills_its_worker_meets_at_most_one_other() -> None:
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(FakeWorker()) for _ in range(5)]
        async with running(workers, policy="round_robin") as router:
            for _ in range(10):  # so that there are pooled connections, whose reset looks like a stale one
                await router.client.post(CHAT, json=chat())
            for worker in workers:
                worker.script = Script(die=True, only_if_body_contains="poison")
            answer = await router.client.post(CHAT, json=chat("poison"))
            assert answer.status_code == 502
            assert sum(any(b"poison" in seen.body for seen in worker.record.requests) for worker in workers) <= 2


async def test_statuses_that_ask_for_another_try_are_retried_and_the_last_is_relayed() -> None:
    back_off = {"retry_initial_backoff_ms": 1, "retry_max_backoff_ms": 2000}
    async with FakeWorker() as a, FakeWorker() as b, running([a, b], **back_off) as router:
        a.script = b.script = Script(status=503, times=2)
        assert (await router.client.post(CHAT, json=chat())).status_code == 200
        a.script = b.script = Script(status=503)
        answer = await router.client.post(CHAT, json=chat())
        assert answer.status_code == 503
        assert answer.json()


async def test_a_worker_is_not_asked_again_before_the_time_it_has_named() -> None:
    loop = asyncio.get_running_loop()
    back_off = {"retry_initial_backoff_ms": 1, "retry_max_backoff_ms": 2000}
    async with FakeWorker() as worker, running([worker], **back_off) as router:
        worker.script = Script(status=503, times=1, retry_after=1)
        begin = loop.time()
        assert (await router.client.post(CHAT, json=chat())).status_code == 200
        assert 0.95 < loop.time() - begin < 3.0
        # Longer than a request may wait between two attempts: the client gets to know instead.
        worker.script = Script(status=503, retry_after=7)
        received = worker.record.received
        answer = await router.client.post(CHAT, json=chat())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
        assert worker.record.received == received + 1


async def test_4xx_is_relayed_as_it_is_and_never_opens_a_breaker() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(status=400)
        for _ in range(50):
            assert (await router.client.post(CHAT, json=chat())).status_code == 400
        assert worker.record.received == 50
        assert router.core.targets()[0].breaker == "closed"


async def test_disable_retries() -> None:
    async with FakeWorker() as worker, running([worker], disable_retries=True) as router:
        worker.script = Script(status=503)
        assert (await router.client.post(CHAT, json=chat())).status_code == 503
        assert worker.record.received == 1


async def test_idle_connections_closed_by_the_worker_cost_no_request() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(idle_close_seconds=0.02)
        for pause in (0.0, 0.015, 0.02, 0.021, 0.019, 0.02, 0.03, 0.02):
            assert (await router.client.post(CHAT, json=chat())).status_code == 200
            await asyncio.sleep(pause)


async def test_a_stream_that_breaks_ends_with_an_error_event_and_a_close() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(chunks=10, chunk_seconds=0.01, reset_after_chunks=3)
        got = await router.raw(request(CHAT, json.dumps(chat(stream=True)).encode()))
        payload = got[got.index(b"\r\n\r\n") + 4 :]
        assert b"[DONE]" not in payload
        assert not payload.endswith(b"0\r\n\r\n")
        last = [line for line in payload.split(b"\n") if line.startswith(b"data: ")][-1]
        assert json.loads(last[6:])["error"]["code"] == "upstream_stream_broken"


async def test_a_unary_body_that_breaks_is_not_ended_cleanly() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(reset_after_chunks=1)
        with pytest.raises(httpx.HTTPError):
            await router.client.post(CHAT, json=chat())


async def test_a_worker_that_stalls_is_a_504() -> None:
    async with FakeWorker() as worker, running([worker], request_timeout_secs=1) as router:
        worker.script = Script(stall=True)
        answer = await router.client.post(CHAT, json=chat())
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "upstream_timeout"


async def test_a_slow_reader_pauses_its_worker_and_not_the_router() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(chunks=20_000, chunk_bytes=4000, chunk_seconds=0.00001)
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1024)
        writer.write(request(CHAT, json.dumps(chat(stream=True)).encode()))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.5)  # 80 MB are on offer and nobody reads
        connection = next(c for c in router.plane.connections if not c.is_idle)
        assert connection._transport.get_write_buffer_size() < 4 * 1024 * 1024
        worker.script = Script()
        assert (await router.client.post(CHAT, json=chat("fast"))).status_code == 200
        writer.transport.abort()


async def test_a_pool_stays_as_long_as_somebody_uses_its_connections() -> None:
    """It was swept when none was idle, and what came back to it was never found again."""
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(chunks=20, chunk_seconds=0.02)
        async with router.client.stream("POST", CHAT, json=chat(stream=True)) as streamed:
            router.plane._sweep()
            (pool,) = router.plane.pools.values()
            assert [line async for line in streamed.aiter_lines()]
        worker.script = Script()
        assert (await router.client.post(CHAT, json=chat())).status_code == 200
        assert list(router.plane.pools.values()) == [pool]
        assert (pool.connections, len(pool.idle)) == (1, 1)
        pool.idle[0].transport.abort()
        await asyncio.sleep(0.01)
        assert pool.connections == 0
        router.plane._sweep()
        assert not router.plane.pools


async def test_the_last_answer_of_a_connection_is_delivered_before_it_is_closed() -> None:
    """As long as somebody reads it, however old the connection is; and what is pipelined behind it is not begun."""
    async with FakeWorker() as worker, running([worker], client_idle_timeout_secs=1) as router:
        worker.script = Script(chunks=400, chunk_bytes=60_000)
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1024)
        last = request(CHAT, CHAT_BYTES, b"connection: close")
        await asyncio.sleep(0.9)
        writer.write(last + last)
        got = 0
        for _ in range(40):
            got += len(await reader.read(100_000))
            await asyncio.sleep(0.1)
        while data := await asyncio.wait_for(reader.read(1 << 20), 5):
            got += len(data)
        assert got > 400 * 60_000
        assert len(worker.record.requests) == 1
        writer.close()
        await router.quiet()


class _Unread(asyncio.Transport):
    """A client's end that takes what is written and delivers nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[str] = []

    def get_write_buffer_size(self) -> int:
        return 100_000

    def write(self, data: Any) -> None:
        raise AssertionError("nothing is written behind the last answer")

    def close(self) -> None:
        self.ends.append("closed")

    def abort(self) -> None:
        self.ends.append("aborted")


async def test_behind_its_last_answer_a_connection_begins_nothing() -> None:
    """And it is given the time from that answer on to read it, not from what it did before."""
    second = 10**9
    async with FakeWorker() as worker, running([worker], client_idle_timeout_secs=60) as router:
        connection, transport = router.plane.protocol_factory(), _Unread()
        connection.connection_made(transport)
        router.plane.second_ns += 100 * second
        connection.pause_writing()
        connection._buffer = request(CHAT, CHAT_BYTES)
        connection.keep_alive = False
        connection.exchange_ended()
        connection.check_time(router.plane.second_ns + second)
        assert transport.ends == ["closed"]
        connection.resume_writing()
        assert connection.is_idle
        assert [target.selections for target in router.core.targets()] == [0]
        connection.pause_writing()
        connection.check_time(router.plane.second_ns + 61 * second)
        assert transport.ends == ["closed", "aborted"]
        connection.connection_lost(None)


async def test_a_client_that_never_reads_is_cut_off() -> None:
    async with FakeWorker() as worker, running([worker], client_idle_timeout_secs=1) as router:
        worker.script = Script(chunks=1, chunk_bytes=30_000)
        _, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1024)
        writer.write(request(CHAT, CHAT_BYTES) * 1000)
        await asyncio.sleep(0.5)
        assert router.plane.connections
        async with asyncio.timeout(8):
            while router.plane.connections:
                await asyncio.sleep(0.05)
        writer.transport.abort()
        await router.quiet()


async def test_an_answer_before_the_whole_request_was_sent() -> None:
    """What is left of the request would be read as the next one: the connection is not used again."""
    connections: list[asyncio.Task[Any] | None] = []
    enough = asyncio.Event()

    async def answer_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await enough.wait()
        writer.transport.abort()

    server = await asyncio.start_server(answer_at_once, "127.0.0.1", 0, limit=1024)
    async with FakeWorker() as worker, running() as router:
        worker_port, worker.port = worker.port, server.sockets[0].getsockname()[1]
        router.add(worker)
        worker.port = worker_port
        for number in (1, 2):
            answer = await router.client.post(CHAT, json=chat("x" * 20_000_000))
            assert (answer.status_code, answer.content) == (200, b"{}")
            assert len(connections) == number
            assert not any(pool.idle for pool in router.plane.pools.values())
        await router.quiet()
    enough.set()
    await asyncio.gather(*(task for task in connections if task is not None))
    server.close()
    await server.wait_closed()


async def test_a_client_that_does_not_read_its_answers_is_not_answered_further() -> None:
    """Its answers pile up to a bound, and the worker's connection is as good as before for others."""
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(chunks=1, chunk_bytes=30_000)
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port, limit=1024)
        number = 1000
        writer.write(request(CHAT, CHAT_BYTES) * number)
        for _ in range(100):
            answered = len(worker.record.requests)
            await asyncio.sleep(0.05)
            if answered and answered == len(worker.record.requests):
                break
        assert 0 < answered < number
        for _ in range(3):
            answer = await asyncio.wait_for(router.client.post(CHAT, json=chat("fast")), 2)
            assert answer.status_code == 200
        begin, heads, tail = b"HTTP/1.1 200", 0, b""
        while heads < number:
            piece = tail + await asyncio.wait_for(reader.read(1 << 20), 2)
            heads += piece.count(begin)
            tail = piece[1 - len(begin) :]
        writer.close()
        await router.quiet()


async def test_an_api_key_guards_everything_but_the_probes() -> None:
    async with FakeWorker() as worker, running([worker], api_key="secret") as router:
        for path in ("/workers", "/get_loads"):
            assert (await router.client.get(path)).status_code == 401
        assert (await router.client.post(CHAT, json=chat())).status_code == 401
        for path in ("/health", "/metrics", "/v1/models", "/readiness"):
            assert (await router.client.get(path)).status_code == 200
        key = {"authorization": "Bearer secret"}
        assert (await router.client.post(CHAT, json=chat(), headers=key)).status_code == 200
        assert (await router.client.get("/workers", headers=key)).status_code == 200
        assert worker.record.requests[0].header("authorization") is None  # the router's key does not leave it


async def test_request_ids_and_what_is_forwarded() -> None:
    async with FakeWorker() as worker, running([worker], expose_worker=True) as router:
        headers = {"x-request-id": "mine-1", "traceparent": "00-ab-cd-01", "x-warmroute-evil": "1", "cookie": "a=b"}
        answer = await router.client.post(CHAT, json=chat(), headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-warmroute-worker"] == f"id-{worker.port}"
        seen = worker.record.requests[0]
        assert seen.header("x-request-id") == "mine-1"
        assert seen.header("traceparent") == "00-ab-cd-01"
        assert seen.header("x-warmroute-evil") is None
        assert seen.header("cookie") is None
        made = [(await router.client.post(CHAT, json=chat())).headers["x-request-id"] for _ in range(3)]
        assert len(set(made)) == 3


async def test_a_workers_own_key_replaces_the_clients() -> None:
    async with FakeWorker() as worker, running() as router:
        router.add(worker, authorization=b"Bearer workers-own")
        await router.client.post(CHAT, json=chat(), headers={"authorization": "Bearer clients"})
        assert worker.record.requests[0].header("authorization") == "Bearer workers-own"


async def test_draining_finishes_what_runs_and_closes_the_rest() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(chunks=20, chunk_seconds=0.02)
        async with router.client.stream("POST", CHAT, json=chat(stream=True)) as streamed:
            drained = asyncio.create_task(router.plane.drain(5))
            text = "".join([line async for line in streamed.aiter_lines()])
        assert text.endswith("[DONE]")
        assert await drained


async def test_who_comes_while_it_drains_is_sent_away() -> None:
    async with FakeWorker() as worker, running([worker]) as router:
        worker.script = Script(chunks=20, chunk_seconds=0.02)
        async with router.client.stream("POST", CHAT, json=chat(stream=True)) as streamed:
            drained = asyncio.create_task(router.plane.drain(5))
            await asyncio.sleep(0)
            answer = await router.raw(request(CHAT, CHAT_BYTES))
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"shutting_down" in answer
            assert [line async for line in streamed.aiter_lines()]
        assert await drained
        assert [target.selections for target in router.core.targets()] == [len(worker.record.requests)] == [1]


async def test_a_dp_rank_is_spliced_into_the_body() -> None:
    async with FakeWorker(dp_size=4) as worker, running([worker]) as router:
        for i in range(8):
            await router.client.post(CHAT, json=chat(f"different {i}"))
        bodies = [json.loads(seen.body) for seen in worker.record.requests]
        assert {body["data_parallel_rank"] for body in bodies} == {0, 1, 2, 3}
        assert all(body["messages"][0]["content"].startswith("different") for body in bodies)


async def turn(router: Plane, messages: list[dict[str, str]]) -> str:
    answer = await router.client.post(CHAT, json=chat() | {"messages": messages})
    return str(answer.json()["choices"][0]["message"]["content"])


async def test_a_second_turn_goes_where_the_first_went() -> None:
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(FakeWorker()) for _ in range(4)]
        async with running(workers) as router:
            for worker in workers:
                worker.script = Script(chunks=10, chunk_bytes=60)
            for conversation in range(8):
                question = {"role": "user", "content": f"Conversation {conversation}: " + "tell me more, please. " * 4}
                text = await turn(router, [question])
                assert len(text) >= 5 * len(question["content"])
                again = [question, {"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
                await turn(router, again)
            for worker in workers:
                bodies = [json.loads(seen.body)["messages"] for seen in worker.record.requests]
                firsts = [body[0]["content"] for body in bodies]
                assert all(firsts.count(first) == 2 for first in firsts)


async def test_what_the_data_plane_answers_itself_is_counted() -> None:
    async with running([], api_key="router-key", max_payload_size=10) as router:
        key = {"authorization": "Bearer router-key"}
        assert (await router.client.get("/health")).status_code == 200
        assert (await router.client.post("/generate", content=b"{}")).status_code == 401
        refused = await router.client.request("BREW", "/coffee", headers=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (501, "not_implemented")
        assert (await router.client.post("/generate", content=b"x" * 11, headers=key)).status_code == 413
        counters = router.core.counters()
        assert set(counters.http_requests) == {
            ("GET", "/health", 1),
            ("POST", "/generate", 1),
            ("other", "other", 2),
        }
        assert set(counters.http_responses) == {
            (200, "/health", 1),
            (401, "/generate", 1),
            (501, "other", 1),
            (413, "other", 1),
        }


async def test_a_rank_and_a_key_in_the_headers_reach_the_policy() -> None:
    async with FakeWorker(dp_size=4) as worker, running([worker]) as router:
        for rank in (3, 1):
            answer = await router.client.post(CHAT, json=chat(), headers={"x-data-parallel-rank": str(rank)})
            assert answer.status_code == 200
        assert [target.selections for target in router.core.targets()] == [0, 1, 0, 1]
    async with FakeWorker() as one, FakeWorker() as two, running([one, two], policy="consistent_hashing") as router:
        for _ in range(6):
            await router.client.post(CHAT, json=chat(), headers={"X-Session-ID": "abc"})
        assert sorted(target.selections for target in router.core.targets()) == [0, 6]


async def test_decisions_are_explained_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with FakeWorker() as one, FakeWorker() as two, running([one, two], log_decisions=1.0) as router:
        for _ in range(2):
            await router.client.post(CHAT, json=chat("a prompt " * 50), headers={"x-request-id": "its-name"})
        await one.stop()
        await two.stop()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("decision its-name")]
    holder = one if f"-> {one.url}" in lines[1] else two
    assert len(lines) == 2
    assert "nobody holds enough" in lines[0]
    assert f"-> {holder.url} (cache_aware: holds most of the prompt); {holder.url} holds 4" in lines[1]
    assert "a prompt a prompt" not in caplog.text
    caplog.clear()
    async with FakeWorker() as one, running([one]) as router:
        await router.client.post(CHAT, json=chat("x"))
    assert "decision" not in caplog.text


async def test_decisions_are_recorded_without_text(tmp_path: Path) -> None:
    file = tmp_path / "decisions.jsonl"
    async with FakeWorker() as worker, running([worker], record_decisions=str(file)) as router:
        secret = "the launch code is 1234 " * 20
        for text in (secret, secret + "and more"):
            assert (await router.client.post(CHAT, json=chat(text))).status_code == 200
        await worker.stop()
        await router.client.post(CHAT, json=chat("nobody"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["outcome"] for line in lines[:2]] == ["answered", "answered"]
    assert "connect_failed" in {line["outcome"] for line in lines[2:]}
    assert "launch" not in file.read_text()
    first, second = lines[:2]
    assert first["blocks"][0] == second["blocks"][0]
    assert first["input_length"] > 0
    assert first["timestamp"] <= first["end"] <= second["end"]
    assert second["predicted_cached_tokens"] > 0
    workload = read_trace(file)
    assert len(workload.sessions) == 2
    tokens = sum(segment.tokens for segment in workload.sessions[0].turns[0].new)
    assert tokens == pytest.approx(first["input_length"], abs=2)
