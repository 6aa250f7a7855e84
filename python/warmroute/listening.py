"""The sockets that clients connect to."""

import errno
import socket
from collections.abc import Sequence
from typing import Any

from warmroute.config import RouterConfig
from warmroute.process import CannotStart

# Deep enough for a burst of clients that all connect at once; the kernel caps it at net.core.somaxconn.
LISTEN_BACKLOG = 4096


class CannotListen(Exception):  # noqa: N818
    """Why not, in a few words."""


def clients_sockets(config: RouterConfig, processes: int) -> list[list[socket.socket]]:
    """For each process one socket per address that the host stands for: the kernel spreads connections over them.
    Raises CannotStart."""
    try:
        first = _sockets(config.host, config.port, shared=False)
        if processes <= 1:
            return [first]
        # Whoever shares a port shares it with every process of the same user: that nobody has it shows without sharing.
        for sock in first:
            sock.close()
        return [_sockets(config.host, config.port, shared=True) for _ in range(processes)]
    except CannotListen as error:
        raise CannotStart(f"cannot listen on {error} (--host, --port)") from None


def metrics_sockets(config: RouterConfig) -> list[socket.socket]:
    """Raises CannotStart."""
    try:
        return _sockets(config.prometheus_host, config.prometheus_port, shared=False)
    except CannotListen as error:
        raise CannotStart(f"cannot serve metrics on {error} (--prometheus-host, --prometheus-port)") from None


def _sockets(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    """Raises CannotListen."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise CannotListen(f"{host}: {getattr(error, 'strerror', None) or error}") from None
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        try:
            sockets.append(_listening_socket(family, address, shared=shared))
        except OSError as error:
            failure = error
            # `localhost` stands for ::1 too, which a machine without IPv6 does not have.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    else:
        if sockets:
            return sockets
    for sock in sockets:
        sock.close()
    reason = failure.strerror if failure else "it stands for no address"
    raise CannotListen(f"{host}:{port}: {reason}")


def _listening_socket(family: int, address: Any, *, shared: bool) -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(LISTEN_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def shown(sockets: Sequence[socket.socket]) -> str:
    """URLs, for the log."""
    return ", ".join("http://{}:{}".format(*_bracketed(sock)) for sock in sockets)


def _bracketed(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getsockname()[:2]
    return (f"[{host}]" if sock.family == socket.AF_INET6 else host), port
