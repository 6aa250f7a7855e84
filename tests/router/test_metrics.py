"""Metrics: names, labels and counts, read as Prometheus reads them."""

import time
from collections.abc import Iterable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.fake_worker import FakeWorker
from tests.router.running_control import RunningControl, running_control
from warmroute._core import OutcomeKind

ROUTER = {"router_type": "http", "backend_type": "regular", "connection_mode": "http"}
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "%b"}], "stream": true}'


class Samples:
    """The samples of one exposition."""

    def __init__(self, text: str) -> None:
        self.all = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def of(self, name: str, **labels: str) -> float:
        """Sum over the samples of that name that have these labels; fails when there is none."""
        found = [one.value for one in self.all if one.name == name and labels.items() <= one.labels.items()]
        assert found, f"no sample {name} {labels}"
        return sum(found)

    def labels(self, name: str) -> list[dict[str, str]]:
        return [one.labels for one in self.all if one.name == name]


async def scrape(control: RunningControl) -> Samples:
    answer = await control.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return Samples(answer.text)


def answer_one(
    control: RunningControl, body: bytes, statuses: Iterable[int], tokens: tuple[int, int, int], seconds: float
) -> None:
    """One client request, answered after an attempt per status; `tokens`: prompt, completion, cached."""
    now_ns = time.monotonic_ns()
    request = control.core.read(b"/v1/chat/completions", b"", body, now_ns)
    first_byte_ns, end_ns = now_ns + int(seconds * 5e8), now_ns + int(seconds * 1e9)
    for status in statuses:
        lease = control.core.select(request, now_ns, True)
        assert lease is not None
        lease.release(OutcomeKind.ANSWERED, status, first_byte_ns, None, None, *tokens, end_ns)
    request.finish(status, first_byte_ns, end_ns)


async def test_series_of_a_worker_exist_from_registration_to_removal() -> None:
    async with running_control() as control, FakeWorker(models=("m",)) as worker:
        url = worker.url
        dead = "http://127.0.0.1:9"
        await control.register(dead)
        worker_id = await control.register(url)
        samples = await scrape(control)
        assert samples.of("smg_worker_health", worker=dead) == 0
        assert samples.of("smg_worker_requests_active", worker=dead) == 0
        assert samples.of("sglang_cache_hit_rate", source=dead, worker_addr=dead) == 0
        await control.reaches(worker_id, "ready")
        samples = await scrape(control)
        assert samples.of("smg_worker_health", worker=url) == 1
        assert samples.of("smg_worker_cb_state", worker=url) == 0
        assert samples.of("warmroute_worker_available", worker=url) == 1
        assert samples.of("smg_worker_pool_size", worker_type="regular", connection_mode="http", model="m") == 1
        assert samples.of("smg_worker_health_checks_total", worker_type="regular", result="success") >= 2
        await control.http.delete(f"/workers/{worker_id}")
        control.plane.registry.settle(time.monotonic_ns())
        samples = await scrape(control)
        assert url not in {label for one in samples.all for label in one.labels.values()}
        assert samples.of("smg_worker_health", worker=dead) == 0


async def test_draining_worker_and_its_successor_share_their_series() -> None:
    async with running_control() as control, FakeWorker(models=("m",)) as worker:
        first = await control.register(worker.url)
        await control.reaches(first, "ready")
        now_ns = time.monotonic_ns()
        request = control.core.read(b"/generate", b"", b'{"text": "x"}', now_ns)
        lease = control.core.select(request, now_ns, False)
        assert lease is not None
        await control.http.delete(f"/workers/{first}")
        await control.reaches(await control.register(worker.url), "ready")
        assert (await control.info(first))["status"] == "draining"
        samples = await scrape(control)
        assert samples.labels("smg_worker_health") == [{"worker": worker.url}]
        assert samples.of("smg_worker_requests_active", worker=worker.url) == 1
        lease.release(OutcomeKind.ANSWERED, 200, now_ns, None, None, -1, -1, -1, now_ns)
        control.plane.registry.settle(time.monotonic_ns())
        samples = await scrape(control)
        assert samples.of("smg_worker_requests_active", worker=worker.url) == 0
        # The worker is gone, what it did is not: totals never fall.
        assert samples.of("smg_worker_selection_total", model="m", policy="cache_aware") == 1


async def test_counts() -> None:
    async with running_control(prometheus_duration_buckets=(0.1, 1.0)) as control:
        async with FakeWorker(models=("m",)) as worker:
            url = worker.url
            await control.reaches(await control.register(url), "ready")
            body = CHAT % (b"some words " * 100)
            answer_one(control, body, [200], (300, 7, 0), 0.05)
            answer_one(control, body, [200], (300, 7, 240), 0.5)
            answer_one(control, body, [503, 200], (-1, -1, -1), 2.0)
            answer_one(control, body, [400], (-1, -1, -1), 0.01)
            samples = await scrape(control)
        labels = ROUTER | {"model": "m", "endpoint": "chat"}
        assert samples.of("smg_router_requests_total", **labels, streaming="true") == 4
        assert samples.of("smg_router_request_errors_total", **labels, error_type="invalid_request") == 1
        assert samples.of("smg_worker_retries_total", worker_type="regular", endpoint="chat") == 1
        assert samples.of("warmroute_attempts_total", model="m", endpoint="chat", streaming="true") == 5
        assert samples.of("smg_worker_selection_total", model="m", policy="cache_aware") == 5
        assert samples.of("smg_http_requests_total", method="POST", path="/v1/chat/completions") == 4
        assert samples.of("smg_http_responses_total", status_code="200", path="/v1/chat/completions") == 3
        assert samples.of("smg_http_requests_total", method="POST", path="/workers") == 1
        assert samples.of("smg_http_requests_total", method="GET", path="/workers/{worker_id}") >= 1
        duration = "smg_router_request_duration_seconds"
        assert samples.of(f"{duration}_count", **labels) == 4
        assert samples.of(f"{duration}_bucket", **labels, le="0.1") == 2
        assert samples.of(f"{duration}_bucket", **labels, le="1.0") == 3
        assert samples.of(f"{duration}_bucket", **labels, le="+Inf") == 4
        assert abs(samples.of(f"{duration}_sum", **labels) - 2.56) < 0.01
        assert samples.of("smg_router_ttft_seconds_count", model="m", endpoint="chat") == 4
        assert samples.of("warmroute_prompt_tokens_total", worker=url) == 600
        assert samples.of("warmroute_reported_cached_tokens_total", worker=url) == 240
        assert 0 < samples.of("warmroute_predicted_cached_tokens_total", worker=url) <= 300
        assert samples.of("sglang_cache_hit_rate", source=url) == 0.4
        assert samples.of("warmroute_index_characters", worker=url) > 0
        assert samples.of("smg_worker_requests_active", worker=url) == 0


async def test_own_port_serves_metrics_and_nothing_else() -> None:
    async with running_control() as control, httpx.AsyncClient(trust_env=False) as http:
        base = f"http://127.0.0.1:{control.config.prometheus_port}"
        answer = await http.get(f"{base}/metrics")
        assert answer.status_code == 200
        assert Samples(answer.text).of("process_cpu_seconds_total") > 0
        assert (await http.get(f"{base}/workers")).status_code == 404
        openmetrics = await http.get(f"{base}/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
        assert openmetrics.text.endswith("# EOF\n")


async def test_clients_cannot_invent_labels() -> None:
    async with running_control() as control:
        for index in range(50):
            await control.http.request(("PATCH", "PUT")[index % 2], f"/invented/{index}")
            await control.http.get(f"/workers/{index}")
        samples = await scrape(control)
        assert len(samples.labels("smg_http_requests_total")) <= 4
        assert samples.of("smg_http_responses_total", path="other", status_code="404") == 50
