"""Which network interface has an address: gloo and NCCL want its name. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_NAME_BYTES, _ADDRESS_AT = 15, 20


def environment_of(address: str) -> dict[str, str]:
    """What makes torch's libraries use the interface through which the nodes have found each other."""
    name = interface_of(address)
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}


def interface_of(address: str) -> str | None:
    """None: no interface has it as its first IPv4 address (Linux)."""
    if address.startswith("127."):
        return "lo"
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:_NAME_BYTES])
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[_ADDRESS_AT : _ADDRESS_AT + 4]) == address:
                    return name
    return None
