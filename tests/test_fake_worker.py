"""The fake must be trusted: what it claims to do, it does."""

import asyncio
import json

import httpx
import pytest

from bench.load import chat_body, closed_loop, post
from tests.fake_worker import FakeWorker, Script
from tests.fake_worker.prefix_cache import PrefixCache, token_count


async def ask(worker: FakeWorker, text: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.post(worker.url + "/v1/chat/completions", content=chat_body(text))


async def test_cached_tokens_are_whole_pages_of_a_common_prefix(fake_worker: FakeWorker) -> None:
    text = "word " * 100
    first, again, other = await ask(fake_worker, text), await ask(fake_worker, text), await ask(fake_worker, "x" + text)
    assert first.headers["x-cached-tokens"] == "0"
    cached = int(again.headers["x-cached-tokens"])
    prompt = int(again.headers["x-prompt-tokens"])
    assert cached % 16 == 0
    assert prompt - 17 <= cached < prompt
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
    assert other.headers["x-cached-tokens"] == "0"


def test_the_cache_forgets_leaves_first() -> None:
    cache = PrefixCache(capacity_tokens=64, page_tokens=16)
    old, new = b"a" * 128, b"b" * 192  # two and three pages; four fit
    cache.insert(old)
    cache.insert(new)
    assert len(cache) == 4
    assert cache.cached_tokens(old + b"!" * 64) == 16
    assert cache.cached_tokens(new + b"!" * 64) == 48
    assert token_count(b"12345") == 2


@pytest.mark.parametrize(
    ("script", "began", "complete"),
    [
        (Script(), True, True),
        (Script(chunk_seconds=0.001), True, True),
        (Script(reset_before_answer=True), False, False),
        (Script(reset_after_chunks=2), True, False),
        (Script(die=True), False, False),
    ],
    ids=["plain", "slow", "reset before", "reset after", "die"],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_scripts(fake_worker: FakeWorker, script: Script, began: bool, complete: bool, stream: bool) -> None:
    fake_worker.script = script
    request = post("/v1/chat/completions", chat_body("hello", stream))
    load = await closed_loop("127.0.0.1", fake_worker.port, [request], 1, count=1, keep_bodies=True)
    (reply,) = load.replies
    assert (reply.began, reply.complete) == (began, complete)
    if stream and began:
        assert reply.body.count(b'"delta"') == (script.reset_after_chunks or 4)


async def test_a_cancel_is_recorded(fake_worker: FakeWorker) -> None:
    fake_worker.script = Script(stall=True)
    reader, writer = await asyncio.open_connection("127.0.0.1", fake_worker.port)
    writer.write(post("/v1/chat/completions", chat_body("hello")))
    while fake_worker.record.in_flight == 0:  # the event is in another connection's protocol
        await asyncio.sleep(0.001)
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    while fake_worker.record.in_flight:
        await asyncio.sleep(0.001)
    assert fake_worker.record.cancelled == 1


async def test_pipelined_requests_are_answered_in_order(fake_worker: FakeWorker) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", fake_worker.port)
    writer.write(b"".join(post("/v1/chat/completions", chat_body("x", model=f"m{i}")) for i in range(2_000)))
    for i in range(2_000):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length))["model"] == f"m{i}"
    writer.close()
    await writer.wait_closed()


async def test_script_over_http_names_unknown_fields(fake_worker: FakeWorker) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        good = await client.post(fake_worker.url + "/_script", json={"status": 503, "times": 1})
        bad = await client.post(fake_worker.url + "/_script", json={"stauts": 503})
    assert good.status_code == 200
    assert bad.status_code == 400
    assert "stauts" in bad.json()["error"]
    assert [(await ask(fake_worker, "x")).status_code for _ in range(2)] == [503, 200]
