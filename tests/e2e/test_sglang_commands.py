"""Commands from guides to SGLang: all of them parse and show their ranks; what fits on eight ranks serves a tiny model.

The commands of two nodes are started together.
"""

import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.fleet import Fleet, eventually
from tests.e2e.sglang_commands import COMMANDS, MODULES, REFUSED, ROUTERS, Command
from tests.processes import Process, free_port, request_json

MOST_RANKS = 8
READY_SECONDS = 240.0
PROMPT = "Once upon a time there was a lighthouse keeper who"
TINY = {"meta-llama": "demo", "deepseek-ai": "demo-moe", "Qwen": "demo-moe"}

TOGETHER = {
    command.line.rsplit("--node-rank", 1)[0]: [
        other
        for other in COMMANDS
        if other.nodes == 2 and other.line.startswith(command.line.rsplit("--node-rank", 1)[0])
    ]
    for command in COMMANDS
    if command.nodes == 2 and command.ranks <= MOST_RANKS
}
"""The commands that differ in the node, by what they have in common."""

SERVED = [command for command in COMMANDS if command.nodes == 1 and command.workers * command.ranks <= MOST_RANKS]


def short(line: str) -> str:
    """As the name of a test."""
    return line.split(".", 1)[1].replace("launch_server --model-path ", "").replace("launch_router ", "")


def run(line: str, *more: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    words = shlex.split(line)
    words = words[words.index("python") :]
    command = [sys.executable, "-m", MODULES[words[2]], *words[3:], *more]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, env={**os.environ, **(environment or {})}
    )


@pytest.mark.parametrize("command", COMMANDS, ids=[short(command.line) for command in COMMANDS])
def test_dry_run_shows_the_ranks(command: Command, tmp_path: Path) -> None:
    """On a host without the model."""
    no_models = {"HF_HUB_CACHE": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    ended = run(command.line, "--dry-run", environment=command.environment | no_models)
    assert ended.returncode == 0, ended.stderr
    lines = [line.strip() for line in ended.stdout.splitlines()]
    sizes = f"ranks: {command.ranks}, schedulers: {command.schedulers}"
    assert lines.count(f"{command.model}: {command.layout or 'not divided'}; {sizes}") == command.workers
    headers = [number for number, line in enumerate(lines) if line.startswith("rank  pp")]
    assert len(headers) == command.workers
    for header in headers:
        rows = [line.split() for line in lines[header + 1 : header + 1 + command.ranks]]
        assert [row[0] for row in rows] == [str(rank) for rank in range(command.ranks)]
        assert " ".join(rows[-1][1:7]) == command.last
        assert sum("schedules" in " ".join(row) for row in rows) == command.schedulers
        if command.nodes > 1:
            half = command.ranks // 2
            assert [row[7] for row in rows] == ["0"] * half + ["1"] * half
    for remark in command.remarks:
        assert sum(remark in line for line in lines) == command.workers, remark
    missing = [line for line in lines if line.startswith(f"this would not start: --model-path {command.model}: there")]
    assert len(missing) == command.workers
    if command.module.startswith("warmroute."):
        targets = command.workers * command.schedulers
        assert f"policy cache_aware, {targets} targets" in ended.stdout
        assert len({line for line in lines if line.startswith("python -m warmroute_worker.launch_worker")}) == (
            command.workers
        ), "each has a port of its own"


@pytest.mark.parametrize("line", ROUTERS, ids=map(short, ROUTERS))
def test_routers(line: str) -> None:
    ended = run(line, "--check-config")
    assert (ended.returncode, ended.stdout) == (0, "launch_router: the configuration is valid\n"), ended.stderr


@pytest.mark.parametrize(("line", "reason"), REFUSED, ids=[short(line) for line, _ in REFUSED])
def test_refusals(line: str, reason: str) -> None:
    ended = run(line, "--dry-run")
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert ended.stdout == ""


class Answers:
    """What one rank answers, by model; each is asked once."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._known = fleet, dict[str, str]()

    def of(self, model: str) -> str:
        if model not in self._known:
            port = free_port()
            flags = ("--model-path", model, "--host", "127.0.0.1", "--port", str(port), "--max-total-tokens", "8192")
            process = self._fleet.processes.start_module(f"one-rank-{model}", MODULES["sglang.launch_server"], *flags)
            process.wait_until_ready(f"http://127.0.0.1:{port}/health", READY_SECONDS)
            self._known[model] = generate(port)
            self._fleet.processes.stop(process, 60)
        return self._known[model]


@pytest.fixture(scope="module")
def one_rank(shared_fleet: Fleet) -> Answers:
    return Answers(shared_fleet)


def generate(port: int) -> str:
    """The same 12 tokens wherever the model is the same."""
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    status, answer = request_json(
        "POST", f"http://127.0.0.1:{port}/generate", {"text": PROMPT, "sampling_params": sampling}, timeout=120
    )
    assert status == 200, answer
    assert isinstance(answer, dict)
    assert answer["meta_info"]["completion_tokens"] == 12
    return str(answer["text"])


def start(fleet: Fleet, command: Command, port: int, meeting: int = 0) -> Process:
    """With a tiny model, and on ports of this test; else as it stands. `meeting`: where nodes meet."""
    arguments = [TINY[command.model.split("/")[0]] if word == command.model else word for word in command.arguments]
    arguments = [f"127.0.0.1:{meeting}" if word == "10.0.0.1:29500" else word for word in arguments]
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--max-total-tokens", "8192"]
    if command.module == MODULES["sglang_router.launch_server"]:
        arguments += ["--router-prometheus-host", "127.0.0.1", "--router-prometheus-port", str(free_port())]
        arguments += ["--router-dp-worker-base-port", str(free_port())]
    variables = [f"{name}={value}" for name, value in command.environment.items()]
    return fleet.processes.start("served", ["env", *variables, sys.executable, "-m", command.module, *arguments])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=short(c.line), marks=() if c.quick else pytest.mark.slow) for c in SERVED],
)
def test_serves_as_one_rank_does(command: Command, fleet: Fleet, one_rank: Answers) -> None:
    port = free_port()
    process = start(fleet, command, port)
    if "--device" in command.arguments:
        assert process.wait(READY_SECONDS) == 1
        assert "--device xpu: torch.xpu is not available in this build" in process.log_tail()
        return
    url, routed = f"http://127.0.0.1:{port}", command.module.startswith("warmroute.")
    process.wait_until_ready(url + ("/readiness" if routed else "/health"), READY_SECONDS)
    workers = [url]
    if routed:

        def ready() -> bool:
            answer = request_json("GET", url + "/readiness")[1]
            return isinstance(answer, dict) and answer.get("healthy_workers") == command.workers

        eventually("all workers are ready", ready, READY_SECONDS)
        listed = request_json("GET", url + "/workers")[1]
        assert isinstance(listed, dict)
        workers = [worker["url"] for worker in listed["workers"]]
        assert len(workers) == command.workers
    for worker in workers:
        ranks = request_json("GET", worker + "/debug/ranks")[1]
        assert isinstance(ranks, dict)
        assert len(ranks["ranks"]) == command.ranks
        names = ("pp_rank", "tp_rank", "dp_rank")
        coordinates = command.last.split()
        assert [str(ranks["ranks"][-1][name]) for name in names] == coordinates[:3]
        assert str(ranks["ranks"][-1]["ep_rank"]) == coordinates[4]
    expected = one_rank.of(TINY[command.model.split("/")[0]])
    for _ in range(max(2, command.workers * command.schedulers)):
        assert generate(port) == expected
    process.terminate()
    assert process.wait(60) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", ["", "--disable-cuda-graph"])
@pytest.mark.parametrize("commands", TOGETHER.values(), ids=map(short, TOGETHER))
def test_two_nodes_serve_as_one_rank_does(commands: list[Command], more: str, fleet: Fleet, one_rank: Answers) -> None:
    first = next(c for c in commands if "--node-rank 0" in c.line and ("--disable-cuda-graph" in c.line) is bool(more))
    second = next(c for c in commands if "--node-rank 1" in c.line)
    # Guides show the remedy for node 0 only; nodes that were started differently refuse each other.
    second = dataclasses.replace(second, line=f"{second.line} {more}")
    port, meeting = free_port(), free_port()
    processes = [start(fleet, command, at, meeting) for command, at in ((first, port), (second, free_port()))]
    processes[0].wait_until_ready(f"http://127.0.0.1:{port}/health", READY_SECONDS)
    ranks = request_json("GET", f"http://127.0.0.1:{port}/debug/ranks")[1]
    assert isinstance(ranks, dict)
    half = first.ranks // 2
    assert [rank["node"] for rank in ranks["ranks"]] == [0] * half + [1] * half
    assert generate(port) == one_rank.of(TINY[first.model.split("/")[0]])
    processes[0].terminate()
    assert [process.wait(60) for process in processes] == [0, 0]
