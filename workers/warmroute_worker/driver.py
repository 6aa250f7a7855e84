"""The rank that schedules: messages in, step outputs out, until the other end of the socket is gone."""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING

from warmroute_worker import engine
from warmroute_worker.comm.rank_links import CollectiveError
from warmroute_worker.executor.ranks import failure, settled
from warmroute_worker.messages import (
    Abort,
    Continue,
    CountExperts,
    Failed,
    Flush,
    FrameReader,
    Generate,
    KvEvents,
    Message,
    Pause,
    Profile,
    Reply,
    Shutdown,
    Wake,
    encode,
)
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    import socket

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.comm.rank_links import RankLinks
    from warmroute_worker.engine import Engine

log = logging.getLogger("warmroute_worker.driver")

READ_BYTES = 1 << 18

NAP_MS = 250
"""How long the driver waits for work before it looks whether the ranks are to stop, and shows that it lives."""


class Link:
    """The driver's end of the socket. Reads never wait unless told to; writes do: the HTTP process always reads."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._reader = FrameReader()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def receive(self, *, wait: bool) -> list[Message] | None:
        """All that has arrived, after waiting a moment for something if `wait`. None: the other end is closed, and all
        that it said before has been returned."""
        messages: list[Message] = []
        timeout = NAP_MS if wait else 0
        while self._poll.poll(timeout):
            try:
                data = self._sock.recv(READ_BYTES)
            except ConnectionError:
                data = b""
            if not data:
                return messages or None
            messages += self._reader.feed(data)
            # Half a frame is no reason to stop waiting for the other half.
            timeout = 0 if messages else timeout
        return messages

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> bool:
        """False: the other end is closed."""
        try:
            self._sock.sendall(encode(message))
        except ConnectionError:
            return False
        return True


def main(sock: socket.socket, args: WorkerArgs, links: RankLinks) -> int:
    """Load the model, say Ready or Failed, then serve. Returns the exit status of the process."""
    link = Link(sock)
    try:
        loaded = engine.load(args, links)
        link.send(loaded.ready)
        with settled():
            return serve(link, loaded, links)
    except (StartupError, LookupError, CollectiveError) as error:
        # Of a collective: what stopped the ranks, in the words of whoever did.
        link.send(Failed(str(error)))
        return 1
    except Exception as error:
        log.exception("%s failed", links.place)
        reason = f"the engine failed: {failure(error)}"
        links.abort(reason)
        link.send(Failed(reason))
        return 1


def serve(link: Link, engine: Engine, links: RankLinks) -> int:
    """Take what has arrived, compute one step, say what it brought; until the other end is gone or says Shutdown."""
    pauses: list[Pause] = []
    leaving = False
    engine.heed(link.fileno())
    while True:
        messages = link.receive(wait=not engine.must_step)
        links.beat()
        if messages is None:
            leaving = True
            engine.scheduler.abort_all()
        for message in messages or ():
            if isinstance(message, Shutdown):
                leaving = True
                engine.scheduler.abort_all()
            elif isinstance(message, Pause):
                engine.is_paused = True
                pauses.append(message)
            else:
                _deliver(message, engine, link)
        # Who goes in step leaves when nobody waits for anybody; all are told to.
        if leaving and (engine.lock_step is None or not engine.lock_step.is_awake):
            break
        if engine.must_step or pauses:
            if engine.lock_step is not None and not engine.lock_step.is_awake and engine.must_step:
                link.send(Wake(engine.lock_step.round + 1))
            _step(link, engine, pauses)
        if events := engine.cache_events.drain():
            link.send(KvEvents(events))
    engine.close()
    return 0


def _step(link: Link, engine: Engine, pauses: list[Pause]) -> None:
    """One step, or what is under way; answers `pauses` once nothing is."""
    if engine.must_step or not engine.is_settled:
        link.send(engine.step())
    if pauses and engine.is_settled:
        if any(pause.mode == "retract" for pause in pauses):
            engine.scheduler.retract_all()
        for pause in pauses:
            link.send(Reply(pause.id, True, "paused"))
        pauses.clear()


def _deliver(message: Message, engine: Engine, link: Link) -> None:
    match message:
        case Generate():
            engine.add(message)
        case Abort():
            engine.scheduler.abort(message.rid)
        case Flush():
            link.send(engine.scheduler.flush(message.id))
        case Continue():
            engine.is_paused = False
            link.send(Reply(message.id, True, "going on"))
        case Profile():
            link.send(Reply(message.id, *engine.profile(message.folder)))
        case CountExperts():
            link.send(Reply(message.id, *engine.count_experts(message.order)))
        case Wake():
            assert engine.lock_step is not None
            engine.lock_step.wake(message.round)
        case _:
            raise ValueError(f"{type(message).__name__} is not for the driver")
