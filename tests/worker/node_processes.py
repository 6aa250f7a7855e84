"""Several launchers on loopback that make one worker: each is a node."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.worker.worker_process import children, lives, worker_process

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.worker.worker_process import WorkerProcess

START_SECONDS = 100.0
"""Until all ranks of all nodes are there, on cores that others use, too."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def node_flags(node: int, count: int, port: int, *argv: str) -> list[str]:
    flags = ["--device", "cpu", "--threads", "1", "--port", "0", "--max-total-tokens", "4096", "--dist-timeout", "60"]
    flags += ["--nnodes", str(count), "--node-rank", str(node), "--dist-init-addr", f"127.0.0.1:{port}"]
    return flags + list(argv)


@dataclass
class Nodes:
    launchers: list[WorkerProcess]

    @property
    def url(self) -> str:
        return self.launchers[0].url(START_SECONDS)

    def answer(self, prompt: list[int], new_tokens: int, **fields: Any) -> list[int]:
        """Greedy."""
        parameters = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": parameters, **fields}
        response = httpx.post(self.url + "/generate", json=body, timeout=60)
        response.raise_for_status()
        tokens: list[int] = response.json()["output_ids"]
        return tokens

    def ranks(self) -> list[dict[str, Any]]:
        """What `/debug/ranks` of node 0 shows."""
        found: list[dict[str, Any]] = httpx.get(self.url + "/debug/ranks").json()["ranks"]
        return found

    def processes(self, node: int) -> set[int]:
        """All that a launcher has started, and what those have."""
        found: set[int] = set()
        waiting = [self.launchers[node].process.pid]
        while waiting:
            below = set(children(waiting.pop()))
            waiting += below
            found |= below
        return found

    def ends(self, seconds: float) -> list[int]:
        """The exit codes of all."""
        return [launcher.wait(seconds) for launcher in self.launchers]


@contextlib.contextmanager
def nodes(count: int, *argv: str) -> Iterator[Nodes]:
    """`argv`: the same for all. Nothing is left behind."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(worker_process(*node_flags(node, count, port, *argv)))
            for node in reversed(range(count))  # who comes first waits
        ]
        yield Nodes(started[::-1])


def connections_between(pids: Sequence[int], others: Sequence[int]) -> int:
    """Established TCP connections with one end in each set of processes (Linux)."""
    table = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, state, inode = (line.split()[column] for column in (1, 2, 3, 9))
        if state == "01":
            table[inode] = (local, remote)
    first, second = ({table[inode] for inode in sockets(some) if inode in table} for some in (pids, others))
    return sum((remote, local) in second for local, remote in first)


def sockets(pids: Sequence[int]) -> set[str]:
    """Their inodes."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(link.readlink())
                    if target.startswith("socket:["):
                        found.add(target[len("socket:[") : -1])
    return found


def all_gone(pids: set[int]) -> bool:
    return not any(lives(pid) for pid in pids)
