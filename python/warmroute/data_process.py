"""A process that serves clients and does nothing else: `python -m warmroute.data_process FD`, run by the supervisor.

It knows the supervisor by a channel: sends it the other end of a socket when a request is not routed, says when it is
ready and which worker has a request, and drains when it is told to, or gets SIGTERM. It ends with the supervisor.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvloop

from warmroute.channel import Channel
from warmroute.child_task import ChildTask, read_task
from warmroute.dataplane import DataPlane
from warmroute.dataplane.plane import Shared
from warmroute.directory import Directory
from warmroute.directory_board import Board
from warmroute.engine import build_core
from warmroute.listening import LISTEN_BACKLOG
from warmroute.process import die_with, raise_open_files_limit, set_up_log

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    task = read_task(int(argv[0]))
    die_with(task.supervisor_pid)
    # What a terminal sends to all of us is for the supervisor.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for fd in task.descriptors:
        os.set_inheritable(fd, False)
    set_up_log(task.config.log_level, f"data {task.process}")
    open_files = raise_open_files_limit()
    return uvloop.run(DataProcess(task, open_files).run())


class DataProcess:
    def __init__(self, task: ChildTask, open_files: int) -> None:
        self._task = task
        config = task.config
        core = build_core(
            config, processes=task.columns, process=task.process, region_fd=task.region, slab_fd=task.slab
        )
        self._core = core
        self._shared = Shared(open_files, task.siblings, task.doorbell, task.start_ns)

    async def run(self) -> int:
        task = self._task
        loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[float, bool] | None] = asyncio.Queue()
        """(grace, whether somebody else accepts connections from now on) of a drain; None: end at once."""
        grace = task.config.shutdown_grace_period_secs
        loop.add_signal_handler(signal.SIGTERM, self._told.put_nowait, (grace, False))
        directory = Directory(Board(task.board), is_writer=False)
        self._plane = plane = DataPlane(task.config, self._core, directory, self._control_upstream, self._shared)
        self._channel = Channel(socket.socket(fileno=task.channel), self._on_message, self._on_end)
        sockets = [socket.socket(fileno=fd) for fd in task.listeners]
        servers = [await loop.create_server(plane.protocol_factory, sock=s, backlog=LISTEN_BACKLOG) for s in sockets]
        self._channel.send({"ready": True})
        try:
            told = await self._told.get()
            if told is not None:
                grace, has_successor = told
                if has_successor:
                    for server in servers:
                        server.close()
                await self._drain(grace)
        finally:
            for server in servers:
                server.close()
            plane.close()
            await asyncio.sleep(0)
        return 0

    async def _drain(self, seconds: float) -> None:
        """As long as it takes, or until it is told to end at once."""
        draining = asyncio.create_task(self._plane.drain(seconds))
        while not draining.done():
            told = asyncio.create_task(self._told.get())
            await asyncio.wait((draining, told), return_when=asyncio.FIRST_COMPLETED)
            # Who drains for a successor and then is told to stop with everybody else has been given what it needs.
            if told.done() and told.result() is None:
                draining.cancel()
            told.cancel()
        if draining.cancelled() or not draining.result():
            log.warning("%d requests are cut off", self._plane.active_requests)

    async def _control_upstream(self) -> socket.socket:
        """Raises OSError when the supervisor does not take any more of them."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            if not self._channel.send({"control": True}, (theirs,)):
                ours.close()
                raise ConnectionRefusedError("the supervisor has no time")
        return ours

    def _on_message(self, message: dict[str, Any], sockets: list[socket.socket]) -> None:
        if "drain" in message:
            seconds, has_successor = message["drain"]
            self._told.put_nowait((seconds, has_successor))
        elif "end" in message:
            self._told.put_nowait(None)
        elif "find" in message:
            ticket, request_id = message["find"]
            self._channel.send({"found": [ticket, self._plane.find(request_id)]})

    def _on_end(self) -> None:
        self._told.put_nowait(None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
