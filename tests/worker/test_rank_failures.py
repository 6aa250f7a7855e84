"""Ranks that die or hang, in a real worker: what clients, operators and the process table see."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.worker.worker_process import children, health, lives, until, worker_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.worker.worker_process import WorkerProcess

TP = ["--tp", "2"]
PP = ["--pp-size", "2"]


@contextlib.contextmanager
def demo(*argv: str) -> Iterator[WorkerProcess]:
    flags = ["--model-path", "demo", "--device", "cpu", "--port", "0", "--max-total-tokens", "32768"]
    with worker_process(*flags, *argv) as worker:
        yield worker


def ranks(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(url + "/debug/ranks").json()["ranks"]
    return found


class Stream:
    """One long answer, read by a thread."""

    def __init__(self, url: str) -> None:
        self.events: list[dict[str, Any]] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()

    def _read(self, url: str) -> None:
        body = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 8000, "ignore_eos": True}}
        try:
            with httpx.stream("POST", url + "/generate", json=body, timeout=30) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self.events.append(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.mark.parametrize(
    ("layout", "victim"),
    [(TP, 0), (TP, 1), (PP, 1), pytest.param(PP, 0, marks=pytest.mark.slow)],
    ids=["tp 2, the driver", "tp 2, the other", "pp 2, the last stage", "pp 2, the driver"],
)
def test_a_killed_rank_ends_the_worker(layout: list[str], victim: int) -> None:
    with demo(*layout) as worker:
        url = worker.url()
        pids = [rank["pid"] for rank in ranks(url)]
        stream = Stream(url)
        until(lambda: len(stream.events) > 5, 20)
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: health(url) in (503, None), 1.0)
        code = worker.wait(5)
        assert time.monotonic() - killed < 5
        assert code == 1
        stream.join()
        assert stream.error is not None or "error" in stream.events[-1], stream.events[-1]
        until(lambda: not any(lives(pid) for pid in pids), 2)
    causes = [line for line in worker.stderr if "SIGKILL" in line]
    assert len(causes) == 1, worker.stderr
    place = f"rank {victim} ({'tp' if layout is TP else 'pp'} {victim})"
    assert causes[0].startswith(f"launch_worker: {place}, pid {pids[victim]}, was killed by SIGKILL"), causes
    assert not any("Traceback" in line for line in worker.stderr), worker.stderr


@pytest.mark.parametrize(
    ("layout", "victim", "busy"),
    [
        (TP, 1, True),
        pytest.param(PP, 0, False, marks=pytest.mark.slow),
        pytest.param(TP, 0, True, marks=pytest.mark.slow),
        pytest.param(TP, 0, False, marks=pytest.mark.slow),
        pytest.param(TP, 1, False, marks=pytest.mark.slow),
        pytest.param(PP, 0, True, marks=pytest.mark.slow),
        pytest.param(PP, 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_rank_ends_the_worker_after_the_watchdogs_time(layout: list[str], victim: int, busy: bool) -> None:
    with demo(*layout, "--watchdog-timeout", "2") as worker:
        url = worker.url()
        pids = [rank["pid"] for rank in ranks(url)]
        stream = Stream(url) if busy else None
        if stream is not None:
            until(lambda: len(stream.events) > 5, 20)
        os.kill(pids[victim], signal.SIGSTOP)
        stopped = time.monotonic()
        assert worker.wait(10) == 1
        assert 1.5 < time.monotonic() - stopped < 7
        if stream is not None:
            stream.join()
        until(lambda: not any(lives(pid) for pid in pids), 2)
    causes = [line for line in worker.stderr if "has shown no life for 2 s" in line]
    assert len(causes) == 1, worker.stderr
    kind = "tp" if layout is TP else "pp"
    assert f"rank {victim} ({kind} {victim}), pid {pids[victim]}" in causes[0]


def test_a_slow_rank_is_waited_for() -> None:
    """Shorter than the watchdog's time, a stop is nothing but a pause."""
    with demo(*TP, "--watchdog-timeout", "10") as worker:
        url = worker.url()
        pids = [rank["pid"] for rank in ranks(url)]
        body = {"text": "a", "sampling_params": {"max_new_tokens": 20, "temperature": 0}}
        expected = httpx.post(url + "/generate", json=body).json()["text"]
        os.kill(pids[1], signal.SIGSTOP)
        timer = threading.Timer(1.0, os.kill, (pids[1], signal.SIGCONT))
        timer.start()
        answer = httpx.post(url + "/generate", json=body, timeout=30).json()
        assert answer["text"] == expected
        assert answer["meta_info"]["e2e_latency"] > 0.7
        timer.join()


def test_nothing_survives_the_supervisor() -> None:
    with demo(*TP) as worker:
        url = worker.url()
        pids = [rank["pid"] for rank in ranks(url)]
        worker.process.send_signal(signal.SIGKILL)
        until(lambda: not any(lives(pid) for pid in pids), 3)
        until(lambda: health(url) is None, 3)


def test_sigterm_drains_and_leaves_nothing() -> None:
    with demo("--tp", "2", "--pp-size", "2") as worker:
        url = worker.url()
        found = ranks(url)
        assert [(rank["tp_rank"], rank["pp_rank"]) for rank in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
        answers: list[httpx.Response] = []
        body = {"text": "a", "sampling_params": {"max_new_tokens": 150, "ignore_eos": True}}
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url + "/generate", json=body, timeout=30)))
        thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 5)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        thread.join()
        assert answers[0].json()["meta_info"]["completion_tokens"] == 150
        until(lambda: not any(lives(rank["pid"]) for rank in found), 2)
    assert len(worker.stderr) == 1, worker.stderr


def test_what_the_ranks_say_of_themselves() -> None:
    with demo(*TP) as worker:
        url = worker.url()
        info = httpx.get(url + "/server_info").json()
        assert (info["tp_size"], info["pp_size"]) == (2, 1)
        assert (info["effective"]["layout"], info["effective"]["collectives"]) == ("tp 2", "shared memory")
        body = {"text": "a", "sampling_params": {"max_new_tokens": 20, "temperature": 0}}
        httpx.post(url + "/generate", json=body).raise_for_status()
        first, second = ranks(url)
        assert first["pid"] != second["pid"]
        assert first["weight_bytes"] == second["weight_bytes"]
        assert first["collectives"]["all_reduce"] == second["collectives"]["all_reduce"]
        assert first["steps"] == second["steps"] >= 20
        assert sum(rank["weight_bytes"] for rank in (first, second)) == info["effective"]["weight_bytes"]
        text = httpx.get(url + "/metrics").text
        assert (
            'warmroute_worker_comm_bytes_total{dp_rank="0",engine_type="unified",model_name="demo",moe_ep_rank="0",op='
            in text
        )
        assert 'tp_rank="1"' in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tp", "3"], "--tp 3 does not divide the model's 8 attention heads; it can be 1, 2, 4, 8"),
        (["--pp-size", "5"], "--pp-size 5 is more than the model's"),
        (["--tp", "2", "--mem-fraction-static", "0.000001", "--max-total-tokens", "64"], "not enough memory"),
    ],
)
def test_what_cannot_start_says_so_once(argv: list[str], said: str) -> None:
    with demo(*argv) as worker:
        assert worker.wait(30) == 1
    assert len(worker.stderr) == 1, worker.stderr
    assert said in worker.stderr[0]


def test_peers_are_checked() -> None:
    with demo(*TP, "--enable-p2p-check", "--disable-custom-all-reduce") as worker:
        url = worker.url()
        assert httpx.get(url + "/server_info").json()["effective"]["collectives"] == "gloo"
        body = {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 8, "temperature": 0}}
        assert httpx.post(url + "/generate", json=body).json()["meta_info"]["completion_tokens"] == 8
    [line] = [line for line in worker.stderr if "p2p check" in line]
    assert "2 ranks reach each other's memory; a barrier takes" in line


def test_a_pause_over_http() -> None:
    """In place: the answer stands still and goes on. Abort: it ends. Meanwhile others wait."""
    with demo(*TP) as worker:
        url = worker.url()
        stream = Stream(url)
        until(lambda: len(stream.events) > 5, 20)
        assert httpx.post(url + "/pause_generation", json={"mode": "in_place"}).status_code == 200
        time.sleep(0.1)
        before = len(stream.events)
        time.sleep(0.4)
        assert len(stream.events) == before
        assert health(url) == 200
        assert httpx.post(url + "/continue_generation").status_code == 200
        until(lambda: len(stream.events) > before + 5, 10)
        assert httpx.post(url + "/pause_generation").json()["mode"] == "abort"
        stream.join()
        assert stream.events[-1]["meta_info"]["finish_reason"]["type"] == "abort"
        assert httpx.post(url + "/pause_generation", json={"mode": "gently"}).status_code == 400
        assert httpx.post(url + "/flush_cache").status_code == 200
        waiting: list[httpx.Response] = []
        body = {"text": "a", "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}
        thread = threading.Thread(target=lambda: waiting.append(httpx.post(url + "/generate", json=body, timeout=30)))
        thread.start()
        time.sleep(0.4)
        assert not waiting
        assert httpx.post(url + "/continue_generation").status_code == 200
        thread.join()
        assert waiting[0].json()["meta_info"]["completion_tokens"] == 5


def test_sigterm_to_all_processes_breaks_no_request() -> None:
    """As systemd stops a service: every process of it gets the signal."""
    with demo(*TP) as worker:
        url = worker.url()
        everybody = [worker.process.pid, *(rank["pid"] for rank in ranks(url)), *children(worker.process.pid)]
        answers: list[httpx.Response] = []
        body = {"text": "a", "sampling_params": {"max_new_tokens": 150, "ignore_eos": True}}
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url + "/generate", json=body, timeout=30)))
        thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 5)
        for pid in everybody:
            os.kill(pid, signal.SIGTERM)
        assert worker.wait(20) == 0
        thread.join()
        assert answers[0].json()["meta_info"]["completion_tokens"] == 150
        until(lambda: not any(lives(pid) for pid in everybody), 3)
