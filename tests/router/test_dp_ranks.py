"""Ranks on real sockets: which rank a worker is told, at every attempt, and what a client may insist on."""

import asyncio
import json
from typing import Any

import pytest

from tests.fake_worker import FakeWorker, Script
from tests.router.plane import Plane, running
from tests.router.running_control import running_control

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"


def chat(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "fake-model", "messages": [{"role": "user", "content": text}], **fields}


BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, chat()),
    (CHAT, chat(stream=True)),
    (COMPLETIONS, {"prompt": "Hello"}),
    (COMPLETIONS, {"prompt": ["Hello", "Goodbye"], "stream": True}),
    (GENERATE, {"text": "Hello", "stream": True}),
    (GENERATE, {"text": ["Hello", "Goodbye", "Hello again"], "rid": ["a", "b", "c"]}),
    (GENERATE, {"input_ids": [[1, 2, 3], [4, 5]]}),
    (GENERATE, {"text": "Hello", "data_parallel_rank": None, "routed_dp_rank": None}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
async def test_the_chosen_rank_is_told_in_body_and_head(path: str, body: dict[str, Any]) -> None:
    async with FakeWorker(dp_size=3) as worker, running([worker], policy="round_robin") as router:
        for rank in (0, 1, 2):
            assert (await router.client.post(path, json=body)).status_code == 200
            seen = worker.record.requests[-1]
            assert seen.rank == rank
            told = json.loads(seen.body)
            assert told.pop("data_parallel_rank") == rank
            assert told == {name: value for name, value in body.items() if name != "data_parallel_rank"}
            assert seen.header("x-data-parallel-rank") == str(rank)
            assert seen.header("content-length") == str(len(seen.body))


async def test_the_rank_goes_behind_the_first_brace_and_nothing_else_changes() -> None:
    body = b' \n{ "messages": [{"role":"user","content":"{\\u00e9"}],\n "unkno": {"d": [[{}]]}}  '
    async with FakeWorker(dp_size=2) as worker, running([worker], policy="round_robin") as router:
        assert (await router.client.post(CHAT, content=body)).status_code == 200
        assert worker.record.requests[0].body == body.replace(b"{", b'{"data_parallel_rank":0,', 1)


async def test_a_chunked_upload_is_told_its_rank() -> None:
    body = json.dumps(chat("x" * 5_000)).encode()
    async with FakeWorker(dp_size=2) as worker, running([worker], policy="round_robin") as router:

        async def pieces() -> Any:
            for start in range(0, len(body), 700):
                yield body[start : start + 700]

        for rank in (0, 1):
            assert (await router.client.post(CHAT, content=pieces())).status_code == 200
            seen = worker.record.requests[-1]
            assert json.loads(seen.body) == json.loads(body) | {"data_parallel_rank": rank}
            assert seen.header("content-length") == str(len(seen.body))
            assert seen.header("transfer-encoding") is None


PINS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"data_parallel_rank": 2}, {}),
    ({"routed_dp_rank": 2}, {}),
    ({"routed_dp_rank": 2, "data_parallel_rank": None}, {}),
    ({}, {"X-Data-Parallel-Rank": "2"}),
    ({"data_parallel_rank": 1}, {"x-data-parallel-rank": "2"}),
]


@pytest.mark.parametrize(("fields", "headers"), PINS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_clients_pin_is_honoured_and_nothing_is_spliced(
    fields: dict[str, Any], headers: dict[str, str], stream: bool
) -> None:
    body = json.dumps(chat(stream=stream) | fields).encode()
    async with FakeWorker(dp_size=4) as worker, running([worker]) as router:
        for _ in range(2):
            assert (await router.client.post(CHAT, content=body, headers=headers)).status_code == 200
        assert [target.selections for target in router.core.targets()] == [0, 0, 2, 0]
        for seen in worker.record.requests:
            assert (seen.body, seen.rank, seen.header("x-data-parallel-rank")) == (body, 2, "2")


async def test_the_rank_is_told_anew_at_every_attempt() -> None:
    """Four ranks that fail, then two, then a worker without ranks, which must get the client's own bytes."""
    body = json.dumps(chat()).encode()
    async with FakeWorker(dp_size=4) as four, FakeWorker(dp_size=2) as two, FakeWorker() as one:
        fleet = [four, two, one]
        async with running(fleet, policy="round_robin", retry_initial_backoff_ms=1, retry_jitter_factor=0.0) as router:
            for worker in fleet:
                worker.script = Script(status=503)
            answer = await router.client.post(CHAT, content=body)
            assert answer.status_code == 503
            ranked = [(worker, seen) for worker in fleet for seen in worker.record.requests]
            assert {worker.port for worker, _ in ranked} == {worker.port for worker in fleet}
            for worker, seen in ranked:
                if worker is one:
                    assert (seen.body, seen.header("x-data-parallel-rank")) == (body, None)
                else:
                    assert json.loads(seen.body) == json.loads(body) | {"data_parallel_rank": seen.rank}
                    assert seen.header("x-data-parallel-rank") == str(seen.rank)
                assert seen.header("content-length") == str(len(seen.body))


async def test_a_rank_that_nobody_has_is_the_workers_to_refuse() -> None:
    async with FakeWorker(dp_size=2) as worker, running([worker]) as router:
        for fields, headers in (({"data_parallel_rank": 2}, {}), ({}, {"x-data-parallel-rank": "70000"})):
            answer = await router.client.post(CHAT, json=chat() | fields, headers=headers)
            assert answer.status_code == 400
            assert "out of range [0, 2)" in answer.json()["error"]["message"]
        wrong = await router.client.post(CHAT, json=chat(data_parallel_rank="first"))
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "data_parallel_rank")
        assert router.loads() == 0


async def _pinned(router: Plane) -> int:
    return (await router.client.post(CHAT, json=chat(data_parallel_rank=3))).status_code


async def test_a_pinned_rank_waits_for_a_worker_that_has_it() -> None:
    """The other worker would refuse for good what is only out of reach for now."""
    async with FakeWorker(dp_size=4) as four, FakeWorker(dp_size=2) as two:
        async with running([two], disable_retries=True) as router:
            slots = router.add(four)
            assert await _pinned(router) == 200
            for _ in range(3):
                router.core.observe_probe(slots[0], False, 1)
            assert await _pinned(router) == 503
            for _ in range(2):
                router.core.observe_probe(slots[0], True, 2)
            assert await _pinned(router) == 200
            router.core.drain_worker(slots[0])
            assert await _pinned(router) == 503
            router.core.remove_worker(slots[0])
            assert await _pinned(router) == 400
        assert (four.record.received, two.record.received) == (2, 0)


async def test_without_dp_aware_the_worker_divides_its_requests_itself() -> None:
    async with running_control(dp_aware=False) as control, FakeWorker(dp_size=4, kv_tokens=1_000) as worker:
        info = await control.reaches(await control.register(worker.url), "ready")
        assert len(info["targets"]) == 1
        assert info["kv_capacity_tokens"] == 4_000


async def test_a_worker_that_dies_with_all_its_ranks_fails_no_request() -> None:
    """Ranks live and die as one: what was sent to any of them goes to the other worker, with a rank of that one."""
    async with (
        FakeWorker(dp_size=4) as one,
        FakeWorker(dp_size=4) as two,
        running([one, two], policy="least_load") as router,
    ):
        one.script = two.script = Script(first_byte_seconds=0.02)

        async def client(number: int) -> list[int]:
            statuses = []
            for turn in range(12):
                answer = await router.client.post(CHAT, json=chat(f"{number}: {turn}"))
                statuses.append(answer.status_code)
            return statuses

        clients = [asyncio.create_task(client(number)) for number in range(16)]
        while one.record.received < 40:
            await asyncio.sleep(0.005)
        lost = one.record.in_flight
        await one.stop()
        statuses = [status for answers in await asyncio.gather(*clients) for status in answers]
        assert lost > 0
        assert statuses == [200] * (16 * 12)
        assert {seen.rank for seen in two.record.requests} == {0, 1, 2, 3}
