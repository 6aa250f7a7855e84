"""What outlives every process of the router: memory and sockets. The supervisor has them, children inherit some."""

import os
import socket
from time import monotonic_ns

from warmroute._core import Core
from warmroute.command_line import Settings
from warmroute.directory_board import Board
from warmroute.engine import build_core
from warmroute.listening import clients_sockets, metrics_sockets
from warmroute.process import CannotStart
from warmroute.reexecution import Handover
from warmroute.startup import new_core

# Two generations that drain, beside the one that serves.
GENERATIONS = 3


class Shared:
    """What outlives every process of the router: memory and sockets."""

    def __init__(
        self,
        core: Core,
        columns: int,
        board: Board,
        doorbell: int,
        start_ns: int,
        listeners: list[list[socket.socket]],
        metrics: list[socket.socket],
    ) -> None:
        """`columns`: processes that the region has room for, this one included."""
        self.core, self.columns, self.board, self.doorbell = core, columns, board, doorbell
        self.start_ns, self.listeners, self.metrics = start_ns, listeners, metrics


def new_shared(settings: Settings) -> Shared:
    """Raises CannotStart."""
    config = settings.config
    columns = 1 + GENERATIONS * config.processes
    core = new_core(settings, columns)
    for fd in (core.region_fd, core.slab_fd):
        assert fd is not None
        os.set_inheritable(fd, False)
    doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    listeners = clients_sockets(config, config.processes)
    return Shared(core, columns, Board(), doorbell, monotonic_ns(), listeners, metrics_sockets(config))


def shared_again(settings: Settings, handover: Handover) -> Shared:
    """Raises CannotStart."""
    try:
        core = build_core(settings.config, processes=handover.columns, region_fd=handover.region, slab_fd=handover.slab)
    except OSError as error:
        raise CannotStart(f"cannot go on with the memory of the program before: {error}") from None
    for child in handover.children:
        core.watch_slab(child.process, child.slab_fd)
    return Shared(
        core,
        handover.columns,
        Board(handover.board),
        handover.doorbell,
        handover.start_ns,
        [[socket.socket(fileno=fd) for fd in seat] for seat in handover.listeners],
        [socket.socket(fileno=fd) for fd in handover.metrics],
    )
