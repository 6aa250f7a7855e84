"""The parent of the worker's processes: starts them, passes signals on, and ends all when one ends. Imports no torch.

It owns the listening socket until both processes have started, and afterwards nothing but their pids, and with several
nodes the lines to other supervisors. Every decision is `lifecycle.py`'s; on nodes that serve no HTTP
`node_lifecycle.py`'s.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from warmroute_worker import model_config, model_folder, nodes
from warmroute_worker._native import Region
from warmroute_worker.lifecycle import Actions, Lifecycle, Part
from warmroute_worker.node_interface import environment_of
from warmroute_worker.node_lifecycle import NodeLifecycle
from warmroute_worker.node_links import NO_DESCRIPTOR, NodeLinks
from warmroute_worker.node_peers import Peers
from warmroute_worker.startup_error import StartupError
from warmroute_worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.node_line import Line

HTTP_MODULE = "warmroute_worker.http.process"
DRIVER_MODULE = "warmroute_worker.engine_process"
"""What `python -m` runs; tests put a scripted driver here."""

# Torch's threads wait for each other asleep unless the operator says otherwise. Spinning, two threads on two cores that
# other processes use as well gave 13 and 73 tokens/s (1 and 32 streams of the demo model); asleep 114 and 2,097.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    # numpy multiplies nothing here, and a process with threads is no good parent for ranks.
    "OPENBLAS_NUM_THREADS": "1",
}
_BACKLOG = 1024

LOOK_SECONDS = 0.25
"""With other nodes: how long it takes until they hear that the ranks here have stopped."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StartError(Exception):
    """The worker cannot start; the message is one line."""


def run(args: WorkerArgs) -> int:
    """Serves until a signal or a death; returns the exit code. Raises StartError, or NodesError."""
    try:
        # Also what the driver would find out itself, seconds later: it has to import torch first.
        folder = model_folder.resolve(args.model_path)
        config = model_config.read(folder)
        model_config.check_layout(config, args.layout)
        model_config.check_compiled(config, args.enable_torch_compile)
    except (LookupError, StartupError) as error:
        raise StartError(str(error)) from error
    listener = _listen(args) if args.node_rank == 0 else None
    if args.nnodes > 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it waits for others there is nothing to end but itself
    meeting = nodes.meet(args, folder) if args.nnodes > 1 else None
    supervisor = _Supervisor(args, listener, meeting)
    supervisor.remark([*args.remarks(), *model_config.remarks(config, args.layout)])
    return supervisor.run()


def _listen(args: WorkerArgs) -> socket.socket:
    """Connections wait from now on, in the kernel, for the HTTP process."""
    try:
        family, _, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else str(error)
        raise StartError(f"cannot listen on {args.host}:{args.port}: {reason}") from error


class _Supervisor:
    def __init__(self, args: WorkerArgs, listener: socket.socket | None, meeting: nodes.Meeting | None) -> None:
        """`listener`: of the node that serves HTTP. `meeting`: None without other nodes."""
        self._args = args
        self._lifecycle: Lifecycle | NodeLifecycle
        if listener is None:
            name = f"node {args.node_rank} of {args.nnodes}"
            self._lifecycle = NodeLifecycle(args.drain_timeout, name)
        else:
            host, port = listener.getsockname()[:2]
            url_host = f"[{host}]" if ":" in host else host
            self._lifecycle = Lifecycle(args.drain_timeout, f"http://{url_host}:{port}")
        self._selector = selectors.DefaultSelector()
        layout, groups = args.layout, args.nodes.local_groups()
        self._ranks_fd = Region.memory_file(layout.world_size, groups)
        self._region = Region(self._ranks_fd, layout.world_size, groups)
        self._watchdog = Watchdog(layout, args.watchdog_timeout, args.nodes.local_ranks)
        self._listen_for_signals()
        self._status_fd: int | None = None
        self._peers: Peers | None = None
        if meeting is not None:
            now = time.monotonic()
            self._peers = Peers(
                args.nodes, meeting.lines, meeting.hosts, self._region, self._lifecycle, args.watchdog_timeout, now
            )
            for node, line in meeting.lines.items():
                self._selector.register(line.sock, selectors.EVENT_READ, functools.partial(self._hear, node, line))
        self._network = environment_of(meeting.hosts[args.node_rank]) if meeting is not None else {}
        self._processes = self._start(listener, meeting)

    def remark(self, lines: list[str]) -> None:
        """What the operator should know before anything runs."""
        if self._args.log_level in ("debug", "info"):
            for line in lines:
                self._say(line)

    def run(self) -> int:
        while (code := self._lifecycle.exit_code) is None:
            deadline = self._lifecycle.deadline
            timeout = self._watchdog.interval if self._peers is None else min(LOOK_SECONDS, self._watchdog.interval)
            if deadline is not None:
                timeout = min(timeout, max(0.0, deadline - time.monotonic()))
            for key, _ in self._selector.select(timeout):
                self._do(key.data())
            self._reap()
            self._watch(time.monotonic())
            self._do(self._lifecycle.tick(time.monotonic()))
            self._look(time.monotonic())
        self._read_status()
        if self._peers is not None:
            self._peers.close()
        if self._lifecycle.cause is not None:
            self._say(self._lifecycle.cause)
        return code

    def _start(
        self, listener: socket.socket | None, meeting: nodes.Meeting | None
    ) -> dict[Part, subprocess.Popen[bytes]]:
        http_ends, driver_ends = self._engine_ends(meeting)
        # The driver first: it takes seconds to import torch. Each end of a pair must have one owner only, or its
        # death would not be seen at the other; so descriptors are passed by number and closed here.
        ranks = {"--ranks-fd": [self._ranks_fd]}
        engine_fds = [end.fileno() if end is not None else NO_DESCRIPTOR for end in driver_ends]
        links = NodeLinks()
        if meeting is not None:
            wires = {
                group: {node: wire.fileno() for node, wire in ends.items()} for group, ends in meeting.wires.items()
            }
            links = NodeLinks(wires, meeting.hosts[self._args.node_rank], meeting.ranks_on_host)
        parts = {
            Part.DRIVER: self._spawn(
                DRIVER_MODULE,
                {"--engine-fds": engine_fds, **ranks},
                ["--node-links", links.to_json()] if meeting is not None else [],
                inherited=links.descriptors(),
            )
        }
        if listener is not None:
            status_read, status_write = os.pipe()
            os.set_blocking(status_read, False)
            self._status_fd = status_read
            self._selector.register(status_read, selectors.EVENT_READ, self._read_status)
            descriptors = {
                "--engine-fds": [end.fileno() for end in http_ends],
                "--listener-fd": [listener.fileno()],
                "--status-fd": [status_write],
                **ranks,
            }
            parts[Part.HTTP] = self._spawn(HTTP_MODULE, descriptors)
            os.close(status_write)
            listener.close()
        wires_here = [wire for ends in meeting.wires.values() for wire in ends.values()] if meeting is not None else []
        for end in (*http_ends, *driver_ends, *wires_here):
            if end is not None:
                end.close()
        os.close(self._ranks_fd)
        return parts

    def _engine_ends(self, meeting: nodes.Meeting | None) -> tuple[list[socket.socket], list[socket.socket | None]]:
        """By data-parallel rank: the HTTP process's ends, if it is here, and those of the drivers that are."""
        if self._args.node_rank:
            own = meeting.drivers if meeting is not None else {}
            return [], [own.get(dp_rank) for dp_rank in range(self._args.dp_size)]
        elsewhere = meeting.drivers if meeting is not None else {}
        http_ends: list[socket.socket] = []
        driver_ends: list[socket.socket | None] = []
        for dp_rank in range(self._args.dp_size):
            here, there = (elsewhere[dp_rank], None) if dp_rank in elsewhere else socket.socketpair()
            http_ends.append(here)
            driver_ends.append(there)
        return http_ends, driver_ends

    def _spawn(
        self, module: str, descriptors: dict[str, list[int]], flags: Iterable[str] = (), inherited: Iterable[int] = ()
    ) -> subprocess.Popen[bytes]:
        """`inherited`: descriptors that `flags` tell of."""
        command = [sys.executable, "-m", module, "--parent-pid", str(os.getpid()), *flags]
        for flag, numbers in descriptors.items():
            command.append(f"{flag}={','.join(map(str, numbers))}")  # a number may be negative
        command += ["--worker-args", self._args.to_json()]
        passed = [*inherited, *(number for numbers in descriptors.values() for number in numbers)]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[number for number in passed if number != NO_DESCRIPTOR],
            env={**_ENVIRONMENT, **self._network, **os.environ},
        )

    def _listen_for_signals(self) -> None:
        """Signals become readable bytes, so that the loop has one place to wait."""
        self._signals, write_end = socket.socketpair()
        self._signals.setblocking(False)
        write_end.setblocking(False)
        self._signal_end = write_end  # kept open: the interpreter only knows its number
        signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(self._signals, selectors.EVENT_READ, self._read_signals)

    def _read_signals(self) -> Actions:
        actions = Actions()
        for number in self._signals.recv(64):
            if number in _SIGNALS:
                self._do(actions)
                actions = self._lifecycle.terminated(number, time.monotonic())
        return actions

    def _read_status(self) -> Actions:
        """Passes on what the HTTP process has reported. Lines are written whole (`StatusPipe`)."""
        if self._status_fd is None:
            return Actions()
        try:
            data = os.read(self._status_fd, 65536)
        except BlockingIOError:
            return Actions()
        if not data and self._status_fd in self._selector.get_map():
            self._selector.unregister(self._status_fd)
        for line in data.splitlines():
            event = json.loads(line)
            if event["event"] == "ready" and self._peers is not None:
                self._peers.tell({"ready": event["text"]})
            report = self._lifecycle.ready if event["event"] == "ready" else self._lifecycle.failed
            self._do(report(event["text"]))
        return Actions()

    def _hear(self, node: int, line: Line) -> Actions:
        assert self._peers is not None
        for actions in self._peers.hear(node, time.monotonic()):
            self._do(actions)
        if node not in dict(self._peers.lines()):
            self._selector.unregister(line.sock)
            line.close()
        return Actions()

    def _look(self, now: float) -> None:
        """With several nodes: after what stopped the ranks here, and after the others."""
        if self._peers is None:
            return
        reason = self._region.aborted()
        if reason is not None and self._lifecycle.cause is None and not self._lifecycle.is_draining:
            self._do(self._lifecycle.failed(reason))
        for actions in self._peers.look(now):
            self._do(actions)

    def _reap(self) -> None:
        for part, process in list(self._processes.items()):
            code = process.poll()
            if code is not None:
                del self._processes[part]
                # What stopped the ranks says more than how their process ended.
                cause = self._region.aborted() if part is Part.DRIVER else None
                if cause is not None:
                    self._do(self._lifecycle.failed(cause))
                self._do(self._lifecycle.exited(part, process.pid, code, time.monotonic()))

    def _watch(self, now: float) -> None:
        """Ends the ranks when one of them shows no life."""
        if not self._lifecycle.is_serving or Part.DRIVER not in self._processes:
            return
        statuses = [self._region.status(rank) for rank in self._args.nodes.local_ranks]
        verdict = self._watchdog.observe(statuses, now)
        if verdict is not None:
            self._region.abort(verdict)
            self._processes[Part.DRIVER].kill()

    def _do(self, actions: Actions) -> None:
        if actions.say is not None and self._args.log_level in ("debug", "info"):
            self._say(actions.say)
        if actions.stop is not None:
            self._region.abort(actions.stop)
        if actions.forward is not None and Part.HTTP in self._processes:
            self._processes[Part.HTTP].send_signal(actions.forward)
        if actions.kill:
            for process in self._processes.values():
                process.kill()

    def _say(self, line: str) -> None:
        print(f"launch_worker: {line}", file=sys.stderr, flush=True)
