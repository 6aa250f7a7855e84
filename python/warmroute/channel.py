"""Between the supervisor and one of its children: small messages, and sockets that go with them.

A socket pair of packets, so that a message is never cut; it ends with either process.
"""

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 1024
_MAX_SOCKETS = 1

Handler = Callable[[dict[str, Any], list[socket.socket]], None]


class Channel:
    """`on_message` gets what comes, with the sockets that came with it; `on_end` is called once, when the other side is
    gone."""

    def __init__(self, sock: socket.socket, on_message: Handler, on_end: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_message = on_message
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)

    @property
    def fd(self) -> int:
        return self._sock.fileno()

    def send(self, message: dict[str, Any], sockets: tuple[socket.socket, ...] = ()) -> bool:
        """Whether the other side has room for it and is there."""
        data = json.dumps(message).encode()
        try:
            socket.send_fds(self._sock, [data], [sock.fileno() for sock in sockets])
        except OSError as error:
            log.warning("a message between the router's processes is lost: %s", error.strerror or error)
            return False
        return True

    def pause(self) -> None:
        """What comes waits in the socket."""
        self._loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _readable(self) -> None:
        while self._sock.fileno() >= 0:
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE_BYTES, _MAX_SOCKETS, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self.close()
                self._on_end()
                return
            sockets = [socket.socket(fileno=fd) for fd in fds]
            try:
                self._on_message(json.loads(data), sockets)
            except Exception:  # one message that went wrong must not end the channel
                log.exception("a message between the router's processes was not understood: %.200r", data)


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends, the second for a child."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours, theirs
