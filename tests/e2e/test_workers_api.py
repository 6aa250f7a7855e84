"""Workers that come and go while the router runs."""

import asyncio
import time

from bench.load import closed_loop
from tests.e2e.fleet import Fleet, RouterProcess, chat, eventually, words
from tests.e2e.test_worker_death import requests
from tests.processes import request


def worker_id(router: RouterProcess, url: str) -> str:
    return str(next(worker["id"] for worker in router.workers() if worker["url"] == url))


def test_post_get_delete(fleet: Fleet) -> None:
    router = fleet.router()
    worker = fleet.fake_worker()
    status, accepted = router.post("/workers", {"url": worker.url})
    assert status == 202
    assert accepted["worker_id"]
    router.wait_for_workers(1, timeout=2)
    status, info = router.get(f"/workers/{accepted['worker_id']}")
    assert status == 200
    assert (info["url"], info["is_healthy"], info["load"]) == (worker.url, True, 0)
    assert router.chat("s", "u")["system_fingerprint"] == worker.name
    status, _ = request("DELETE", f"{router.url}/workers/{accepted['worker_id']}")
    assert status == 202
    eventually("it is gone", lambda: router.workers() == [], 10)
    assert router.post("/v1/chat/completions", chat("s", "u"))[0] == 503


def test_bad_urls_and_doubles(fleet: Fleet) -> None:
    worker = fleet.fake_worker()
    router = fleet.router(workers=[worker])
    for url in ("ftp://x", "", "http://"):
        assert router.post("/workers", {"url": url})[0] == 400
    status, answer = router.post("/workers", {"url": worker.url})
    assert status == 409
    assert set(answer) == {"error", "code"}
    assert router.get("/workers/not-an-id")[0] == 400
    assert router.get("/workers/01890a5d-ac96-774b-bcce-b302099a8057")[0] == 404


def test_a_worker_is_used_only_after_it_answered(fleet: Fleet) -> None:
    slow, ready = fleet.fake_workers(2)
    slow.script(health_status=503)
    router = fleet.router(workers=[ready])
    assert router.post("/workers", {"url": slow.url})[0] == 202
    for seed in range(20):
        router.chat("s", words(10, seed))
    assert slow.counts()["received"] == 0
    slow.script()
    router.wait_for_workers(2, timeout=5)


def test_add_and_remove_under_load(fleet: Fleet) -> None:
    stays, leaves = fleet.fake_workers(2)
    router = fleet.router(workers=[stays, leaves])
    for worker in (stays, leaves):
        worker.script(first_byte_seconds=0.005, chunk_seconds=0.005)
    comes = fleet.fake_worker()

    def change() -> float:
        time.sleep(0.4)
        assert router.post("/workers", {"url": comes.url})[0] == 202
        assert request("DELETE", f"{router.url}/workers/{worker_id(router, leaves.url)}")[0] == 202
        return time.time()

    async def both() -> None:
        load, removed_at = await asyncio.gather(
            closed_loop("127.0.0.1", router.port, requests(1600, True), 64, count=1600), asyncio.to_thread(change)
        )
        assert load.failed == []
        late = [seen for seen in leaves.requests() if seen.at > removed_at + 0.05]
        assert late == []

    asyncio.run(both())
    assert comes.counts()["received"] > 0


def test_get_loads_shape(fleet: Fleet) -> None:
    workers = fleet.fake_workers(2)
    router = fleet.router(workers=workers)
    status, answer = router.get("/get_loads")
    assert status == 200
    assert {entry["worker"] for entry in answer["workers"]} == {worker.url for worker in workers}
    assert all(isinstance(entry["load"], int) for entry in answer["workers"])


def test_router_stops_on_sigterm_and_leaves_nothing(fleet: Fleet) -> None:
    router = fleet.router(workers=fleet.fake_workers(1))
    router.chat("s", "u")
    assert fleet.processes.stop(router.process, grace=10) == 0
