"""Workers as child processes of `launch_server`: their ports, their start, their end.

A child dies with its parent (PR_SET_PDEATHSIG), has its own session, so that Ctrl-C in a terminal reaches it only
through us, after the router has drained, and inherits our standard error.
"""

import asyncio
import ctypes
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from typing import Final, NoReturn

import httpx

from warmroute.worker_plan import WorkerPlan

log = logging.getLogger(__name__)

WORKER_HOST: Final = "127.0.0.1"
WORKER_MODULE: Final = "warmroute_worker.launch_worker"
_WATCH_SECONDS: Final = 0.2
# A worker that is told to stop ends its requests' streams and its ranks; ten seconds is ten times what that takes.
_STOP_SECONDS: Final = 10.0
_PR_SET_PDEATHSIG: Final = 1


class WorkerFailed(Exception):  # noqa: N818
    """One line for the user: which worker, and what happened. `status`: the exit status that says it best."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


class HeldPort:
    """A port that is ours from here on.

    It is bound but does not listen, and allows sharing (SO_REUSEADDR) once it is bound, so that the worker, whose
    server sets the same option, can listen there, while everybody who looks for a free port finds it taken.
    """

    def __init__(self, host: str, port: int) -> None:
        """Raises OSError when it is taken."""
        self.port = port
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._sock.bind((host, port))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        except OSError:
            self._sock.close()
            raise

    def close(self) -> None:
        self._sock.close()


def hold_ports(count: int, base: int, others: Collection[int] = ()) -> list[HeldPort]:
    """The first `count` free ports from `base` on, without `others`, which somebody else will want. Raises WorkerFailed
    when there are not that many."""
    held: list[HeldPort] = []
    for port in range(base, 65536):
        if len(held) == count:
            break
        if port in others:
            continue
        try:
            held.append(HeldPort(WORKER_HOST, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    if len(held) < count:
        raise WorkerFailed(f"there are not {count} free ports from {base} on (--router-dp-worker-base-port)")
    return held


class WorkerProcesses:
    """Owns the processes from `start` to `stop`."""

    def __init__(self, ports: Sequence[HeldPort], plan: WorkerPlan) -> None:
        """A port for each worker of the plan."""
        self.plan = plan
        self._ports = ports
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def urls(self) -> list[str]:
        return [f"http://{WORKER_HOST}:{held.port}" for held in self._ports]

    def flags(self, index: int) -> list[str]:
        """All flags of worker `index`."""
        return [*self.plan.flags, "--host", WORKER_HOST, "--port", str(self._ports[index].port)]

    def command(self, index: int) -> list[str]:
        """How worker `index` is started, beside its environment."""
        return [sys.executable, "-m", WORKER_MODULE, *self.flags(index)]

    def start(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        parent = os.getpid()

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

        for remark in self.plan.remarks():
            log.warning(remark)
        for index, held in enumerate(self._ports):
            command, own = self.command(index), self.plan.environment(index)
            shown = " ".join([f"{name}={value}" for name, value in own.items()] + command[1:])
            log.info("starting worker on port %d: %s", held.port, shown)
            self._processes.append(
                # preexec_fn: this process has one thread here, so nothing can be locked between fork and exec.
                subprocess.Popen(command, env={**os.environ, **own}, start_new_session=True, preexec_fn=die_with_parent)
            )

    async def watch(self, startup_timeout_seconds: float) -> NoReturn:
        """Returns never; raises WorkerFailed when a worker cannot start, or when none is left."""
        began = time.monotonic()
        starting = set(range(len(self._processes)))
        running = set(starting)
        async with httpx.AsyncClient(trust_env=False, timeout=2.0) as client:
            while True:
                for index in sorted(running):
                    status = self._processes[index].poll()
                    if status is None:
                        continue
                    if index in starting:
                        raise WorkerFailed(f"{self._name(index)} {_ended(status)} before it was ready", max(status, 1))
                    running.discard(index)
                    log.error("%s %s", self._name(index), _ended(status))
                    if not running:
                        raise WorkerFailed("no worker is left")
                waited = time.monotonic() - began
                if starting and waited > startup_timeout_seconds:
                    raise WorkerFailed(f"{self._name(min(starting))} was not ready within {waited:.0f} s")
                for index in sorted(starting):
                    if await _is_ready(client, self.urls[index]):
                        starting.discard(index)
                        log.info("%s is ready after %.1f s", self._name(index), time.monotonic() - began)
                await asyncio.sleep(_WATCH_SECONDS)

    def stop(self) -> None:
        """Ask all to end, wait, then kill what is left of each: returns when no process of theirs is running."""
        # It takes ten seconds at most; one more Ctrl-C must not leave it half done.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        for index, process in enumerate(self._processes):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("%s does not end; killing it", self._name(index))
            try:
                os.killpg(process.pid, signal.SIGKILL)  # its session: also what a dead worker left behind
            except ProcessLookupError:
                pass
            process.wait()
        for held in self._ports:
            held.close()

    def _name(self, index: int) -> str:
        return f"worker {index} (port {self._ports[index].port}, pid {self._processes[index].pid})"


def _ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


async def _is_ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/health")).is_success
    except httpx.HTTPError:
        return False
