"""What routers and operators ask of a worker, before it is ready, while it works, and after its engine has failed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from tests.worker.byte_model import write_folder
from tests.worker.http_fixtures import RunningApp, running_app
from warmroute_worker.engine_client import Phase

if TYPE_CHECKING:
    from pathlib import Path

INFO_PATHS = [
    "/v1/models",
    "/server_info",
    "/get_server_info",
    "/model_info",
    "/get_model_info",
    "/get_load",
    "/v1/loads",
]


async def test_a_ready_worker(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        assert (await app.client.get("/health")).status_code == 200
        (card,) = (await app.client.get("/v1/models")).json()["data"]
        assert card.pop("created") > 1_700_000_000
        assert card == {
            "id": "tiny",
            "object": "model",
            "owned_by": "sglang",
            "root": str(tmp_path),
            "max_model_len": 512,
        }
        info = (await app.client.get("/server_info")).json()
        assert info == (await app.client.get("/get_server_info")).json()
        assert info["served_model_name"] == "tiny"
        assert info["model_path"] == info["tokenizer_path"] == str(tmp_path)
        assert (info["tp_size"], info["dp_size"], info["pp_size"]) == (1, 1, 1)
        assert (info["context_length"], info["max_total_tokens"], info["max_running_requests"]) == (512, 4096, 256)
        assert (info["requested"]["device"], info["effective"]["device"]) == ("auto", "cpu")
        assert (info["requested"]["max_total_tokens"], info["effective"]["max_total_tokens"]) == (None, 4096)
        assert info["effective"]["cuda_graph"] == "none: not implemented"
        model = (await app.client.get("/model_info")).json()
        assert model == (await app.client.get("/get_model_info")).json()
        assert (model["is_generation"], model["model_type"], model["architectures"]) == (
            True,
            "llama",
            ["LlamaForCausalLM"],
        )


async def test_a_worker_that_starts_or_has_failed_answers_503(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path), ready=False, start_seconds=0.5, fails_with="no memory") as app:
        await app.until(lambda: app.service.engine.phase is Phase.STARTING)
        await all_say(app, "starting")
        await app.until(lambda: app.service.engine.phase is Phase.FAILED)
        await all_say(app, "engine_failed")
        response = await app.client.get("/health")
        assert "no memory" in response.json()["error"]["message"]


async def all_say(app: RunningApp, code: str) -> None:
    responses = [await app.client.get(path) for path in ("/health", *INFO_PATHS, "/flush_cache")]
    responses.append(await app.post("/generate", text="a"))
    responses.append(await app.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}]))
    for response in responses:
        assert response.status_code == 503, response.url
        assert response.json()["error"]["code"] == code
        assert int(response.headers["retry-after"]) >= 1
    assert (await app.client.get("/metrics")).status_code == 200


async def test_load_while_requests_run_and_after(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        idle = [{"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}]
        assert (await app.client.get("/get_load")).json() == idle
        app.driver.paused.set()
        requests = [asyncio.create_task(app.post("/generate", text=f"request {i}")) for i in range(3)]
        await app.until(lambda: len(app.service.engine.live) == 3)
        (load,) = (await app.client.get("/get_load")).json()
        assert (load["num_reqs"], load["num_waiting_reqs"]) == (3, 3), "no step yet, so none runs"
        (load,) = (await app.client.get("/v1/loads?include=core")).json()["loads"]
        assert load["num_total_reqs"] == 3
        assert load["max_total_num_tokens"] == 4096
        refused = await app.client.post("/flush_cache")
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "busy"
        app.driver.paused.clear()
        await asyncio.gather(*requests)
        assert (await app.client.get("/get_load")).json() == idle
        assert (await app.client.get("/flush_cache")).status_code == 200
        assert (await app.client.post("/flush_cache")).text == "Cache flushed.\n"


async def test_flushing_forgets(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        for cached in (0, 32):
            answer = (await app.post("/generate", text="p" * 40)).json()
            assert answer["meta_info"]["cached_tokens"] == cached
        await app.client.post("/flush_cache")
        answer = (await app.post("/generate", text="p" * 40)).json()
        assert answer["meta_info"]["cached_tokens"] == 0


async def test_metrics_agree_with_the_clients_counts(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        prompt = completion = cached = 0
        for index in range(5):
            usage = (await app.post("/v1/completions", prompt="p" * 40 + str(index), max_tokens=7)).json()["usage"]
            prompt += usage["prompt_tokens"]
            completion += usage["completion_tokens"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]
        values = await scrape(app)
        assert values["sglang:prompt_tokens_total"] == prompt == 205
        assert values["sglang:generation_tokens_total"] == completion == 35
        assert values["sglang:cached_tokens_total"] == cached == 128
        assert values["sglang:cache_hit_rate"] == cached / prompt
        assert values["sglang:num_requests_total"] == 5
        assert values["sglang:time_to_first_token_seconds_count"] == 5
        assert values["sglang:e2e_request_latency_seconds_count"] == 5
        assert values["sglang:inter_token_latency_seconds_count"] == 30
        assert values["sglang:num_running_reqs"] == values["sglang:num_queue_reqs"] == 0
        assert values["sglang:token_usage"] == 0
        assert values["sglang:max_total_num_tokens"] == 4096
        assert values["sglang:utilization"] == 0


async def test_times_and_modes_come_from_the_driver(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        for _ in range(3):
            await app.post("/v1/completions", prompt="p" * 40, max_tokens=7)
        values = await scrape(app, "stage", "mode")
    queue, stage = "sglang:queue_time_seconds", "sglang:per_stage_req_latency_seconds"
    assert (values[queue + "_count"], values[queue + "_sum"]) == (3, 0.75)
    for name, seconds in (("prefill_waiting", 0.25), ("prefill_forward", 0.5)):
        assert (values[f"{stage}_count {name}"], values[f"{stage}_sum {name}"]) == (3, 3 * seconds)
    tokens = {mode: values[f"sglang:realtime_tokens_total {mode}"] for mode in ("prefill_compute", "prefill_cache")}
    assert tokens == {"prefill_compute": 56, "prefill_cache": 64}
    assert values["sglang:realtime_tokens_total decode"] == 21
    passes = [name for name in values if name.startswith("sglang:cuda_graph_passes_total ")]
    assert {name.split()[1] for name in passes} == {
        *("prefill_cuda_graph", "prefill_none", "decode_cuda_graph", "decode_none")
    }
    assert values["sglang:is_cuda_graph"] == values["sglang:num_retracted_reqs"] == 0


async def test_buckets_are_those_of_the_flags(tmp_path: Path) -> None:
    given = {
        "bucket_time_to_first_token": (0.1, 0.25),
        "bucket_inter_token_latency": (0.5,),
        "bucket_e2e_request_latency": (1.0, 2.0, 4.0),
    }
    async with running_app(write_folder(tmp_path), args=given) as app:
        await app.post("/v1/completions", prompt="p", max_tokens=7)
        text = (await app.client.get("/metrics")).text
    ends: dict[str, list[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "le" in sample.labels:
                ends.setdefault(sample.name, []).append(sample.labels["le"])
    assert ends["sglang:time_to_first_token_seconds_bucket"] == ["0.1", "0.25", "+Inf"]
    assert ends["sglang:inter_token_latency_seconds_bucket"] == ["0.5", "+Inf"]
    assert ends["sglang:e2e_request_latency_seconds_bucket"] == ["1.0", "2.0", "4.0", "+Inf"]


async def scrape(app: RunningApp, *labels: str) -> dict[str, float]:
    """Values by name, and by those of `labels` that a sample has."""
    response = await app.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(response.text) for sample in family.samples]
    assert all(sample.labels["model_name"] == "tiny" for sample in samples)
    return {
        " ".join([sample.name, *(sample.labels[label] for label in labels if label in sample.labels)]): sample.value
        for sample in samples
        if "le" not in sample.labels
    }


async def test_paths_and_methods_that_do_not_exist(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        absent = await app.client.get("/nothing")
        assert (absent.status_code, absent.json()["error"]["code"]) == (404, "not_found")
        wrong = await app.client.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"


async def test_a_full_queue_and_a_draining_worker_refuse(tmp_path: Path) -> None:
    args = {"max_queued_requests": 1}
    async with running_app(write_folder(tmp_path), args=args, max_running_requests=1) as app:
        app.driver.paused.set()
        requests = [asyncio.create_task(app.post("/generate", text="a")) for _ in range(2)]
        await app.until(lambda: len(app.service.engine.live) == 2)
        full = await app.post("/generate", text="a")
        assert (full.status_code, full.json()["error"]["code"]) == (503, "queue_full")
        app.service.draining = True
        draining = await app.post("/generate", text="a")
        assert (draining.status_code, draining.json()["error"]["code"]) == (503, "draining")
        assert (await app.client.get("/health")).status_code == 503
        app.driver.paused.clear()
        assert [response.status_code for response in await asyncio.gather(*requests)] == [200, 200]
