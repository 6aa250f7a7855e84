"""The process of the engine: `python -m warmroute_worker.engine_process`, started by the supervisor only.

With one rank it is that rank. With several it is their parent: it starts them, and when one dies it tells the others
why and ends. On CPU ranks are forked from here after torch is imported: 4 ranks take 0.05 s instead of 3.6, and share
the library's memory. With CUDA each is a process of its own from the start, since CUDA does not survive a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from warmroute_worker._native import Region
from warmroute_worker.args import WorkerArgs
from warmroute_worker.child_process import die_with_parent, ending, leave_signals_to_parent
from warmroute_worker.node_links import NO_DESCRIPTOR, NodeLinks

if TYPE_CHECKING:
    from warmroute_worker.topology import Place

LAST_WORDS_SECONDS = 1.0
"""What the others get to end by themselves once one rank is dead."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument(
        "--engine-fds",
        type=_numbers,
        required=True,
        help="the drivers' ends of the socket pairs, by data-parallel rank",
    )
    parser.add_argument("--ranks-fd", type=int, required=True, help="the memory that the ranks share")
    parser.add_argument("--worker-args", type=WorkerArgs.from_json, required=True)
    parser.add_argument("--node-links", type=NodeLinks.from_json, default=NodeLinks(), help="sockets to other nodes")
    parser.add_argument("--rank", type=int, help="be this rank")
    options = parser.parse_args()
    die_with_parent(options.parent_pid)
    leave_signals_to_parent()
    # Whoever ends a whole group of processes (systemd does by default) must not take the engine from running requests.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    args: WorkerArgs = options.worker_args
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    layout, local_ranks = args.layout, args.nodes.local_ranks
    region = Region(options.ranks_fd, layout.world_size, args.nodes.local_groups())
    if options.rank is not None or len(local_ranks) == 1:
        rank = local_ranks.start if options.rank is None else options.rank
        return _be_rank(layout.place(rank), args, region, options.engine_fds, options.node_links)
    ranks = _Ranks(args, region, options.node_links)
    if may_fork(args.device):
        # By name, so that the module is there in all ranks and this one does no more with it.
        importlib.import_module("warmroute_worker.rank_process")
        ranks.fork(options.engine_fds)
    else:
        ranks.execute(options.engine_fds, options.ranks_fd)
    for fd in (*options.engine_fds, *options.node_links.descriptors()):
        if fd != NO_DESCRIPTOR:
            os.close(fd)
    return ranks.watch()


def may_fork(device: str) -> bool:
    """Whether no rank will use CUDA. Asking torch would begin to use it."""
    return device == "cpu" or (device == "auto" and not Path("/dev/nvidiactl").exists())


class _Ranks:
    """The processes of all ranks, from their parent's side."""

    def __init__(self, args: WorkerArgs, region: Region, links: NodeLinks) -> None:
        self._args, self._region, self._links = args, region, links
        self._alive: dict[int, Place] = {}
        self._places = [args.layout.place(rank) for rank in args.nodes.local_ranks]

    def fork(self, engine_fds: list[int]) -> None:
        parent = os.getpid()
        for place in self._places:
            pid = os.fork()
            if pid == 0:
                self._be_child(place, parent, engine_fds)
            self._alive[pid] = place

    def execute(self, engine_fds: list[int], ranks_fd: int) -> None:
        for place in self._places:
            flags = ["--parent-pid", str(os.getpid()), "--rank", str(place.rank), "--ranks-fd", str(ranks_fd)]
            flags += [f"--engine-fds={','.join(map(str, engine_fds))}", "--worker-args", self._args.to_json()]
            flags += ["--node-links", self._links.to_json()]
            descriptors = [ranks_fd, engine_fds[place.dp_rank]] if place.is_driver else [ranks_fd]
            descriptors += self._wires_of(place)
            command = [sys.executable, "-m", "warmroute_worker.engine_process", *flags]
            self._alive[subprocess.Popen(command, pass_fds=descriptors).pid] = place

    def watch(self) -> int:
        """Until no rank lives; 0 if all ended by themselves."""
        code = 0
        deadline: float | None = None
        while self._alive:
            pid, status = os.waitpid(-1, 0 if deadline is None else os.WNOHANG)
            if pid in self._alive:
                place = self._alive.pop(pid)
                return_code = os.waitstatus_to_exitcode(status)
                if return_code:
                    code = 1
                    # Whoever ended with an error of its own has said so already, and the first words count.
                    self._region.abort(f"{place}, pid {pid}, {ending(return_code)}")
                deadline = deadline or time.monotonic() + LAST_WORDS_SECONDS
            elif deadline is not None:
                if time.monotonic() >= deadline:
                    for other in self._alive:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(other, signal.SIGKILL)
                time.sleep(0.01)
        return code

    def _wires_of(self, place: Place) -> list[int]:
        """The sockets of the groups in which it speaks for this node."""
        nodes = self._args.nodes
        spoken_for = [
            name for name, by_node in nodes.wired().items() if by_node.get(nodes.own, [None])[0] == place.rank
        ]
        return self._links.descriptors(spoken_for)

    def _be_child(self, place: Place, parent: int, engine_fds: list[int]) -> NoReturn:
        code = 1
        try:
            die_with_parent(parent)
            own = {engine_fds[place.dp_rank] if place.is_driver else NO_DESCRIPTOR, NO_DESCRIPTOR}
            own.update(self._wires_of(place))
            for fd in (*engine_fds, *self._links.descriptors()):
                if fd not in own:
                    os.close(fd)
            code = _be_rank(place, self._args, self._region, engine_fds, self._links)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _be_rank(place: Place, args: WorkerArgs, region: Region, engine_fds: list[int], links: NodeLinks) -> int:
    # Only now: this imports torch, which takes seconds in which the supervisor may die.
    from warmroute_worker import rank_process

    sock = socket.socket(fileno=engine_fds[place.dp_rank]) if place.is_driver else None
    return rank_process.run(place, args, region, sock, links)


if __name__ == "__main__":
    sys.exit(main())
