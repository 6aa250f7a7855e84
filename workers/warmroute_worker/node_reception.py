"""Who connects to a listening socket, and the first line that each says. Imports no torch."""

from __future__ import annotations

import json
import selectors
import socket
import time
from typing import Any

MAX_LINE_BYTES = 1 << 16
_PAUSE_SECONDS = 0.005


class Reception:
    """Who connects and says nothing, or something else, keeps nobody waiting. Owns the listener."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._silent: set[socket.socket] = set()

    def next(self, deadline: float) -> tuple[socket.socket, dict[str, Any]] | None:
        """A connection whose first line has come, and that line; what follows it has not been read."""
        while True:
            left = deadline - time.monotonic()
            events = self._selector.select(max(left, 0.0))
            for key, _ in events:
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is self._listener:
                    self._accept()
                    continue
                line = _first_line(sock)
                if line == b"":
                    continue
                self._selector.unregister(sock)
                self._silent.discard(sock)
                message = _parsed(line)
                if message is None:
                    sock.close()
                    continue
                sock.setblocking(True)
                return sock, message
            if left <= 0:
                return None
            if events:
                time.sleep(_PAUSE_SECONDS)  # half a line is there, and so the selector does not wait

    def close(self) -> None:
        self._selector.close()
        for sock in self._silent:
            sock.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        self._silent.add(sock)
        self._selector.register(sock, selectors.EVENT_READ)


def is_gone(sock: socket.socket) -> bool:
    """Whether the other end has closed the connection."""
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _first_line(sock: socket.socket) -> bytes | None:
    """Empty: not all of it is there yet; None: it never will be. Nothing behind it is taken out of the socket."""
    try:
        seen = sock.recv(MAX_LINE_BYTES, socket.MSG_PEEK)
    except BlockingIOError:
        return b""
    except OSError:
        return None
    end = seen.find(b"\n") + 1
    if not end:
        # After half a line and the end, `recv` goes on showing the half.
        return b"" if seen and len(seen) < MAX_LINE_BYTES else None
    return sock.recv(end)


def _parsed(line: bytes | None) -> dict[str, Any] | None:
    try:
        message = json.loads(line or b"")
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
