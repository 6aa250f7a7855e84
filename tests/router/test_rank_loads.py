"""What workers say of each dp rank: polled, shown, exported, and forgotten when they stop saying it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx

from tests.fake_worker import FakeWorker
from tests.router.running_control import RunningControl, running_control
from tests.router.test_metrics import Samples, answer_one, scrape

OFTEN: dict[str, Any] = {"load_monitor_interval": 0.05, "health_check_interval_secs": 0.2}


async def ready(control: RunningControl, worker: FakeWorker) -> str:
    worker_id = await control.register(worker.url)
    await control.reaches(worker_id, "ready")
    return worker_id


async def targets(
    control: RunningControl, worker_id: str, until: Callable[[list[dict[str, Any]]], bool]
) -> list[dict[str, Any]]:
    """Its ranks, as soon as they are as wished for."""
    async with asyncio.timeout(5):
        found: list[dict[str, Any]] = []
        while not found or not until(found):
            found = (await control.info(worker_id))["targets"]
            await asyncio.sleep(0.02)
    return found


async def ask(worker: FakeWorker, rank: int, times: int) -> None:
    """Straight at the worker, as another router would."""
    async with httpx.AsyncClient(base_url=worker.url) as client:
        for _ in range(times):
            body = {"text": "a prompt " * 64, "data_parallel_rank": rank}
            assert (await client.post("/generate", content=json.dumps(body))).status_code == 200


async def test_each_rank_has_its_own_row_and_series() -> None:
    async with (
        FakeWorker(dp_size=3, rank_kv_tokens=(1_000, 2_000, 3_000)) as worker,
        running_control(**OFTEN) as control,
    ):
        await ask(worker, 1, 2)
        await ask(worker, 2, 1)
        worker_id = await ready(control, worker)
        rows = await targets(control, worker_id, lambda rows: rows[1]["engine"] is not None)
        assert [row["kv_capacity_tokens"] for row in rows] == [1_000, 2_000, 3_000]
        assert [row["engine"]["kv_capacity_tokens"] for row in rows] == [1_000, 2_000, 3_000]
        used = [cache.used_tokens for cache in worker.caches]
        assert used[0] == 0 < used[1]
        assert [row["engine"]["used_tokens"] for row in rows] == used
        assert [row["engine"]["cache_hit_rate"] for row in rows] == [0.0, worker.hit_rates()[1], 0.0]
        assert [row["cache_hit_rate"] for row in rows] == [None, None, None], "nothing was routed through this router"

        samples = await scrape(control)
        labels = {"worker": worker.url, "model": "fake-model"}
        assert worker.hit_rates()[1] > 0.4
        for rank in range(3):
            hit_rate = samples.of("smg_engine_cache_hit_rate", **labels, dp_rank=str(rank))
            assert hit_rate == worker.hit_rates()[rank]
            capacity = samples.of("warmroute_rank_kv_capacity_tokens", worker=worker.url, dp_rank=str(rank))
            assert capacity == (rank + 1) * 1_000
        assert samples.of("smg_engine_load_polls_total", result="success") >= 1
        assert samples.of("smg_engine_running_requests", **labels) == 0


async def test_what_the_router_sent_is_counted_by_rank() -> None:
    async with FakeWorker(dp_size=2) as worker, running_control(**OFTEN, policy="round_robin") as control:
        worker_id = await ready(control, worker)
        for _ in range(3):
            body = b'{"model": "fake-model", "messages": [{"role": "user", "content": "x"}]}'
            answer_one(control, body, (200,), (100, 5, 40), 0.1)
        samples = await scrape(control)

        def of(name: str, rank: str) -> float:
            return samples.of(name, worker=worker.url, dp_rank=rank)

        assert [of("warmroute_rank_selections_total", rank) for rank in "01"] == [2, 1]
        assert [of("warmroute_rank_prompt_tokens_total", rank) for rank in "01"] == [200, 100]
        assert [of("warmroute_rank_reported_cached_tokens_total", rank) for rank in "01"] == [80, 40]
        rows = (await control.info(worker_id))["targets"]
        assert [row["cache_hit_rate"] for row in rows] == [0.4, 0.4]


async def test_a_worker_that_stops_telling_is_unknown_not_idle() -> None:
    async with FakeWorker(dp_size=2) as worker, running_control(**OFTEN) as control:
        worker_id = await ready(control, worker)
        await targets(control, worker_id, lambda rows: rows[0]["engine"] is not None)
        await worker.stop()
        rows = await targets(control, worker_id, lambda rows: rows[0]["engine"] is None)
        assert rows[1]["engine"] is None
        assert not (await scrape(control)).labels("smg_engine_running_requests")
        await worker.start()
        await targets(control, worker_id, lambda rows: rows[0]["engine"] is not None)


async def test_a_worker_without_the_path_is_left_in_peace() -> None:
    async with FakeWorker(dialect="vllm") as worker, running_control(**OFTEN) as control:
        worker_id = await ready(control, worker)
        async with asyncio.timeout(5):
            while (await failures(control)) < 2:
                await asyncio.sleep(0.02)
        info = await control.info(worker_id)
        assert (info["status"], info["targets"][0]["engine"]) == ("ready", None)


async def failures(control: RunningControl) -> float:
    samples: Samples = await scrape(control)
    return samples.of("smg_engine_load_polls_total", result="failure")


async def test_loads_of_other_ranks_than_registered_are_of_nobody() -> None:
    async with FakeWorker(dp_size=2) as worker, running_control(**OFTEN, dp_aware=False) as control:
        worker_id = await ready(control, worker)
        async with asyncio.timeout(5):
            while worker.record.other_paths.get("/v1/loads", 0) < 3:
                await asyncio.sleep(0.02)
        (row,) = (await control.info(worker_id))["targets"]
        assert (row["engine"], row["kv_capacity_tokens"]) == (None, 2 * 262_144)


async def test_monitoring_can_be_switched_off() -> None:
    async with FakeWorker() as worker, running_control(**OFTEN, disable_load_monitoring=True) as control:
        await ready(control, worker)
        await asyncio.sleep(0.3)
        assert "/v1/loads" not in worker.record.other_paths
