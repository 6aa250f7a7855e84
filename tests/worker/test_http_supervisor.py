"""The worker's processes, with a scripted driver: start, failure, drain, and who dies with whom."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.worker.byte_model import write_config, write_folder
from tests.worker.worker_process import children, health, lives, until, worker_process

if TYPE_CHECKING:
    from pathlib import Path

DRIVER = "tests.worker.fake_driver"
HTTP = "warmroute_worker.http.process"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_folder(tmp_path))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_from_start_to_sigterm(model: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    argv = ["--model-path", model, "--port", url.rpartition(":")[2], "--served-model-name", "tiny"]
    with worker_process(*argv, fake_driver=True, FAKE_START_SECONDS="1.5") as worker:
        until(lambda: health(url) == 503, 10)  # it answers while the model is loaded
        assert worker.url() == url
        assert health(url) == 200
        answer = httpx.post(url + "/generate", json={"text": "hello"}).json()
        assert answer["text"] == "hello"
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait(5) == 0
    assert len(worker.stderr) == 1, worker.stderr
    assert health(url) is None


def test_sigterm_finishes_what_runs_and_refuses_what_comes(model: str) -> None:
    with worker_process("--model-path", model, "--port", "0", fake_driver=True, FAKE_STEP_SECONDS="0.02") as worker:
        url = worker.url()
        answers: list[httpx.Response] = []
        body = {"text": "x" * 50, "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url + "/generate", json=body, timeout=30)))
        thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 5)
        worker.process.send_signal(signal.SIGTERM)
        until(lambda: health(url) == 503, 1)
        refused = httpx.post(url + "/generate", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert worker.wait(10) == 0
        thread.join(5)
        assert answers[0].status_code == 200
        assert answers[0].json()["meta_info"]["completion_tokens"] == 100


def test_what_does_not_finish_in_time_is_told(model: str) -> None:
    argv = ["--model-path", model, "--port", "0", "--drain-timeout", "0.5"]
    with worker_process(*argv, fake_driver=True) as worker:
        url = worker.url()
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url + "/generate", json={"text": "!hang"})))
        thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 5)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait(5) == 0
        thread.join(5)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "draining")


def test_the_second_signal_ends_at_once(model: str) -> None:
    with worker_process("--model-path", model, "--port", "0", fake_driver=True) as worker:
        url = worker.url()
        pids = children(worker.process.pid)

        def ask() -> None:
            with pytest.raises(httpx.TransportError):
                httpx.post(url + "/generate", json={"text": "!hang"})

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 5)
        worker.process.send_signal(signal.SIGTERM)
        until(lambda: health(url) == 503, 1)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait(1) == 128 + signal.SIGTERM
        thread.join(5)
    assert not any(map(lives, pids))


def test_a_killed_driver(model: str) -> None:
    with worker_process("--model-path", model, "--port", "0", fake_driver=True, FAKE_STEP_SECONDS="0.02") as worker:
        url = worker.url()
        http, driver = worker.child(HTTP), worker.child(DRIVER)
        received: list[str] = []
        answers: list[httpx.Response] = []

        def stream() -> None:
            body = {"text": "x" * 200, "stream": True, "sampling_params": {"max_new_tokens": 200}}
            try:
                with httpx.stream("POST", url + "/generate", json=body) as response:
                    received.extend(response.iter_lines())
            except httpx.RemoteProtocolError:
                received.append("<broken off>")

        def unary() -> None:
            answers.append(httpx.post(url + "/generate", json={"text": "!hang"}, timeout=30))

        threads = [threading.Thread(target=stream), threading.Thread(target=unary)]
        for thread in threads:
            thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 2, 5)
        time.sleep(0.2)
        os.kill(driver, signal.SIGKILL)
        assert until(lambda: health(url) == 503, 1) < 0.5
        killed = time.monotonic()
        assert worker.wait(5) == 1
        assert time.monotonic() - killed < 4
        for thread in threads:
            thread.join(5)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "engine_failed")
        events = [line for line in received if line]
        assert len(events) > 3, "a part had come already"
        assert "engine_failed" in events[-2]
        assert events[-1] == "<broken off>"
    assert worker.stderr[1:] == [
        f"launch_worker: the engine process (pid {driver}) was killed by SIGKILL (out of memory?)\n"
    ]
    assert not lives(http)


def test_a_killed_http_process(model: str) -> None:
    with worker_process("--model-path", model, "--port", "0", fake_driver=True) as worker:
        worker.url()
        http, driver = worker.child(HTTP), worker.child(DRIVER)
        os.kill(http, signal.SIGKILL)
        assert worker.wait(5) == 1
    assert worker.stderr[1:] == [
        f"launch_worker: the HTTP process (pid {http}) was killed by SIGKILL (out of memory?)\n"
    ]
    assert not lives(driver)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_killed_supervisor_leaves_nothing(model: str) -> None:
    with worker_process("--model-path", model, "--port", "0", fake_driver=True) as worker:
        worker.url()
        pids = children(worker.process.pid)
        assert len(pids) == 2
        worker.process.kill()
        until(lambda: not any(map(lives, pids)), 2)


def test_a_driver_that_says_why_it_cannot_start(model: str) -> None:
    message = "not enough memory: the weights need 5 GB"
    with worker_process("--model-path", model, "--port", "0", fake_driver=True, FAKE_FAILS_WITH=message) as worker:
        assert worker.wait(5) == 1
    assert worker.stderr == [f"launch_worker: {message}\n"]


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--model-path", "/no/such/folder"], 1, "--model-path /no/such/folder: there is no such folder"),
        (["--model-path", "org/model"], 1, "pass the folder that holds its config.json"),
        (["--model-path", "MODEL", "--port", "PORT"], 1, "Address already in use"),
        (["--model-path", "MODEL", "--host", "no.such.host.invalid"], 1, "cannot listen on no.such.host.invalid:30000"),
        (["--model-path", "MODEL", "--port", "-1"], 2, "--port must be between 0 and 65535, got -1"),
        (["--model-path", "NO_TOKENIZER", "--port", "0"], 1, "there is no tokenizer.json in"),
    ],
)
def test_a_worker_that_cannot_start_says_why_in_one_line(
    model: str, tmp_path: Path, argv: list[str], code: int, said: str
) -> None:
    (tmp_path / "bare").mkdir()
    write_config(tmp_path / "bare")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"MODEL": model, "PORT": str(taken.getsockname()[1]), "NO_TOKENIZER": str(tmp_path / "bare")}
        with worker_process(
            *[names.get(word, word) for word in argv], fake_driver=True, HF_HUB_CACHE="/nowhere"
        ) as worker:
            assert worker.wait(10) == code
    assert len(worker.stderr) == 1, worker.stderr
    assert said in worker.stderr[0]


@pytest.mark.parametrize(
    "module",
    [
        "warmroute_worker.http.process",
        "warmroute_worker.supervisor",
        "warmroute_worker.launch_worker",
        "warmroute_worker.engine_process",
    ],
)
def test_no_process_but_the_driver_imports_torch_and_none_transformers(module: str) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "warmroute_worker" in output
    assert not {"torch", "transformers", "numpy", "safetensors"} & set(output)
    if module != HTTP:
        assert not {"aiohttp", "tokenizers", "asyncio"} & set(output), "the supervisor stays small"
