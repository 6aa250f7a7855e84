"""Routers and workers as real processes, with the few verbs the end-to-end tests need."""

import base64
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.fake_worker import SeenRequest
from tests.processes import Process, Processes, free_port, request, request_json

READY_SECONDS = 30.0
REAL_WORKER_READY_SECONDS = 90.0
"""Importing torch on a busy 2-core machine alone takes 10 to 20 s."""


def eventually(what: str, condition: Callable[[], bool], timeout: float = 5.0) -> None:
    """Wait for a condition that another process brings about. Raises AssertionError naming it."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)


@dataclass
class FakeWorkerProcess:
    process: Process
    port: int
    _restart: Callable[[], Process]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def name(self) -> str:
        """What its answers carry in x-fake-worker."""
        return f"fake-{self.port}"

    def script(self, **fields: Any) -> None:
        """Replace its script; without fields it behaves."""
        status, answer = request_json("POST", self.url + "/_script", fields)
        assert status == 200, answer

    def counts(self) -> dict[str, Any]:
        """received, answered, cancelled, broken, in_flight, open_connections, other_paths"""
        _, answer = request_json("GET", self.url + "/_record?requests=0")
        assert isinstance(answer, dict)
        return answer

    def requests(self) -> list[SeenRequest]:
        _, answer = request_json("GET", self.url + "/_record")
        assert isinstance(answer, dict)
        return [
            SeenRequest(
                at=seen["at"],
                path=seen["path"],
                head=seen["head"].encode("latin-1"),
                body=base64.b64decode(seen["body_base64"]),
                rank=seen["rank"],
                prompt_tokens=seen["prompt_tokens"],
                cached_tokens=seen["cached_tokens"],
                outcome=seen["outcome"],
            )
            for seen in answer["requests"]
        ]

    def reset(self) -> None:
        request("POST", self.url + "/_reset")

    def kill(self) -> None:
        self.process.kill()

    def restart(self) -> None:
        """On the same port; returns when it answers /health."""
        self.process = self._restart()
        self.process.wait_until_ready(self.url + "/health", READY_SECONDS)


@dataclass
class RouterProcess:
    process: Process
    port: int
    prometheus_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, Any]:
        return request_json("GET", self.url + path)

    def post(self, path: str, value: object) -> tuple[int, Any]:
        return request_json("POST", self.url + path, value)

    def post_bytes(self, path: str, body: bytes) -> tuple[int, bytes]:
        return request("POST", self.url + path, body, {"content-type": "application/json"})

    def chat(self, *texts: str, **fields: Any) -> dict[str, Any]:
        """A unary chat: system, user, assistant, user ... Its answer must be a 200."""
        status, answer = self.post("/v1/chat/completions", chat(*texts, **fields))
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def workers(self) -> list[dict[str, Any]]:
        status, answer = self.get("/workers")
        assert status == 200
        return list(answer["workers"])

    def loads(self) -> dict[str, int]:
        """Requests in flight at each worker, by its URL, as the router counts them."""
        return {worker["url"]: worker["load"] for worker in self.workers()}

    def metrics(self) -> "Metrics":
        status, text = request("GET", self.url + "/metrics")
        assert status == 200
        return Metrics(text.decode())

    def wait_for_workers(self, ready: int, timeout: float = READY_SECONDS) -> None:
        def enough() -> bool:
            status, answer = self.get("/readiness")
            return bool(ready == 0 or (status == 200 and answer["healthy_workers"] == ready))

        try:
            eventually(f"{ready} ready workers", enough, timeout)
        except AssertionError as error:
            raise self.process.error(str(error)) from None


class Metrics:
    """A scrape."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum over the samples of that name which carry these labels. Raises KeyError when there is none."""
        values = [
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        ]
        if not values:
            raise KeyError(f"{name}{labels or ''}")
        return float(sum(values))

    def by(self, name: str, label: str) -> dict[str, float]:
        return {sample.labels[label]: sample.value for sample in self.samples if sample.name == name}


class Fleet:
    """Starts fake workers, real workers and routers on free ports of 127.0.0.1."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._names = 0

    def fake_worker(self, *flags: str) -> FakeWorkerProcess:
        port = free_port()
        name = self._name("fake-worker")

        def start() -> Process:
            return self.processes.start_module(name, "tests.fake_worker", "--port", str(port), *flags)

        worker = FakeWorkerProcess(start(), port, start)
        worker.process.wait_until_ready(worker.url + "/health", READY_SECONDS)
        return worker

    def fake_workers(self, count: int, *flags: str) -> list[FakeWorkerProcess]:
        return [self.fake_worker(*flags) for _ in range(count)]

    def router(self, *flags: str, workers: list[FakeWorkerProcess] | list[str] | None = None) -> RouterProcess:
        """Ready when every one of `workers` is."""
        port, prometheus_port = free_port(), free_port()
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--expose-worker"]
        arguments += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(prometheus_port)]
        urls = [worker if isinstance(worker, str) else worker.url for worker in workers or []]
        if urls:
            arguments += ["--worker-urls", *urls]
        process = self.processes.start_module(self._name("router"), "warmroute.launch_router", *arguments, *flags)
        router = RouterProcess(process, port, prometheus_port)
        process.wait_until_ready(router.url + "/health", READY_SECONDS)
        router.wait_for_workers(len(urls))
        return router

    def real_worker(self, *flags: str) -> str:
        """URL of a worker on the demo model."""
        port = free_port()
        process = self.processes.start_module(
            self._name("worker"),
            "warmroute_worker.launch_worker",
            *("--model-path", "demo", "--host", "127.0.0.1", "--port", str(port), *flags),
        )
        url = f"http://127.0.0.1:{port}"
        process.wait_until_ready(url + "/health", REAL_WORKER_READY_SECONDS)
        return url

    def _name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}-{self._names}"


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    """A chat body: `texts` are system, user, assistant, user ..."""
    roles = ["system"] + ["user", "assistant"] * (len(texts) // 2)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": "fake-model", "messages": messages} | fields


def words(count: int, seed: int) -> str:
    """Text that no other seed shares a prefix with."""
    return " ".join(f"{seed:04d}word{i}" for i in range(count))


def sse_events(body: bytes) -> list[Any]:
    """The JSON of each event; the closing `[DONE]` as that string."""
    found = re.findall(rb"data: (.*)\n\n", body)
    return [json.loads(data) if data != b"[DONE]" else "[DONE]" for data in found]
