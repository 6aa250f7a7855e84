"""The process that schedules and computes: messages in, step outputs out, until the other end of the socket is gone.

`main` runs in a process of its own (driver_process.py).
"""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING

from warmroute_worker.messages import (
    Abort,
    Failed,
    Flush,
    FrameReader,
    Generate,
    Message,
    Shutdown,
    encode,
)
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    import socket

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.engine import Engine

log = logging.getLogger("warmroute_worker.driver")

READ_BYTES = 1 << 18


class Link:
    """The driver's end of the socket. Reads never wait unless told to; writes do: the HTTP process always reads."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._reader = FrameReader()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def receive(self, *, wait: bool) -> list[Message] | None:
        """All that has arrived, after waiting for something if `wait`. None: the other end is closed."""
        messages: list[Message] = []
        timeout = None if wait else 0
        while self._poll.poll(timeout):
            try:
                data = self._sock.recv(READ_BYTES)
            except ConnectionError:
                return None
            if not data:
                return None
            messages += self._reader.feed(data)
            # Half a frame is no reason to stop waiting for the other half.
            timeout = 0 if messages else timeout
        return messages

    def send(self, message: Message) -> bool:
        """False: the other end is closed."""
        try:
            self._sock.sendall(encode(message))
        except ConnectionError:
            return False
        return True


def main(sock: socket.socket, args: WorkerArgs) -> int:
    """Load the model, say Ready or Failed, then serve. Returns the exit status of the process."""
    link = Link(sock)
    try:
        engine = _load(args)
    except (StartupError, LookupError) as error:
        link.send(Failed(str(error)))
        return 1
    except Exception as error:
        log.exception("the engine could not start")
        link.send(Failed(f"the engine could not start: {type(error).__name__}: {' '.join(str(error).split())}"))
        return 1
    link.send(engine.ready)
    return serve(link, engine)


def serve(link: Link, engine: Engine) -> int:
    """Take what has arrived, compute one step, say what it brought; until the other end is gone or says Shutdown."""
    while (messages := link.receive(wait=engine.is_idle)) is not None:
        for message in messages:
            if isinstance(message, Shutdown):
                return 0
            _deliver(message, engine, link)
        if not engine.is_idle:
            link.send(engine.step())
    return 0


def _deliver(message: Message, engine: Engine, link: Link) -> None:
    match message:
        case Generate():
            engine.scheduler.add(message)
        case Abort():
            engine.scheduler.abort(message.rid)
        case Flush():
            link.send(engine.scheduler.flush(message.id))
        case _:
            raise ValueError(f"{type(message).__name__} is not for the driver")


def _load(args: WorkerArgs) -> Engine:
    # Torch is imported here and not above: with this module imported only, a bad argument costs nothing.
    from warmroute_worker import engine

    return engine.load(args)
