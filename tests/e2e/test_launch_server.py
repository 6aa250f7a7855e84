"""Co-launch: workers and router as one command."""

import signal

import openai
import pytest

from tests.e2e.fleet import REAL_WORKER_READY_SECONDS, Fleet
from tests.processes import Process, free_port

pytestmark = pytest.mark.timeout(240)


def launch(fleet: Fleet, *flags: str) -> tuple[Process, int]:
    port = free_port()
    arguments = ("--host", "127.0.0.1", "--port", str(port), "--router-prometheus-port", str(free_port()), *flags)
    return fleet.processes.start_module("launch-server", "warmroute.launch_server", *arguments), port


def test_two_workers_and_the_router_then_sigterm(fleet: Fleet) -> None:
    process, port = launch(fleet, "--model-path", "demo", "--dp-size", "2")
    process.wait_until_ready(f"http://127.0.0.1:{port}/readiness", REAL_WORKER_READY_SECONDS)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
        )
        assert answer.choices[0].message.content
    process.send(signal.SIGTERM)
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model-path", "/does/not/exist", "--dp-size", "2"), "/does/not/exist"),
        (("--model-path", "demo", "--dp-size", "2", "--policy-typo", "x"), "policy-typo"),
    ],
    ids=["no such model", "unknown flag"],
)
def test_a_part_that_cannot_start_stops_everything(fleet: Fleet, flags: tuple[str, ...], reason: str) -> None:
    process, _ = launch(fleet, *flags)
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
