"""kill -9 of a worker under load: nothing that had not begun fails, nothing leaks, and it is back at once."""

import asyncio
import functools
import json
import time

import pytest

from bench.load import Load, closed_loop, post
from tests.e2e.fleet import FakeWorkerProcess, Fleet, RouterProcess, chat, eventually, words

CONNECTIONS = 64
REQUESTS = 3_000
KILL_AFTER = 400
BACK_SECONDS = 2.0


def requests(count: int, stream: bool, first_seed: int = 0) -> list[bytes]:
    bodies = [
        json.dumps(chat("s", words(20, seed), stream=stream)).encode() for seed in range(first_seed, first_seed + count)
    ]
    return [post("/v1/chat/completions", body) for body in bodies]


def run_and_kill(router: RouterProcess, victim: FakeWorkerProcess, stream: bool) -> Load:
    """The load, and in its middle the end of `victim`."""

    async def kill_in_the_middle() -> None:
        busy = functools.partial(eventually, "the load runs", lambda: victim.counts()["received"] >= KILL_AFTER)
        await asyncio.to_thread(busy)
        victim.kill()

    async def both() -> Load:
        load, _ = await asyncio.gather(
            closed_loop("127.0.0.1", router.port, requests(REQUESTS, stream), CONNECTIONS, count=REQUESTS),
            kill_in_the_middle(),
        )
        return load

    return asyncio.run(both())


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unary", "streaming"])
def test_kill_one_of_four(fleet: Fleet, stream: bool) -> None:
    victim, *others = fleet.fake_workers(4)
    router = fleet.router(workers=[victim, *others])
    for worker in (victim, *others):
        worker.script(first_byte_seconds=0.004, chunk_seconds=0.002 if stream else 0.0)
    load = run_and_kill(router, victim, stream)
    assert len(load.replies) == REQUESTS
    assert [reply for reply in load.failed if not reply.began] == []
    assert [reply.status for reply in load.failed if reply.status != 200] == []
    if not stream:
        assert load.failed == []
    assert len(load.failed) <= CONNECTIONS, "only what was streaming from the victim at that moment may break"
    eventually("all loads are 0", lambda: set(router.loads().values()) == {0})
    assert set(router.metrics().by("smg_worker_requests_active", "worker").values()) == {0}
    assert router.process.exit_code is None

    victim.restart()
    answered_at = time.time()
    victim.script(first_byte_seconds=0.004)
    with_traffic(router, victim, answered_at)


def with_traffic(router: RouterProcess, worker: FakeWorkerProcess, answered_at: float) -> None:
    """Asserts that `worker` gets a request of a running load soon after `answered_at` (time.time())."""
    # Prompts that nobody has in its cache, and enough of them: known ones rightly go to the worker that lived on.
    fresh = requests(12_000, False, first_seed=REQUESTS)
    load = asyncio.run(closed_loop("127.0.0.1", router.port, fresh, CONNECTIONS, seconds=BACK_SECONDS + 0.5))
    assert load.failed == []
    seen = worker.requests()
    assert seen, "the restarted worker got no request"
    assert seen[0].at - answered_at <= BACK_SECONDS


def test_broken_stream_ends_with_an_error_event(fleet: Fleet) -> None:
    """Never a silent clean end: an SSE error event, and the connection is closed without the last chunk."""
    worker = fleet.fake_worker()
    router = fleet.router(workers=[worker])
    worker.script(chunks=6, chunk_seconds=0.01, reset_after_chunks=3)
    load = asyncio.run(
        closed_loop("127.0.0.1", router.port, requests(1, True), 1, count=1, keep_bodies=True),
    )
    (reply,) = load.replies
    assert reply.status == 200
    assert not reply.complete
    assert reply.body.count(b'"content"') == 3
    assert b"[DONE]" not in reply.body
    assert b'"error"' in reply.body
    eventually("loads are 0", lambda: set(router.loads().values()) == {0})


@pytest.mark.parametrize("misbehaviour", ["reset_before_answer", "garbage", "die"])
def test_no_answer_goes_to_one_other_worker(fleet: Fleet, misbehaviour: str) -> None:
    """A prompt that kills its worker is given one second chance, not the whole fleet."""
    workers = fleet.fake_workers(4)
    router = fleet.router(workers=workers)
    for worker in workers:
        worker.script(**{misbehaviour: True, "only_if_body_contains": "poison"})
    status, answer = router.post("/v1/chat/completions", chat("s", "poison"))
    assert status == 502
    assert answer["error"]["code"]
    if misbehaviour == "die":
        eventually("two died", lambda: sum(worker.process.exit_code is not None for worker in workers) == 2)
    else:
        assert sorted(worker.counts()["received"] for worker in workers) == [0, 0, 1, 1]
    assert router.post("/v1/chat/completions", chat("s", "harmless"))[0] == 200
    eventually("loads are 0", lambda: set(router.loads().values()) == {0})


def test_one_misbehaving_worker_is_not_seen_by_clients(fleet: Fleet) -> None:
    for misbehaviour in ({"reset_before_answer": True}, {"garbage": True}, {"status": 503}, {"status": 500}):
        bad, good = fleet.fake_workers(2)
        router = fleet.router(workers=[bad, good])
        bad.script(**misbehaviour)
        load = asyncio.run(closed_loop("127.0.0.1", router.port, requests(60, False), 4, count=60))
        assert load.failed == [], misbehaviour
        fleet.processes.stop(router.process)


def test_idle_connections_that_the_worker_closes_cause_no_error(fleet: Fleet) -> None:
    worker = fleet.fake_worker()
    router = fleet.router(workers=[worker])
    worker.script(idle_close_seconds=0.05)
    for pause in (0.0, 0.04, 0.05, 0.06, 0.1) * 4:
        router.chat("s", "again")
        time.sleep(pause)
    assert worker.counts()["received"] == 20


def test_dead_worker_is_left_out_and_the_rest_serves(fleet: Fleet) -> None:
    victim, other = fleet.fake_workers(2)
    router = fleet.router(
        "--health-check-interval-secs", "1", "--health-failure-threshold", "1", workers=[victim, other]
    )
    victim.kill()
    eventually("the dead worker is marked", lambda: router.get("/readiness")[1]["healthy_workers"] == 1, 5)
    before = other.counts()["received"]
    for seed in range(10):
        router.chat("s", words(10, seed))
    assert other.counts()["received"] == before + 10
    victim.restart()
    router.wait_for_workers(2, timeout=BACK_SECONDS)
