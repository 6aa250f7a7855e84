"""The parent of the worker's processes: starts them, passes signals on, and ends all when one ends. Imports no torch.

It owns the listening socket until both processes have started, and afterwards nothing but their pids. Every decision is
`lifecycle.py`'s.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from warmroute_worker import model_config, model_folder
from warmroute_worker._native import Region
from warmroute_worker.lifecycle import Actions, Lifecycle, Part
from warmroute_worker.startup_error import StartupError
from warmroute_worker.watchdog import Watchdog

if TYPE_CHECKING:
    from warmroute_worker.args import WorkerArgs

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
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StartError(Exception):
    """The worker cannot start; the message is one line."""


def run(args: WorkerArgs) -> int:
    """Serves until a signal or a death; returns the exit code. Raises StartError."""
    try:
        # Also what the driver would find out itself, seconds later: it has to import torch first.
        model_config.check_layout(model_config.read(model_folder.resolve(args.model_path)), args.layout)
    except (LookupError, StartupError) as error:
        raise StartError(str(error)) from error
    return _Supervisor(args, _listen(args)).run()


def _listen(args: WorkerArgs) -> socket.socket:
    """Connections wait from now on, in the kernel, for the HTTP process."""
    try:
        family, _, _, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else str(error)
        raise StartError(f"cannot listen on {args.host}:{args.port}: {reason}") from error


class _Supervisor:
    def __init__(self, args: WorkerArgs, listener: socket.socket) -> None:
        self._args = args
        host, port = listener.getsockname()[:2]
        url_host = f"[{host}]" if ":" in host else host
        self._lifecycle = Lifecycle(args.drain_timeout, f"http://{url_host}:{port}")
        self._selector = selectors.DefaultSelector()
        layout = args.layout
        self._ranks_fd = Region.memory_file(layout.world_size, layout.groups())
        self._region = Region(self._ranks_fd, layout.world_size, layout.groups())
        self._watchdog = Watchdog(layout, args.watchdog_timeout)
        self._listen_for_signals()
        self._processes = self._start(listener)

    def run(self) -> int:
        if self._args.log_level in ("debug", "info"):
            for line in self._args.remarks():
                self._say(line)
        while (code := self._lifecycle.exit_code) is None:
            deadline = self._lifecycle.deadline
            timeout = self._watchdog.interval
            if deadline is not None:
                timeout = min(timeout, max(0.0, deadline - time.monotonic()))
            for key, _ in self._selector.select(timeout):
                self._do(key.data())
            self._reap()
            self._watch(time.monotonic())
            self._do(self._lifecycle.tick(time.monotonic()))
        self._read_status()
        if self._lifecycle.cause is not None:
            self._say(self._lifecycle.cause)
        return code

    def _start(self, listener: socket.socket) -> dict[Part, subprocess.Popen[bytes]]:
        pairs = [socket.socketpair() for _ in range(self._args.dp_size)]
        http_ends, driver_ends = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        status_read, status_write = os.pipe()
        os.set_blocking(status_read, False)
        self._status_fd = status_read
        self._selector.register(status_read, selectors.EVENT_READ, self._read_status)
        # The driver first: it takes seconds to import torch. Each end of the pair must have one owner only, or its
        # death would not be seen at the other; so descriptors are passed by number and closed here.
        ranks = {"--ranks-fd": [self._ranks_fd]}
        driver = self._spawn(DRIVER_MODULE, {"--engine-fds": [end.fileno() for end in driver_ends], **ranks})
        http = self._spawn(
            HTTP_MODULE,
            {
                "--engine-fds": [end.fileno() for end in http_ends],
                "--listener-fd": [listener.fileno()],
                "--status-fd": [status_write],
                **ranks,
            },
        )
        for end in (*http_ends, *driver_ends, listener):
            end.close()
        os.close(status_write)
        os.close(self._ranks_fd)
        return {Part.DRIVER: driver, Part.HTTP: http}

    def _spawn(self, module: str, descriptors: dict[str, list[int]]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, "--parent-pid", str(os.getpid())]
        for flag, numbers in descriptors.items():
            command += [flag, ",".join(map(str, numbers))]
        command += ["--worker-args", self._args.to_json()]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[number for numbers in descriptors.values() for number in numbers],
            env={**_ENVIRONMENT, **os.environ},
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
        try:
            data = os.read(self._status_fd, 65536)
        except BlockingIOError:
            return Actions()
        if not data and self._status_fd in self._selector.get_map():
            self._selector.unregister(self._status_fd)
        for line in data.splitlines():
            event = json.loads(line)
            report = self._lifecycle.ready if event["event"] == "ready" else self._lifecycle.failed
            self._do(report(event["text"]))
        return Actions()

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
        statuses = [self._region.status(rank) for rank in range(self._args.layout.world_size)]
        verdict = self._watchdog.observe(statuses, now)
        if verdict is not None:
            self._region.abort(verdict)
            self._processes[Part.DRIVER].kill()

    def _do(self, actions: Actions) -> None:
        if actions.say is not None and self._args.log_level in ("debug", "info"):
            self._say(actions.say)
        if actions.forward is not None and Part.HTTP in self._processes:
            self._processes[Part.HTTP].send_signal(actions.forward)
        if actions.kill:
            for process in self._processes.values():
                process.kill()

    def _say(self, line: str) -> None:
        print(f"launch_worker: {line}", file=sys.stderr, flush=True)
