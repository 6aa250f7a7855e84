"""The connection between the supervisors of two nodes: one line of JSON per message, and its end is the other's end."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

MAX_LINE_BYTES = 1 << 20

UNREACHABLE_SECONDS = 4.0
"""How long what was sent may stay unacknowledged by the other host before it counts as gone. A process that dies closes
its connections at once; this is for hosts and networks that fall silent."""


class Line:
    """Never waits: what cannot be sent yet is kept, what has not arrived is not there yet."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._kept: list[dict[str, Any]] = []

    @property
    def is_busy(self) -> bool:
        """Something still waits to be sent."""
        return bool(self._outgoing)

    def notice_silence(self) -> None:
        """From now on the line breaks when the other host cannot be reached any more."""
        with contextlib.suppress(AttributeError, OSError):  # Linux
            limit = int(UNREACHABLE_SECONDS * 1000)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit)

    def send(self, message: dict[str, Any]) -> None:
        """A line that is broken loses it; `receive` tells."""
        self._outgoing += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            while self._outgoing:
                del self._outgoing[: self.sock.send(self._outgoing)]

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived; None: the other end is gone. Raises ValueError for what is no line of ours."""
        try:
            while data := self.sock.recv(1 << 16):
                self._incoming += data
                if len(self._incoming) > MAX_LINE_BYTES:
                    raise ValueError("the other end does not send lines")
            is_open = False
        except BlockingIOError:
            is_open = True
        except OSError:
            is_open = False
        *lines, rest = self._incoming.split(b"\n")
        self._incoming = bytearray(rest)
        try:
            messages, self._kept = [*self._kept, *map(json.loads, lines)], []
        except RecursionError as error:
            raise ValueError("the other end sends something else") from error
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("the other end sends something else")
        # Its last words are heard before its end is.
        return messages if messages or is_open else None

    def keep(self, messages: list[dict[str, Any]]) -> None:
        """What was received too early comes again."""
        self._kept = messages

    def close(self) -> None:
        self.sock.close()
