"""The data processes as their supervisor sees them: started by exec, watched by a pidfd, spoken to over a channel."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

from warmroute.channel import Channel
from warmroute.process import inherited

log = logging.getLogger(__name__)

DATA_PROCESS = "warmroute.data_process"


@dataclass(frozen=True, slots=True)
class ChildRecord:
    """Enough to know a child again after an exec."""

    seat: int
    """Which of the listeners it has."""
    process: int
    """Its column of the region."""
    pid: int
    slab_fd: int
    channel_fd: int
    is_leaving: bool = False


class Child:
    """`on_message(child, message, sockets)`, `on_end(child, status)`: once, when it is dead and waited for."""

    def __init__(
        self,
        record: ChildRecord,
        on_message: "Callable[[Child, dict[str, Any], list[socket.socket]], None]",
        on_end: "Callable[[Child, int], None]",
    ) -> None:
        self.seat, self.process, self.pid, self.slab_fd = record.seat, record.process, record.pid, record.slab_fd
        self.begin_ns = monotonic_ns()
        self.is_ready = False
        self.is_leaving = record.is_leaving
        """It drains, and its end will surprise nobody."""
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._ended)
        self._channel = Channel(
            socket.socket(fileno=record.channel_fd),
            lambda message, sockets: on_message(self, message, sockets),
            lambda: None,
        )

    def __repr__(self) -> str:
        return f"<Child {self.process} [pid {self.pid}]>"

    @property
    def record(self) -> ChildRecord:
        return ChildRecord(self.seat, self.process, self.pid, self.slab_fd, self._channel.fd, self.is_leaving)

    def send(self, message: dict[str, Any]) -> bool:
        return self._channel.send(message)

    def drain(self, seconds: float, *, has_successor: bool = False) -> None:
        """Finish what runs and end. A successor accepts new connections; without one, they are told to go elsewhere."""
        self.is_leaving = True
        self.send({"drain": [seconds, has_successor]})

    def end(self) -> None:
        """At once, whatever runs."""
        self.is_leaving = True
        self.send({"end": True})

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # it is ours until it has been waited for, so nobody else has its number

    def pause(self) -> None:
        """What it says waits in the channel, for who comes after us."""
        self._channel.pause()
        self._loop.remove_reader(self._pidfd)

    def _ended(self) -> None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._channel.close()
        self._on_end(self, os.waitstatus_to_exitcode(status))


def spawn(task_fd: int, descriptors: Iterable[int]) -> int:
    """The pid of a data process that gets these descriptors and no others."""
    command = [sys.executable, "-m", DATA_PROCESS, str(task_fd)]
    with inherited((task_fd, *descriptors)):
        return os.posix_spawn(sys.executable, command, os.environ, setsigmask=())


def ending(status: int) -> str:
    """In words, of an exit code as `os.waitstatus_to_exitcode` gives it."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
