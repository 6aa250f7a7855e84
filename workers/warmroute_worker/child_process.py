"""What every process that the supervisor starts does first, and how it reports back."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent_pid: int) -> None:
    """From now on this process is killed when its parent dies, however that happens (Linux; elsewhere nothing).

    Exits at once when the parent is gone already: the kernel sends the signal only for deaths after the call.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def leave_signals_to_parent() -> None:
    """A Ctrl-C or hang-up of the terminal reaches all processes; only the supervisor acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def ending(return_code: int) -> str:
    """How a process ended, after "it"; negative: by that signal."""
    if return_code >= 0:
        return f"exited with code {return_code}"
    try:
        name = signal.Signals(-return_code).name
    except ValueError:
        name = f"signal {-return_code}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


class StatusPipe:
    """One line of JSON per event, from a child to the supervisor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self, text: str) -> None:
        """`text`: what the operator reads about the effective settings."""
        self._send({"event": "ready", "text": text})

    def failed(self, message: str) -> None:
        self._send({"event": "failed", "text": message})

    def _send(self, event: dict[str, str]) -> None:
        try:
            os.write(self._fd, json.dumps(event).encode() + b"\n")  # below PIPE_BUF, so never torn
        except BrokenPipeError:
            pass  # the supervisor is gone, and so are we in a moment
