"""Co-launch: workers and router as one command."""

import contextlib
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.fleet import REAL_WORKER_READY_SECONDS, Fleet, eventually
from tests.processes import Process, free_port, request_json

pytestmark = pytest.mark.timeout(420)

READY_SECONDS = 180.0
"""Several ranks that start at once on a busy machine."""


def launch(fleet: Fleet, *flags: str) -> tuple[Process, str, list[int]]:
    """`launch_server`, its URL, and the ports it takes."""
    port, prometheus_port, first_worker_port = free_port(), free_port(), free_port()
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--router-prometheus-port", str(prometheus_port)]
    arguments += ["--router-dp-worker-base-port", str(first_worker_port), "--max-total-tokens", "16384", *flags]
    process = fleet.processes.start_module("launch-server", "warmroute.launch_server", *arguments)
    return process, f"http://127.0.0.1:{port}", [port, prometheus_port, first_worker_port]


def get(url: str) -> dict[str, Any]:
    status, answer = request_json("GET", url)
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def ask_all(url: str, model: str, count: int) -> list[str]:
    """`count` different chats at once, through openai's client."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120) as client:

        def ask(number: int) -> str:
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": f"{number}: tell me of the sea. " * 8}],
                max_tokens=24,
                extra_body={"ignore_eos": True},
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 24
            return answer.choices[0].message.content or ""

        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(ask, range(count)))


def stop(process: Process, ports: list[int]) -> None:
    process.send(signal.SIGTERM)
    assert process.wait(60) == 0
    assert [port for port in ports if not is_free(port)] == []


def test_two_workers_of_two_ranks(fleet: Fleet) -> None:
    """Replicas: as many workers, each with ranks of its own."""
    process, url, ports = launch(fleet, "--model-path", "demo", "--dp-size", "2", "--tp", "2")
    process.wait_until_ready(f"{url}/readiness", READY_SECONDS)
    eventually("both are ready", lambda: get(f"{url}/readiness")["healthy_workers"] == 2, READY_SECONDS)
    workers = [worker["url"] for worker in get(f"{url}/workers")["workers"]]
    assert len(ask_all(url, "demo", 12)) == 12
    pids = set()
    for worker in workers:
        info, ranks = get(f"{worker}/server_info"), get(f"{worker}/debug/ranks")["ranks"]
        assert (info["tp_size"], info["dp_size"], info["effective"]["enable_dp_attention"]) == (2, 1, False)
        assert [rank["tp_rank"] for rank in ranks] == [0, 1]
        assert all(rank["steps"] > 0 for rank in ranks), "both workers were used, with all their ranks"
        pids |= {rank["pid"] for rank in ranks}
    assert len(pids) == 4
    stop(process, [*ports, *(int(worker.rsplit(":", 1)[1]) for worker in workers)])


def test_one_worker_with_dp_attention(fleet: Fleet) -> None:
    """One worker, whose ranks are targets: both get traffic, and keep a cache of their own."""
    process, url, ports = launch(
        fleet, *("--model-path", "demo-moe", "--tp", "2", "--dp-size", "2", "--ep", "2", "--enable-dp-attention")
    )
    process.wait_until_ready(f"{url}/readiness", READY_SECONDS)
    (worker,) = [worker["url"] for worker in get(f"{url}/workers")["workers"]]
    effective = get(f"{worker}/server_info")["effective"]
    assert effective["enable_dp_attention"] is True
    assert (effective["dp_size"], effective["ep_size"]) == (2, 2)
    assert len(ask_all(url, "demo-moe", 12)) == 12
    ranks = get(f"{worker}/debug/ranks")["ranks"]
    assert [(rank["dp_rank"], rank["ep_rank"]) for rank in ranks] == [(0, 0), (1, 1)]
    assert all(rank["prefill_steps"] > 0 and rank["decode_steps"] > 0 for rank in ranks), ranks
    loads = get(f"{worker}/v1/loads")
    assert loads["dp_rank_count"] == 2
    assert [load["dp_rank"] for load in loads["loads"]] == [0, 1]
    caches_are_apart(url, "demo-moe")
    stop(process, [*ports, int(worker.rsplit(":", 1)[1])])


def caches_are_apart(url: str, model: str) -> None:
    """A prompt that was computed on one rank is found there, and not on the other; the client says which rank."""
    body = {"model": model, "prompt": "the ranks have caches of their own " * 6, "max_tokens": 1, "temperature": 0}
    for rank in (0, 1):
        for found in (False, True):
            pinned = body | {"data_parallel_rank": rank}
            status, answer = request_json("POST", f"{url}/v1/completions", pinned, timeout=120)
            assert status == 200, answer
            assert isinstance(answer, dict)
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached > 0) == found, f"rank {rank}: {cached} tokens in its cache"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model-path", "/does/not/exist", "--dp-size", "2"), "/does/not/exist"),
        (("--model-path", "demo", "--dp-size", "2", "--policy-typo", "x"), "policy-typo"),
    ],
    ids=["no such model", "unknown flag"],
)
def test_a_part_that_cannot_start_stops_everything(fleet: Fleet, flags: tuple[str, ...], reason: str) -> None:
    process, _, _ = launch(fleet, *flags)
    assert process.wait(REAL_WORKER_READY_SECONDS) != 0
    assert reason in process.log_tail()


def test_port_of_the_router_taken(fleet: Fleet) -> None:
    worker = fleet.fake_worker()
    port = worker.port
    process = fleet.processes.start_module(
        "launch-server-taken",
        "warmroute.launch_server",
        *("--model-path", "demo", "--dp-size", "2", "--host", "127.0.0.1", "--port", str(port)),
    )
    assert process.wait(REAL_WORKER_READY_SECONDS) != 0
    assert str(port) in process.log_tail()
