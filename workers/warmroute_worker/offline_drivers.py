"""An engine of several drivers without a server, for benchmarks and tests: every rank is a process, and this process is
to the drivers what the HTTP process is to them, and no more."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import socket
from collections import defaultdict
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

from warmroute_worker import messages, rank_process
from warmroute_worker._native import Region
from warmroute_worker.args import WorkerArgs
from warmroute_worker.child_process import die_with_parent
from warmroute_worker.messages import Failed, FrameReader, Ready, Reply, Row, Shutdown, StepOutput, Wake

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from warmroute_worker.messages import Generate, Message

WAIT_SECONDS = 120.0
JOIN_SECONDS = 10.0


class Drivers:
    """The other ends of the drivers' sockets."""

    def __init__(self, sockets: Sequence[socket.socket], region: Region, args: WorkerArgs) -> None:
        self.region, self.args = region, args
        self._sockets = list(sockets)
        self._readers = [FrameReader() for _ in sockets]
        self.ready: dict[int, Ready] = {}
        self.rows: dict[str, list[Row]] = defaultdict(list)
        """Of each request, in order."""
        self.outputs: list[tuple[int, StepOutput]] = []
        self.replies: list[tuple[int, Reply]] = []
        self.failures: list[str] = []

    def send(self, dp_rank: int, message: Message) -> None:
        self._sockets[dp_rank].sendall(messages.encode(message))

    def until(self, done: Callable[[], bool]) -> None:
        """Take what the drivers say, and pass on their calls to each other."""
        poll = select.poll()
        numbers = {sock.fileno(): dp_rank for dp_rank, sock in enumerate(self._sockets)}
        for fd in numbers:
            poll.register(fd, select.POLLIN)
        while not done():
            events = poll.poll(WAIT_SECONDS * 1000)
            if not events:
                raise TimeoutError(f"nothing came within {WAIT_SECONDS:g} s: {self.region.aborted()}")
            for fd, _ in events:
                dp_rank = numbers[fd]
                data = self._sockets[dp_rank].recv(1 << 18)
                if not data:
                    raise ConnectionError(f"driver {dp_rank} is gone: {self.region.aborted()}; {self.failures}")
                for message in self._readers[dp_rank].feed(data):
                    self._take(dp_rank, message)

    def finished(self, rids: Sequence[str]) -> Callable[[], bool]:
        """Whether these requests are answered."""
        return lambda: all(self.rows[rid] and self.rows[rid][-1].finish_reason for rid in rids)

    def answers(self, requests: Sequence[tuple[int, Generate]]) -> list[list[int]]:
        """Give each request to its driver, and wait for all: their tokens. Raises ValueError if one is refused."""
        for _, request in requests:
            self.rows.pop(request.rid, None)
        for dp_rank, request in requests:
            self.send(dp_rank, request)
        self.until(self.finished([request.rid for _, request in requests]))
        for _, request in requests:
            if (error := self.rows[request.rid][-1].error) is not None:
                raise ValueError(error)
        return [[token for row in self.rows[request.rid] for token in row.token_ids] for _, request in requests]

    def statuses(self) -> list[dict[str, int]]:
        """What the ranks say of themselves."""
        return [self.region.status(rank) for rank in range(self.args.layout.world_size)]

    def _take(self, dp_rank: int, message: Message) -> None:
        match message:
            case Ready():
                self.ready[dp_rank] = message
            case StepOutput():
                self.outputs.append((dp_rank, message))
                for row in message.rows:
                    self.rows[row.rid].append(row)
            case Wake():
                for other in range(len(self._sockets)):
                    if other != dp_rank:
                        self.send(other, message)
            case Reply():
                self.replies.append((dp_rank, message))
            case Failed():
                self.failures.append(message.message)


@contextlib.contextmanager
def drivers(args: WorkerArgs, prepare: Callable[[], None] | None = None) -> Iterator[Drivers]:
    """All ranks of a worker, ready; gone when this ends. `prepare` is called in each before it begins.

    Raises RuntimeError with what the drivers say when they cannot start.
    """
    layout = args.layout
    fd = Region.memory_file(layout.world_size, layout.groups())
    region = Region(fd, layout.world_size, layout.groups())
    context = multiprocessing.get_context("forkserver")
    # Torch is imported once, by the process that all ranks are forked from.
    context.set_forkserver_preload(["warmroute_worker.rank_process"])
    pairs = [socket.socketpair() for _ in range(layout.dp_size)]
    children = []
    for place in layout.places():
        theirs = DupFd(pairs[place.dp_rank][1].fileno()) if place.is_driver else None
        arguments = (place.rank, args.to_json(), DupFd(fd), theirs, prepare)
        children.append(context.Process(target=_be_rank, args=arguments, daemon=True))
        children[-1].start()
    os.close(fd)
    for _, theirs_end in pairs:
        theirs_end.close()
    made = Drivers([ours for ours, _ in pairs], region, args)
    try:
        made.until(lambda: len(made.ready) == layout.dp_size or bool(made.failures))
        if made.failures:
            raise RuntimeError("; ".join(made.failures))
        yield made
        for dp_rank in range(layout.dp_size):
            with contextlib.suppress(OSError):
                made.send(dp_rank, Shutdown())
    except BaseException as error:
        region.abort(f"the other end failed: {error}")
        raise
    finally:
        for ours, _ in pairs:
            ours.close()
        late = []
        for rank, child in enumerate(children):
            child.join(JOIN_SECONDS)
            if child.exitcode is None:
                late.append(rank)
            child.kill()
            child.join()
            child.close()
    if late:
        raise RuntimeError(f"ranks {late} did not leave when they were told to")


def _be_rank(rank: int, args_json: str, fd: Any, sock: Any, prepare: Callable[[], None] | None) -> None:
    die_with_parent(os.getppid())
    if prepare is not None:
        prepare()
    args = WorkerArgs.from_json(args_json)
    region = Region(fd.detach(), args.layout.world_size, args.layout.groups())
    connection = None if sock is None else socket.socket(fileno=sock.detach())
    raise SystemExit(rank_process.run(args.layout.place(rank), args, region, connection))
