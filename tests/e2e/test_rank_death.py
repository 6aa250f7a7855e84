"""kill -9 of a rank under load: its worker ends, and nothing that had not begun fails."""

import asyncio
import functools
import json
import os
import random
import signal
from typing import Any

import pytest

from bench.load import Load, closed_loop, post
from tests.e2e.fleet import Fleet, eventually
from tests.processes import free_port, request_json

pytestmark = pytest.mark.timeout(420)

READY_SECONDS = 180.0
"""Several ranks that start at once on a busy machine."""
DPA = ("--model-path", "demo-moe", "--tp", "2", "--dp-size", "2", "--ep", "2", "--enable-dp-attention")
CONNECTIONS = 16
REQUESTS = 160


def get_json(url: str) -> dict[str, Any]:
    status, answer = request_json("GET", url)
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


def bodies() -> list[bytes]:
    """Different chats, half of them streamed."""
    texts = random.Random(1)
    answer = {"model": "demo-moe", "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    return [
        json.dumps(
            answer
            | {"messages": [{"role": "user", "content": f"{number} {texts.random()} "}], "stream": number % 2 == 1}
        ).encode()
        for number in range(REQUESTS)
    ]


def test_a_killed_rank_fails_no_request_that_had_not_begun(fleet: Fleet) -> None:
    """Two workers of two ranks, registered one by one; a rank of one is killed while both work."""
    router = fleet.router()
    workers = []
    for name in ("first", "second"):
        port = free_port()
        flags = (*DPA, "--host", "127.0.0.1", "--port", str(port), "--max-total-tokens", "16384")
        process = fleet.processes.start_module(f"worker-{name}", "warmroute_worker.launch_worker", *flags)
        workers.append((process, f"http://127.0.0.1:{port}"))
    for process, url in workers:
        process.wait_until_ready(f"{url}/health", READY_SECONDS)
        assert router.post("/workers", {"url": url})[0] == 202
    router.wait_for_workers(2, READY_SECONDS)
    (victim, victim_url), (survivor, survivor_url) = workers
    ranks = get_json(f"{victim_url}/debug/ranks")["ranks"]

    def both_work() -> bool:
        return all(
            load["num_running_reqs"] for _, url in workers for load in get_json(f"{url}/v1/loads")["loads"]
        ) and all(rank["decode_steps"] > 20 for rank in get_json(f"{victim_url}/debug/ranks")["ranks"])

    async def kill_in_the_middle() -> None:
        await asyncio.to_thread(functools.partial(eventually, "all four ranks work", both_work, 120))
        os.kill(ranks[1]["pid"], signal.SIGKILL)

    async def both() -> Load:
        run = closed_loop(
            "127.0.0.1",
            router.port,
            [post("/v1/chat/completions", body) for body in bodies()],
            CONNECTIONS,
            count=REQUESTS,
        )
        load, _ = await asyncio.gather(run, kill_in_the_middle())
        return load

    load = asyncio.run(both())
    assert len(load.replies) == REQUESTS
    assert [reply for reply in load.failed if not reply.began] == []
    assert [reply.status for reply in load.failed if reply.status != 200] == []
    assert [reply.index for reply in load.failed if reply.index % 2 == 0] == [], (
        "an answer in one piece begins at its end"
    )
    assert len(load.failed) <= CONNECTIONS
    assert victim.wait(60) == 1
    assert "rank 1" in victim.log_tail()
    assert survivor.exit_code is None
    assert request_json("GET", f"{survivor_url}/health")[0] == 200
    router.wait_for_workers(1)
    eventually("loads are 0", lambda: set(router.loads().values()) == {0})
