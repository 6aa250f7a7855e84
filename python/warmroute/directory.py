"""Where the worker behind a slot is reached. Control writes it, the data plane reads it, once per attempt."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Everything that one attempt needs to know of a worker, in the form in which it goes on the wire."""

    worker_id: str
    url: str
    """`scheme://host:port` as `parse_worker_url` returns it."""
    host: str
    """For connecting: without the brackets of an IPv6 literal."""
    port: int
    tls: bool
    host_header: bytes
    authorization: bytes | None
    """`Bearer KEY`, for a worker that has a key of its own; None: the client's header stays."""

    @classmethod
    def of(cls, worker_id: str, url: str, api_key: str | None) -> "WorkerAddress":
        """Raises ValueError, with a message for the user, when `url` is not a worker's."""
        url = parse_worker_url(url)
        parts = urlsplit(url)
        assert parts.hostname is not None  # parse_worker_url saw it
        return cls(
            worker_id=worker_id,
            url=url,
            host=parts.hostname,
            port=parts.port or _DEFAULT_PORTS[parts.scheme],
            tls=parts.scheme == "https",
            host_header=parts.netloc.encode("ascii"),
            authorization=f"Bearer {api_key}".encode() if api_key else None,
        )


class Directory:
    """Slot -> address and models. One event loop, no lock; the prefix index and the loads are the core's."""

    def __init__(self) -> None:
        self._addresses: dict[int, WorkerAddress] = {}
        self._models: dict[int, tuple[str, ...]] = {}

    def address(self, slot: int) -> WorkerAddress | None:
        """None: the worker left between `select` and now; the attempt counts as CONNECT_FAILED."""
        return self._addresses.get(slot)

    def models(self) -> list[str]:
        """Every name that some worker serves, for messages."""
        return sorted({name for names in self._models.values() for name in names})

    def put(self, slots: Iterable[int], address: WorkerAddress, models: tuple[str, ...]) -> None:
        for slot in slots:
            self._addresses[slot] = address
            self._models[slot] = models

    def remove(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._addresses.pop(slot, None)
            self._models.pop(slot, None)


def parse_worker_url(text: str) -> str:
    """`http://host:port` without a trailing slash; a bare `host:port` is taken as http, as sglang-router does.

    Raises ValueError whose message says what is wrong. A path, a query or a user name is refused: it would be
    lost, because the client's own path is what is sent to the worker.
    """
    text = text.strip()
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is not a worker URL: {error}") from None
    scheme = parts.scheme
    if scheme not in _DEFAULT_PORTS or not url.startswith(f"{scheme}://"):
        raise ValueError(f"{text!r} is not a worker URL: the scheme must be http or https")
    if not host or not host.isascii() or any(c.isspace() or not c.isprintable() for c in host):
        raise ValueError(f"{text!r} is not a worker URL: it has no usable host")
    if port == 0:
        raise ValueError(f"{text!r} is not a worker URL: the port must be between 1 and 65535")
    if parts.username is not None or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"{text!r} is not a worker URL: expected scheme://host:port and nothing more")
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}" if port is None else f"{scheme}://{shown}:{port}"
