"""Several launchers as one worker, as real processes on loopback."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.worker.byte_model import write_tokenizer
from tests.worker.engine_fixtures import NEW_TOKENS, make_reference
from tests.worker.node_processes import all_gone, connections_between, free_port, node_flags, nodes
from tests.worker.worker_process import lives, until, worker_process

if TYPE_CHECKING:
    from tests.worker.engine_fixtures import Reference
    from tests.worker.node_processes import Nodes

LENGTHS = (1, 16, 40, 130)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory, "Llama")


def reference(folders: pytest.TempPathFactory, family: str) -> Reference:
    folder = folders.mktemp(family)
    made = make_reference(folder, lengths=LENGTHS, family=family)
    write_tokenizer(folder)
    return made


def check_answers(running: Nodes, expected: Reference, dp_size: int = 1) -> None:
    """All prompts at once, on every data-parallel rank."""
    answers: dict[int, list[int]] = {}

    def ask(number: int, prompt: list[int], dp_rank: int) -> None:
        pinned = {"data_parallel_rank": dp_rank} if dp_size > 1 else {}
        answers[number * dp_size + dp_rank] = running.answer(prompt, NEW_TOKENS, **pinned)

    threads = [
        threading.Thread(target=ask, args=(number, prompt, dp_rank))
        for number, prompt in enumerate(expected.prompts)
        for dp_rank in range(dp_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {n * dp_size + rank: answer for n, answer in enumerate(expected.answers) for rank in range(dp_size)}
    assert answers == wanted


def test_one_layer_over_two_nodes(llama: Reference) -> None:
    """Tokens, what crosses the network, who holds what, and SIGTERM to node 0."""
    with nodes(2, "--model-path", str(llama.folder), "--tp", "2", "--chunked-prefill-size", "64") as running:
        check_answers(running, llama)
        everybody = running.processes(0) | running.processes(1)
        ranks = running.ranks()
        assert {rank["pid"] for rank in ranks} <= everybody
        assert connections_between([ranks[0]["pid"]], [ranks[1]["pid"]]) >= 2  # plans, and sums
        effective = httpx.get(running.url + "/server_info").json()["effective"]
        assert effective["collectives"] == "shared memory, gloo between nodes"
        until(lambda: running.ranks()[1]["steps"] == running.ranks()[0]["steps"] > NEW_TOKENS, 10)
        first, second = running.ranks()
        assert (first["node"], second["node"]) == (0, 1)
        assert first["weight_bytes"] == second["weight_bytes"] > 0
        assert first["pool_bytes"] == second["pool_bytes"] > 0
        # Two sums of a vector per token and layer, and the logits: the second node has nothing more to say.
        tokens = first["stored_bytes"] // (3 * 2 * 16 * 4)
        assert second["node_bytes"] >= tokens * 3 * 2 * 64 * 4
        running.launchers[0].process.send_signal(signal.SIGTERM)
        assert running.ends(30) == [0, 0]
        assert all_gone(everybody)
    assert [len(launcher.stderr) for launcher in running.launchers] == [1, 1]
    assert "node 1 of 2 is ready" in running.launchers[1].stderr[0]


def test_two_stages_on_two_nodes_and_sigterm_to_the_second(llama: Reference) -> None:
    with nodes(2, "--model-path", str(llama.folder), "--pp-size", "2", "--chunked-prefill-size", "64") as running:
        check_answers(running, llama)
        until(lambda: running.ranks()[1]["steps"] > NEW_TOKENS, 10)
        assert running.ranks()[0]["node_bytes"] > running.ranks()[1]["node_bytes"] > 0
        statuses: list[int] = []
        prompt = llama.prompts[0]
        thread = threading.Thread(target=lambda: statuses.append(len(running.answer(prompt, 150))))
        thread.start()
        until(lambda: httpx.get(running.url + "/get_load").json()[0]["num_reqs"] == 1, 10)
        running.launchers[1].process.send_signal(signal.SIGTERM)
        assert running.ends(30) == [0, 0]
        thread.join()
        assert statuses == [150]  # it was let finish


@pytest.mark.parametrize(
    ("layout", "dp_size", "family"),
    [
        (["--tp", "4"], 1, "Llama"),
        (["--tp", "4", "--dp", "2", "--ep", "4", "--enable-dp-attention"], 2, "DeepseekV3"),
        (
            ["--tp", "4", "--dp", "2", "--ep", "4", "--enable-dp-attention", "--moe-a2a-backend", "deepep"],
            2,
            "Qwen3Moe",
        ),
        (["--tp", "4", "--dp", "4", "--ep", "2", "--enable-dp-attention"], 4, "Mixtral"),
        (["--tp", "4", "--dp", "2", "--pp-size", "2", "--enable-dp-attention", "--enable-dp-lm-head"], 2, "DeepseekV3"),
    ],
    ids=["tp 4", "tp 4 dp 2 ep 4", "tp 4 dp 2 ep 4 a2a", "tp 4 dp 4 ep 2", "tp 4 dp 2 pp 2"],
)
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_larger_layouts(tmp_path_factory: pytest.TempPathFactory, layout: list[str], dp_size: int, family: str) -> None:
    expected = reference(tmp_path_factory, family)
    with nodes(2, "--model-path", str(expected.folder), *layout) as running:
        check_answers(running, expected, dp_size)
        half = len(running.ranks()) // 2
        assert [rank["node"] for rank in running.ranks()] == [0] * half + [1] * half
        until(lambda: all(rank["steps"] > 0 for rank in running.ranks()), 10)
        running.launchers[0].process.send_signal(signal.SIGTERM)
        assert running.ends(60) == [0, 0]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", [["--tp", "4"], ["--tp", "2", "--pp-size", "2"], ["--pp-size", "4"]], ids=str)
def test_four_nodes(tmp_path_factory: pytest.TempPathFactory, layout: list[str]) -> None:
    """Who is neither first nor last is called and calls."""
    expected = make_wide(tmp_path_factory.mktemp("wide"))
    with nodes(4, "--model-path", str(expected.folder), *layout) as running:
        check_answers(running, expected)
        victim = running.launchers[2].process
        victim.kill()
        assert [launcher.wait(5) for n, launcher in enumerate(running.launchers) if n != 2] == [1, 1, 1]
    for n, launcher in enumerate(running.launchers):
        assert n == 2 or sum("node 2 (127.0.0.1) is gone" in line for line in launcher.stderr) == 1, launcher.stderr


def make_wide(folder: Any) -> Reference:
    """Four layers, and a vocabulary and prompts so long that vectors are summed in parts."""
    made = make_reference(folder, lengths=(20, 300), num_hidden_layers=4, max_position_embeddings=512)
    write_tokenizer(folder)
    return made


# Nodes that do not come together: one line, status 3, in time.


def fails(*argv: str, seconds: float) -> str:
    """What a launcher says that ends with 3 within this time."""
    began = time.monotonic()
    with worker_process(*argv) as launcher:
        assert launcher.wait(seconds) == 3
    assert time.monotonic() - began < seconds
    assert len(launcher.stderr) == 1, launcher.stderr
    return launcher.stderr[0]


def flags(node: int, port: int, *argv: str) -> list[str]:
    return node_flags(node, 2, port, "--model-path", "demo", "--tp", "2", *argv)


def test_nobody_answers_at_the_address() -> None:
    port = free_port()
    line = fails(*flags(1, port, "--dist-timeout", "2"), seconds=15)
    assert line == (
        f"launch_worker: error: node 0 does not answer at 127.0.0.1:{port} (--dist-init-addr) within 2 s "
        "(--dist-timeout): Connection refused\n"
    )


def test_nobody_comes() -> None:
    port = free_port()
    line = fails(*flags(0, port, "--dist-timeout", "2"), seconds=15)
    assert line == f"launch_worker: error: node 1 did not come to 127.0.0.1:{port} within 2 s (--dist-timeout)\n"


def test_an_address_of_another_host() -> None:
    """192.0.2.1 is for documentation, and nobody's."""
    argv = flags(0, 0, "--dist-timeout", "2", "--dist-init-addr", "192.0.2.1:29500")
    line = fails(*argv, seconds=15)
    assert "node 0 cannot listen at 192.0.2.1:29500 (--dist-init-addr): Cannot assign requested address" in line


def test_somebody_else_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                sock.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        line = fails(*flags(1, listener.getsockname()[1], "--dist-timeout", "20"), seconds=15)
        thread.join()
    assert "(--dist-init-addr) is no node 0" in line


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (["--tp", "4"], "node 1 was started with --tp-size 4, node 0 with 2"),
        (["--page-size", "32"], "node 1 was started with --page-size 32, node 0 with 16"),
        (["--dtype", "bfloat16"], "node 1 was started with --dtype bfloat16, node 0 with auto"),
    ],
)
def test_nodes_that_do_not_fit_together(other: list[str], said: str) -> None:
    port = free_port()
    with worker_process(*flags(0, port)) as first:
        line = fails(*flags(1, port, *other), seconds=40)
        assert first.wait(10) == 3
    assert line == f"launch_worker: error: {said}\n"
    assert first.stderr == [line]


OLDER = """
import sys
from warmroute_worker import launch_worker, node_agreement
node_agreement.version = lambda: "0.0.1"
sys.exit(launch_worker.main())
"""


def test_another_version() -> None:
    port = free_port()
    with worker_process(*flags(0, port)) as first, worker_process(*flags(1, port), program=OLDER) as second:
        assert (first.wait(40), second.wait(10)) == (3, 3)
    [line] = first.stderr
    assert line.startswith("launch_worker: error: node 1 runs version 0.0.1, node 0 version ")
    assert second.stderr == [line]


def test_a_stranger_keeps_nobody_waiting_and_a_second_node_1_is_refused() -> None:
    port = free_port()
    with worker_process(*flags(0, port, "--nnodes", "4", "--tp", "4", "--dist-timeout", "8")) as first:
        silent = None
        while silent is None:
            try:
                silent = socket.create_connection(("127.0.0.1", port))
            except ConnectionRefusedError:
                assert first.process.poll() is None, first.stderr
                time.sleep(0.05)
        with silent, socket.create_connection(("127.0.0.1", port)) as loud:
            loud.sendall(b"GET / HTTP/1.1\r\n\r\n")
            argv = flags(1, port, "--nnodes", "4", "--tp", "4", "--dist-timeout", "8")
            with worker_process(*argv) as second:
                line = ""
                with worker_process(*argv) as third:
                    until(lambda: None not in (second.process.poll(), third.process.poll()), 40)
                    line = "".join(second.stderr + third.stderr)
                assert "there is a node 1 already (--node-rank)" in line
                assert "node 2 and node 3 did not come" in line
        assert first.wait(20) == 3


# Nodes that are lost.


EXPERTS = ["--tp", "4", "--dp", "2", "--ep", "4", "--enable-dp-attention", "--moe-a2a-backend", "deepep"]


@pytest.mark.parametrize(
    ("victim", "layout"),
    [
        pytest.param(0, ["demo", "--tp", "2"], marks=pytest.mark.slow),
        (1, ["demo", "--tp", "2"]),
        pytest.param(0, ["demo-moe", *EXPERTS], marks=pytest.mark.slow),
        pytest.param(1, ["demo-moe", *EXPERTS], marks=pytest.mark.slow),
        pytest.param(1, ["demo", "--pp-size", "2"], marks=pytest.mark.slow),
    ],
    ids=["tp 2, node 0", "tp 2, node 1", "experts, node 0", "experts, node 1", "pp 2, node 1"],
)
def test_a_killed_launcher_ends_the_other(victim: int, layout: list[str]) -> None:
    with nodes(2, "--model-path", *layout) as running:
        url = running.url
        everybody = running.processes(0) | running.processes(1)
        stream = Answer(url) if victim else None
        survivor = running.launchers[1 - victim]
        running.launchers[victim].process.kill()
        killed = time.monotonic()
        code = survivor.wait(5)
        assert time.monotonic() - killed < 5
        assert code == 1
        until(lambda: all_gone(everybody), 3)
        if stream is not None:
            assert stream.failed()
    causes = [line for line in survivor.stderr if "gone" in line]
    assert causes == [f"launch_worker: node {victim} (127.0.0.1) is gone: its connection ended\n"], survivor.stderr
    assert not any("Traceback" in line for line in survivor.stderr), survivor.stderr


def test_a_killed_rank_ends_both_and_both_say_which() -> None:
    with nodes(2, "--model-path", "demo", "--tp", "2") as running:
        until(lambda: running.ranks()[1]["pid"] > 0, 10)
        pid = running.ranks()[1]["pid"]
        everybody = running.processes(0) | running.processes(1)
        os.kill(pid, signal.SIGKILL)
        assert running.ends(6) == [1, 1]
        until(lambda: all_gone(everybody), 3)
    for launcher in running.launchers:
        assert sum("SIGKILL" in line for line in launcher.stderr) == 1, launcher.stderr
    assert "node 1 (127.0.0.1) ends: " in "".join(running.launchers[0].stderr)


@pytest.mark.slow
def test_a_stopped_rank_is_found_by_the_watchdog_of_its_node() -> None:
    with nodes(2, "--model-path", "demo", "--tp", "2", "--watchdog-timeout", "3") as running:
        until(lambda: running.ranks()[1]["pid"] > 0, 10)
        pid = running.ranks()[1]["pid"]
        os.kill(pid, signal.SIGSTOP)
        assert running.ends(15) == [1, 1]
        until(lambda: not lives(pid), 3)
    for launcher in running.launchers:
        assert sum("has shown no life for 3 s" in line for line in launcher.stderr) == 1, launcher.stderr


class Answer:
    """A long one, asked for by a thread."""

    def __init__(self, url: str) -> None:
        self._outcome: list[str] = []
        self._thread = threading.Thread(target=self._ask, args=(url,))
        self._thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 10)

    def _ask(self, url: str) -> None:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}
        try:
            self._outcome.append(str(httpx.post(url + "/generate", json=body, timeout=30).status_code))
        except httpx.HTTPError as error:
            self._outcome.append(type(error).__name__)

    def failed(self) -> bool:
        self._thread.join(20)
        return self._outcome != ["200"]
