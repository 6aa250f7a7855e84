"""What systemd (`Type=notify`, `Type=notify-reload`) is told; nothing where there is none. See sd_notify(3)."""

import os
import socket
from time import monotonic_ns


def notify(*lines: str) -> None:
    """`READY=1`, `STOPPING=1`, `RELOADING=1` and what else sd_notify(3) knows."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    if path.startswith("@"):  # an abstract address
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto("\n".join(lines).encode(), path)
    except OSError:  # whoever watches has gone: no reason to stop serving
        pass


def notify_reloading() -> None:
    notify("RELOADING=1", f"MONOTONIC_USEC={monotonic_ns() // 1000}")
