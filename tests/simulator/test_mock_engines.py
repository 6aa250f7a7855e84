"""The simulated engine behind HTTP: it answers when it should, and finds what it has."""

import json
import time
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from bench.mock_engines import MODEL, MockEngine, page_keys
from bench.simulator.engine import Engine

SPEED = 10.0


async def ask(client: TestClient[Any, Any], text: str, output: int) -> tuple[dict[str, Any], float]:
    """(usage, seconds of the engine)"""
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": output, "stream": True}
    begin = time.perf_counter()
    response = await client.post("/v1/chat/completions", json=body)
    events = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert events[-1] == "[DONE]"
    usage: dict[str, Any] = json.loads(events[-2])["usage"]
    return usage, (time.perf_counter() - begin) * SPEED


@pytest.mark.asyncio
async def test_a_prompt_is_read_once() -> None:
    async with TestClient(TestServer(MockEngine(Engine(), SPEED).app())) as client:
        assert (await client.get("/health")).status == 200
        assert (await (await client.get("/server_info")).json())["max_total_num_tokens"] == Engine().kv_tokens
        text = "".join(f"word {number} " for number in range(3_000))
        first, cold = await ask(client, text, 10)
        second, warm = await ask(client, text + "and more", 10)
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["prompt_tokens"] - second["prompt_tokens_details"]["cached_tokens"] < 20
    assert cold >= first["prompt_tokens"] / Engine().prefill_tokens_per_second
    assert cold - warm > 0.5 * first["prompt_tokens"] / Engine().prefill_tokens_per_second


def test_keys_of_texts() -> None:
    long, longer, other = (page_keys(text, 100) for text in ("a" * 200, "a" * 300, "b" + "a" * 199))
    assert long[:3] == longer[:3]
    assert long[3] != longer[3]
    assert not set(long) & set(other)
    assert sum(map(len, long)) == 100 // 16 + 1
