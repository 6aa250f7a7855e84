"""The process that people start: it is the control plane, holds the listening sockets and the memory that all share,
and looks after the processes that serve clients.

A child that dies is replaced, and what it had in flight forgotten; one whose loop stands still is killed. SIGTERM
drains; SIGHUP puts a new program in the place of this one (`reexecution`) and new children beside the old, who drain.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from time import monotonic_ns
from typing import Any

from warmroute._core import RegionBusy
from warmroute.channel import channel_pair
from warmroute.child_task import ChildTask, write_task
from warmroute.children import Child, ChildRecord, ending, spawn
from warmroute.command_line import Settings
from warmroute.control.control_plane import ControlPlane
from warmroute.directory import Directory
from warmroute.process import CannotStart
from warmroute.reexecution import Handover, handed_over, reexecute, take_signals, why_not
from warmroute.request_search import RequestSearch
from warmroute.restarts import Restarts
from warmroute.service_manager import notify, notify_reloading
from warmroute.shared import Shared, new_shared, shared_again
from warmroute.startup import check_files, log_start, with_seeds

log = logging.getLogger(__name__)

# How long a child may take from its start to its first connection.
READY_SECONDS = 30.0
# A loop that has not turned for so long is stuck, and everybody who is connected to it with it.
STUCK_SECONDS = 5.0
WATCH_SECONDS = 0.5
# Once it has been told to end, or its time to drain is over.
END_SECONDS = 2.0
BUSY_SECONDS = 0.05


async def serve(settings: Settings, *, may_reexecute: bool) -> int:
    """Until SIGTERM or SIGINT; the exit status. Raises CannotStart."""
    handover = handed_over()
    settings = settings.with_drawn(**handover.seeds) if handover else with_seeds(settings)
    check_files(settings.config)
    shared = shared_again(settings, handover) if handover else new_shared(settings)
    supervisor = Supervisor(settings, shared, may_reexecute=may_reexecute)
    return await supervisor.run(handover)


class Supervisor:
    def __init__(self, settings: Settings, shared: Shared, *, may_reexecute: bool) -> None:
        self._settings = settings
        self._config = settings.config
        self._shared = shared
        self._core = shared.core
        self._may_reexecute = may_reexecute
        self._children: dict[int, Child] = {}
        """By process."""
        self._search = RequestSearch(self._children)
        self._control = ControlPlane(settings, shared.core, Directory(shared.board), shared.metrics, self._search.find)
        self._restarts = [Restarts() for _ in shared.listeners]
        """By seat."""
        self._is_starting = True
        self._is_stopping = False
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()

    async def run(self, handover: Handover | None) -> int:
        """Raises CannotStart."""
        self._watch_signals()
        try:
            await self._control.start(handover.control if handover else None)
            if handover:
                await self._succeed(handover)
            else:
                await self._start_all()
            self._is_starting = False
            notify("READY=1")
            self._run_task(self._watch())
            await self._until_stopped()
            return 0
        finally:
            self._is_stopping = True
            for child in list(self._children.values()):
                child.kill()
            for task in self._tasks:
                task.cancel()
            await self._control.close()

    # -- beginnings

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT]
        if self._may_reexecute:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        take_signals()

    async def _start_all(self) -> None:
        children = [self._start(seat) for seat in range(len(self._shared.listeners))]
        if not await self._ready(children):
            raise CannotStart("a process that serves clients did not start; the lines above say why")
        sockets = self._shared.listeners[0]
        log_start(self._config, sockets, len(children))

    async def _succeed(self, handover: Handover) -> None:
        """New children take the place of those that the program before has left."""
        adopted = [self._adopt(record) for record in handover.children]
        old = [child for child in adopted if not child.is_leaving]  # others drain since a SIGHUP before
        for child in old:
            child.is_leaving = True
        new = [self._start(seat) for seat in range(len(self._shared.listeners))]
        if await self._ready(new):
            log.info("SIGHUP: %d new processes serve, those before finish what they have", len(new))
            for child in old:
                child.drain(self._config.shutdown_grace_period_secs, has_successor=True)
            return
        log.error("SIGHUP: new processes did not start, those before go on")
        for child in old:
            child.is_leaving = False
        for child in new:
            child.is_leaving = True
            if child.process in self._children:
                child.kill()

    async def _ready(self, children: list[Child]) -> bool:
        """Whether all of them serve; False as soon as one has died, or after `READY_SECONDS`."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not all(child.is_ready for child in children):
                    if any(child.process not in self._children for child in children):
                        return False
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _start(self, seat: int) -> Child:
        shared, core = self._shared, self._core
        process = next(column for column in range(1, shared.columns) if column not in self._children)
        slab_fd = core.make_slab(process)
        os.set_inheritable(slab_fd, False)
        ours, theirs = channel_pair()
        assert core.region_fd is not None
        task = ChildTask(
            config=self._config,
            process=process,
            columns=shared.columns,
            siblings=len(shared.listeners),
            supervisor_pid=os.getpid(),
            start_ns=shared.start_ns,
            region=core.region_fd,
            slab=slab_fd,
            board=shared.board.fd,
            doorbell=shared.doorbell,
            channel=theirs.fileno(),
            listeners=tuple(sock.fileno() for sock in shared.listeners[seat]),
        )
        task_fd = write_task(task)
        try:
            pid = spawn(task_fd, task.descriptors)
        finally:
            os.close(task_fd)
            theirs.close()
        return self._adopt(ChildRecord(seat, process, pid, slab_fd, ours.detach()), is_ready=False)

    def _adopt(self, record: ChildRecord, *, is_ready: bool = True) -> Child:
        child = Child(record, self._on_message, self._on_end)
        child.is_ready = is_ready
        self._children[child.process] = child
        return child

    # -- what children tell

    def _on_message(self, child: Child, message: dict[str, Any], sockets: list[socket.socket]) -> None:
        if "control" in message:
            for sock in sockets:
                sock.setblocking(False)
                self._run_task(self._control.accept(sock))
        elif "ready" in message:
            child.is_ready = True
            self._changed.set()
        elif "found" in message:
            self._search.found(child.process, *message["found"])

    def _on_end(self, child: Child, status: int) -> None:
        del self._children[child.process]
        self._changed.set()
        self._search.gone(child.process)
        self._retire(child)
        if child.is_leaving or self._is_stopping:
            if status:
                log.warning("data process %d (pid %d) ended with %s", child.process, child.pid, ending(status))
            return
        if self._is_starting and not child.is_ready:
            log.error("data process %d (pid %d) ended with %s", child.process, child.pid, ending(status))
            return
        now_ns = monotonic_ns()
        delay = self._restarts[child.seat].delay_seconds(now_ns - child.begin_ns)
        said = f"; another one starts in {delay:g} s" if delay else "; another one starts"
        log.error("data process %d (pid %d) ended with %s%s", child.process, child.pid, ending(status), said)
        asyncio.get_running_loop().call_later(delay, self._restart, child.seat)

    def _restart(self, seat: int) -> None:
        if not self._is_stopping:
            self._start(seat)

    def _retire(self, child: Child) -> None:
        """What it had in flight is forgotten; whoever waited for one of its requests to end may have a turn now."""
        try:
            self._core.retire_process(child.process, child.slab_fd)
        except RegionBusy:
            asyncio.get_running_loop().call_later(BUSY_SECONDS, self._retire, child)
            return
        os.eventfd_write(self._shared.doorbell, 1)

    # -- looking after them

    async def _watch(self) -> None:
        last_ns = monotonic_ns()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now_ns = monotonic_ns()
            # When this process stood still, the machine may have, and they with it.
            if (now_ns - last_ns) / 1e9 < 2 * WATCH_SECONDS:
                for child in list(self._children.values()):
                    self._look_after(child, now_ns)
            last_ns = now_ns

    def _look_after(self, child: Child, now_ns: int) -> None:
        turned_ns = self._core.turned_ns(child.process) or 0
        still_seconds = (now_ns - max(turned_ns, child.begin_ns)) / 1e9
        longest = STUCK_SECONDS if child.is_ready else READY_SECONDS
        if still_seconds > longest:
            log.error(
                "data process %d (pid %d) has stood still for %.1f s and is killed",
                child.process,
                child.pid,
                still_seconds,
            )
            child.kill()

    # -- endings

    async def _until_stopped(self) -> None:
        while True:
            number = await self._signals.get()
            if number != signal.SIGHUP:
                break
            await self._reexecute()
        self._is_stopping = True
        notify("STOPPING=1")
        grace_seconds = self._config.shutdown_grace_period_secs
        in_flight = sum(ledger[2] for ledger in self._core.ledgers())
        log.info("%s: finishing %d requests, at most %g s", number.name, in_flight, grace_seconds)
        began_ns = monotonic_ns()
        for child in self._children.values():
            child.drain(grace_seconds)
        # From now on a child that has finished takes its queue of connections with it.
        for sock in (sock for seat in self._shared.listeners for sock in seat):
            sock.close()
        if await self._gone(grace_seconds + END_SECONDS) is not None:
            await self._cut_off()
        log.info("stopped after %.1f s", (monotonic_ns() - began_ns) / 1e9)

    async def _gone(self, seconds: float) -> str | None:
        """Waits until there are no children; else why it does not wait any longer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        again: asyncio.Task[signal.Signals] = asyncio.create_task(self._signals.get())
        try:
            while self._children:
                self._changed.clear()
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait((again, changed), timeout=deadline - loop.time(), return_when="FIRST_COMPLETED")
                changed.cancel()
                if again.done() and again.result() != signal.SIGHUP:
                    log.warning("%s again: what still runs is cut off", again.result().name)
                    return "signal"
                if loop.time() >= deadline:
                    return "time"
        finally:
            again.cancel()
        return None

    async def _cut_off(self) -> None:
        for child in self._children.values():
            child.end()
        if await self._gone(END_SECONDS) is not None:
            for child in list(self._children.values()):
                child.kill()
            await self._gone(END_SECONDS)

    async def _reexecute(self) -> None:
        """Does not return when it succeeds."""
        free = self._shared.columns - 1 - len(self._children)
        if free < len(self._shared.listeners):
            log.error("SIGHUP: those who were replaced before still finish their requests; try again")
            return
        notify_reloading()
        reason = await why_not()
        if reason is not None:
            log.error("SIGHUP: the router goes on as it is, since the program would not start: %s", reason)
            notify("READY=1")
            return
        log.info("SIGHUP: starting the program anew")
        shared, core = self._shared, self._core
        for child in self._children.values():
            child.pause()
        control = await self._control.leave()
        assert core.region_fd is not None
        assert core.slab_fd is not None
        origins, config = self._settings.origins, self._config
        reexecute(
            Handover(
                seeds={name: getattr(config, name) for name, origin in origins.items() if origin == "drawn at start"},
                columns=shared.columns,
                start_ns=shared.start_ns,
                region=core.region_fd,
                slab=core.slab_fd,
                board=shared.board.fd,
                doorbell=shared.doorbell,
                listeners=[[sock.fileno() for sock in seat] for seat in shared.listeners],
                metrics=[sock.fileno() for sock in shared.metrics],
                children=[child.record for child in self._children.values()],
                control=control,
            )
        )

    def _run_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
