"""Real processes for end-to-end tests, the demo and the benches: start, wait until ready, stop, leave nothing behind.

Every process that `Processes` starts carries a mark in its environment, which its children inherit; what still carries
the mark after everything was stopped is an orphan, and an error.
"""

import http.client
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

REPOSITORY = Path(__file__).resolve().parent.parent
MARK = "WARMROUTE_TEST_RUN"
LOG_TAIL_LINES = 25


class ProcessError(RuntimeError):
    """A process did not do what was expected; the message names it and its log and quotes the log's end."""


class Process:
    """One started program. Its output, both streams, goes to `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path, mark: str, cpus: set[int] | None = None) -> None:
        self.name, self.command, self.log = name, list(command), log
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            output.write(f"$ {shlex.join(self.command)}\n".encode())
            output.flush()
            self._popen = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we stop them in order
            )
        if cpus is not None:
            os.sched_setaffinity(self._popen.pid, cpus)  # set before the program makes threads: they inherit it

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._popen.poll()

    def error(self, what: str) -> ProcessError:
        return ProcessError(f"{self.name} {what}; its log {self.log} ends with:\n{self.log_tail()}")

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:])

    def wait_until_ready(self, url: str, timeout: float = 30.0) -> None:
        """Until `GET url` answers 200. Raises ProcessError when the process ends first or time is up."""
        deadline = time.monotonic() + timeout
        last = "no connection"
        while time.monotonic() < deadline:
            if self.exit_code is not None:
                raise self.error(f"ended with exit code {self.exit_code} before it was ready")
            try:
                status, _ = request("GET", url, timeout=2.0)
            except OSError as error:
                last = str(error)
            else:
                if status == 200:
                    return
                last = f"status {status}"
            time.sleep(0.03)
        raise self.error(f"was not ready at {url} within {timeout:g} s (last: {last})")

    def wait(self, timeout: float) -> int:
        """Its exit code. Raises ProcessError when it has not ended by then."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.error(f"did not end within {timeout:g} s") from None

    def terminate(self) -> None:
        """SIGTERM, if it still runs."""
        if self.exit_code is None:
            self._popen.send_signal(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and everything in its session, then wait."""
        try:
            os.killpg(self._popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._popen.wait(10)


class Processes:
    """Starts processes and stops them all at its end, last first."""

    def __init__(self, log_folder: Path) -> None:
        self.log_folder = log_folder
        self._mark = uuid.uuid4().hex
        self._started: list[Process] = []

    def start(self, name: str, command: Sequence[str], cpus: set[int] | None = None) -> Process:
        process = Process(name, command, self.log_folder / f"{name}.log", self._mark, cpus)
        self._started.append(process)
        return process

    def start_module(self, name: str, module: str, *arguments: str, cpus: set[int] | None = None) -> Process:
        """`python -m module arguments`, with this interpreter."""
        return self.start(name, [sys.executable, "-m", module, *arguments], cpus)

    def stop(self, process: Process, grace: float = 15.0) -> int:
        """SIGTERM, SIGKILL after `grace` seconds. The exit code."""
        process.terminate()
        try:
            return process.wait(grace)
        except ProcessError:
            process.kill()
            raise
        finally:
            if process in self._started:
                self._started.remove(process)

    def stop_all(self, grace: float = 15.0) -> None:
        """Stop what still runs. Raises ProcessError when something had to be killed or left children behind."""
        complaints = []
        running = [process for process in reversed(self._started) if process.exit_code is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + grace
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except ProcessError as error:
                complaints.append(f"{error} (after SIGTERM)")
                process.kill()
        self._started.clear()
        for pid, command in self._orphans():
            complaints.append(f"left behind: {pid} {command}")
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if complaints:
            raise ProcessError("\n".join(complaints))

    def _orphans(self) -> list[tuple[int, str]]:
        """What carries our mark and does not end by itself within a second."""
        deadline = time.monotonic() + 1.0
        while found := marked_processes(self._mark):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop_all()
        except ProcessError:
            if kind is None:  # else the first error is the one to show
                raise


def marked_processes(mark: str) -> list[tuple[int, str]]:
    """(pid, command line) of the living processes with that mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:  # a zombie has none
                    found.append((int(folder.name), command))
        except OSError:
            continue
    return found


_given_ports: set[int] = set()


def free_port() -> int:
    """A port nobody listens on, below the range from which the kernel takes the ports of outgoing connections, and not
    the same twice: who asks for two means two."""
    while True:
        port = random.randrange(15_000, 32_000)
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            _given_ports.add(port)
            return port


def request(
    method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 10.0
) -> tuple[int, bytes]:
    """(status, body) on a connection of its own. Raises OSError when there is no HTTP answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
    try:
        connection.request(
            method, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), body, headers or {}
        )
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer: {error!r}") from error
    finally:
        connection.close()


def request_json(method: str, url: str, value: object = None, timeout: float = 10.0) -> tuple[int, object]:
    """As `request`, with JSON both ways (an empty answer is None)."""
    body = None if value is None else json.dumps(value).encode()
    status, answer = request(method, url, body, {"content-type": "application/json"}, timeout)
    return status, json.loads(answer) if answer else None
