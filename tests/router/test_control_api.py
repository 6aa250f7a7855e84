"""The worker API and the admin API, over HTTP, with scripted workers."""

import asyncio
import json
import time
import uuid

import pytest

from tests.fake_worker import FakeWorker
from tests.processes import free_port
from tests.router.running_control import running_control

NOWHERE = "http://127.0.0.1:9"  # discard: nobody listens


async def test_registration_is_accepted_then_ready() -> None:
    async with running_control() as control, FakeWorker(models=("m", "alias"), dp_size=2) as worker:
        before_ms = time.time_ns() // 1_000_000
        answer = await control.http.post("/workers", json={"url": worker.url + "/", "something": ["else"]})
        assert answer.status_code == 202
        accepted = answer.json()
        worker_id = accepted["worker_id"]
        assert uuid.UUID(worker_id).version == 7
        assert before_ms <= uuid.UUID(worker_id).int >> 80 <= time.time_ns() // 1_000_000
        assert answer.headers["location"] == accepted["location"] == f"/workers/{worker_id}"
        assert (accepted["status"], accepted["url"]) == ("accepted", worker.url)
        assert accepted["message"]

        info = await control.reaches(worker_id, "ready")
        assert info["id"] == worker_id
        assert info["url"] == worker.url
        assert (info["model_id"], info["models"]) == ("m", ["m", "alias"])
        assert (info["worker_type"], info["connection_mode"], info["runtime_type"]) == ("regular", "http", "sglang")
        assert (info["priority"], info["cost"], info["labels"]) == (50, 1.0, {})
        assert (info["is_healthy"], info["load"], info["dp_size"], info["job_status"]) == (True, 0, 2, None)
        assert info["kv_capacity_tokens"] == worker.facts.kv_tokens
        assert [(t["dp_rank"], t["available"], t["load"]) for t in info["targets"]] == [(0, True, 0), (1, True, 0)]
        for key in ("predicted_cached_tokens", "reported_cached_tokens", "index_characters", "index_entries"):
            assert info["targets"][0][key] == 0


async def test_a_label_says_how_a_model_is_routed(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeWorker() as first, FakeWorker() as second, running_control() as control:
        for worker, policy in ((first, "least_load"), (second, "random")):
            worker_id = await control.register(worker.url, labels={"policy": policy})
            info = await control.reaches(worker_id, "ready")
            assert info["policy"] == "least_load", "the first worker of a model says it"
    assert f"worker {second.url}: its label asks for policy random, but its model has least_load" in caplog.text
    assert first.url not in caplog.text


async def test_registration_of_a_worker_that_is_not_there_yet() -> None:
    async with running_control() as control:
        port = free_port()
        worker_id = await control.register(f"http://127.0.0.1:{port}", model_id="named", priority=3, labels={"a": "b"})
        info = await control.info(worker_id)
        assert (info["status"], info["is_healthy"], info["targets"], info["load"]) == ("pending", False, [], 0)
        assert (info["model_id"], info["priority"], info["labels"]) == ("named", 3, {"a": "b"})
        await asyncio.sleep(0.2)
        job = (await control.info(worker_id))["job_status"]
        assert (job["job_type"], job["worker_url"], job["status"]) == ("AddWorker", info["url"], "processing")
        assert "cannot connect" in job["message"]
        worker = FakeWorker()
        await worker.start(port=port)
        began = time.monotonic()
        await control.reaches(worker_id, "ready")
        assert time.monotonic() - began < 2.0
        await worker.stop()


async def test_startup_timeout_is_no_end() -> None:
    port = free_port()
    urls = (f"http://127.0.0.1:{port}",)
    fields = {"worker_urls": urls, "worker_startup_timeout_secs": 0.3, "worker_startup_check_interval": 0.1}
    async with running_control(**fields) as control:
        (info,) = (await control.http.get("/workers")).json()["workers"]
        info = await control.reaches(info["id"], "failed")
        assert info["job_status"]["status"] == "failed"
        worker = FakeWorker()
        await worker.start(port=port)
        await control.reaches(info["id"], "ready")
        await worker.stop()


@pytest.mark.parametrize("body", [b"", b"{}", b'{"url": "ftp://w"}', b'{"url": "w:1", "worker_type": "decode"}'])
async def test_bad_registration(body: bytes) -> None:
    async with running_control() as control:
        answer = await control.http.post("/workers", content=body)
        assert answer.status_code == 400
        assert answer.json()["code"] == answer.headers["x-smg-error-code"] == "BAD_REQUEST"
        assert answer.json()["error"]
        assert (await control.http.get("/workers")).json()["total"] == 0


async def test_same_url_twice() -> None:
    async with running_control() as control, FakeWorker() as worker:
        worker_id = await control.register(worker.url)
        for url in (worker.url, worker.url.removeprefix("http://")):
            answer = await control.http.post("/workers", json={"url": url})
            assert answer.status_code == 409
            assert answer.json()["code"] == "WORKER_ALREADY_EXISTS"
            assert worker_id in answer.json()["error"]


async def test_list_and_filter() -> None:
    async with running_control() as control, FakeWorker(models=("a", "shared")) as one, FakeWorker(("b",)) as two:
        for worker in (one, two):
            await control.reaches(await control.register(worker.url), "ready")
        await control.register(NOWHERE)
        listing = (await control.http.get("/workers")).json()
        assert listing["total"] == len(listing["workers"]) == 3
        assert listing["stats"] == {"prefill_count": 0, "decode_count": 0, "regular_count": 3}
        for model, urls in {"a": [one.url], "shared": [one.url], "b": [two.url], "c": []}.items():
            chosen = (await control.http.get("/workers", params={"model": model})).json()
            assert [worker["url"] for worker in chosen["workers"]] == urls


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_worker_that_does_not_exist(method: str) -> None:
    async with running_control() as control:
        for path, status, code in (
            ("/workers/1", 400, "BAD_REQUEST"),
            ("/workers/http%3A%2F%2Fw", 400, "BAD_REQUEST"),
            ("/workers/0199a0a8-7c3e-7000-8000-000000000000", 404, "WORKER_NOT_FOUND"),
        ):
            answer = await control.http.request(method, path)
            assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_delete_idle_worker_then_register_it_again() -> None:
    async with running_control() as control, FakeWorker() as worker:
        first = await control.register(worker.url)
        await control.reaches(first, "ready")
        assert (await control.http.delete(f"/workers/{first}")).status_code == 202
        second = await control.register(worker.url)  # at once: a worker that leaves does not keep its URL
        async with asyncio.timeout(2.0):
            while (await control.http.get(f"/workers/{first}")).status_code != 404:
                await asyncio.sleep(0.02)
        await control.reaches(second, "ready")
        assert [slot for slot in range(4) if control.directory.address(slot)] != []
        assert (await control.http.delete(f"/workers/{second}")).status_code == 202
        await asyncio.sleep(0.3)
        assert control.core.targets() == []
        assert [slot for slot in range(4) if control.directory.address(slot)] == []


async def test_startup_workers_inherit_the_key_and_others_bring_their_own() -> None:
    async with _Recorder() as recorder:
        async with running_control(worker_urls=(recorder.url,), api_key="router-key") as control:
            await recorder.asked(3)
            assert control.directory.address(0) is None  # the recorder never says which model it serves
        assert set(recorder.authorizations) == {"Bearer router-key"}
    async with _Recorder() as recorder, running_control(api_key="router-key") as control:
        worker_id = await control.register(recorder.url, api_key="own")
        await recorder.asked(3)
        assert "own" not in json.dumps(await control.info(worker_id))
        assert set(recorder.authorizations) == {"Bearer own"}
    async with _Recorder() as recorder, running_control(api_key="router-key") as control:
        await control.register(recorder.url, api_key=None)
        await recorder.asked(3)
        assert set(recorder.authorizations) == {None}


async def test_models_come_from_the_registry() -> None:
    async with running_control() as control:
        answer = await control.http.get("/v1/models")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "no_available_workers"
        async with FakeWorker(models=("a", "b")) as one, FakeWorker(models=("a",)) as two:
            for worker in (one, two):
                await control.reaches(await control.register(worker.url), "ready")
        # both are dead now, but what they serve is known
        listing = (await control.http.get("/v1/models")).json()
        assert listing["object"] == "list"
        assert [card["id"] for card in listing["data"]] == ["a", "b"]
        assert listing["data"][0].keys() >= {"id", "object", "created", "owned_by"}


async def test_loads() -> None:
    async with running_control() as control, FakeWorker(dp_size=2) as one, FakeWorker(dialect="vllm") as two:
        for worker in (one, two):
            await control.reaches(await control.register(worker.url), "ready")
        await control.register(NOWHERE)
        one.caches[0].insert(b"x" * 4096)
        one.caches[1].insert(b"y" * 4096)
        answer = (await control.http.get("/get_loads")).json()
        used = sum(cache.used_tokens for cache in one.caches)
        assert used > 0
        assert answer == {
            "workers": [
                {"worker": one.url, "load": used},
                {"worker": two.url, "load": -1},
                {"worker": NOWHERE, "load": -1},
            ]
        }


async def test_what_was_lost_is_swept_at_once() -> None:
    async with FakeWorker() as worker, running_control(index_memory=1 << 20) as control:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        core = control.core
        for number in range(100):
            lease = core.select(core.read(b"/generate", b"", b'{"text": "%d"}' % number, 1), 1, False)
            assert lease is not None
        assert (await control.http.post("/flush_cache")).status_code == 200
        await asyncio.sleep(2.5)
        assert core.evict(1, 1 << 20) == 0


async def test_flush() -> None:
    async with running_control() as control:
        empty = await control.http.post("/flush_cache")
        assert (empty.status_code, empty.json()["status"], empty.json()["workers_flushed"]) == (200, "success", 0)
        async with FakeWorker() as one, FakeWorker() as two:
            for worker in (one, two):
                await control.reaches(await control.register(worker.url), "ready")
                worker.caches[0].insert(b"x" * 4096)
            done = await control.http.post("/flush_cache")
            assert done.status_code == 200
            expected = {"status": "success", "workers_flushed": 2, "total_http_workers": 2, "total_workers": 2}
            assert expected.items() <= done.json().items()
            assert one.caches[0].used_tokens == two.caches[0].used_tokens == 0
            await two.stop()
            partial = await control.http.post("/flush_cache")
            assert partial.status_code == 206
            answer = partial.json()
            assert (answer["status"], answer["successful"]) == ("partial_success", [one.url])
            assert answer["failed"][0]["worker"] == two.url
            assert "cannot connect" in answer["failed"][0]["error"]


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info", "/model_info", "/get_model_info"])
async def test_info_of_a_ready_worker(path: str) -> None:
    async with running_control() as control:
        refused = await control.http.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_available_workers")
        async with FakeWorker(dialect="vllm") as mute, FakeWorker(models=("m",)) as worker:
            await control.register(NOWHERE)
            for one in (mute, worker):
                await control.reaches(await control.register(one.url), "ready")
            answer = await control.http.get(path)
            assert answer.status_code == 200
            assert answer.json()["model_path"] == "m"


async def test_config_shows_effective_values_without_secrets() -> None:
    async with running_control(api_key="s3cret", cache_threshold=0.25) as control:
        text = (await control.http.get("/config")).text
        assert "s3cret" not in text
        assert json.loads(text)["cache_threshold"]["value"] == 0.25


WRONG = [
    ("GET", "/nothing", 404, "not_found"),
    ("POST", "/v1/embeddings", 404, "not_found"),
    ("PUT", "/workers", 405, "method_not_allowed"),
    ("POST", "/health", 405, "method_not_allowed"),
    ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ("DELETE", "/generate", 405, "method_not_allowed"),
    ("GET", "/flush_cache", 405, "method_not_allowed"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), WRONG)
async def test_wrong_path_or_method(method: str, path: str, status: int, code: str) -> None:
    async with running_control() as control:
        answer = await control.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == answer.headers["x-smg-error-code"] == code
        assert ("allow" in answer.headers) == (status == 405)
        # the connection is still good
        assert (await control.http.get("/health")).text == "OK"


async def test_oversized_registration() -> None:
    async with running_control() as control:
        answer = await control.http.post("/workers", content=b"x" * (2 << 20))
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "payload_too_large"


async def test_health_and_readiness() -> None:
    async with running_control() as control, FakeWorker() as worker:
        for path in ("/health", "/liveness"):
            assert (await control.http.get(path)).status_code == 200
        answer = await control.http.get("/readiness")
        assert answer.status_code == 503
        assert answer.json()["reason"] == "insufficient healthy workers"
        await control.reaches(await control.register(worker.url), "ready")
        answer = await control.http.get("/readiness")
        assert answer.status_code == 200
        assert answer.json() == {"status": "ready", "healthy_workers": 1, "total_workers": 1}


async def test_two_hundred_requests_at_once() -> None:
    async with running_control() as control:
        answers = await asyncio.gather(*(control.http.get("/workers") for _ in range(200)))
        assert {answer.status_code for answer in answers} == {200}


class _Recorder:
    """A worker that answers everything 200 without content, and remembers what authorization it got."""

    def __init__(self) -> None:
        self.authorizations: list[str | None] = []

    async def __aenter__(self) -> "_Recorder":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    async def asked(self, count: int) -> None:
        async with asyncio.timeout(5.0):
            while len(self.authorizations) < count:
                await asyncio.sleep(0.02)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = [line.partition(": ") for line in head.split("\r\n")]
        self.authorizations.append({name.lower(): value for name, _, value in lines}.get("authorization"))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()


async def test_why_a_request_would_go_where() -> None:
    async with running_control(policy="least_cost") as control, FakeWorker(models=("m",), dp_size=2) as worker:
        await control.reaches(await control.register(worker.url), "ready")
        body = {"model": "m", "messages": [{"role": "user", "content": "x" * 4_000}]}
        before = [target.selections for target in control.core.targets()]
        answer = (await control.http.post("/debug/route", json=body)).json()
        assert answer["policy"] == "least_cost"
        assert answer["reason"] == "least cost"
        assert answer["chosen"]["url"] == worker.url
        assert [candidate["dp_rank"] for candidate in answer["candidates"]] == [0, 1]
        assert all(candidate["cost_seconds"] > 0 for candidate in answer["candidates"])
        assert [target.selections for target in control.core.targets()] == before
        assert control.core.series() == []
        pinned = await control.http.post("/debug/route", json=body, headers={"X-Data-Parallel-Rank": "1"})
        assert [candidate["dp_rank"] for candidate in pinned.json()["candidates"]] == [1]
        for path, content, status in [
            ("/debug/route", b"{", 400),
            ("/debug/route?path=/v1/models", b"{}", 400),
            ("/debug/route", b'{"model":"other","messages":[{"role":"user","content":"x"}]}', 200),
        ]:
            assert (await control.http.post(path, content=content)).status_code == status
