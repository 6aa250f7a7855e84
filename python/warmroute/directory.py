"""Where the worker behind a slot is reached. Control writes it, the data plane reads it, once per attempt."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from warmroute.directory_board import Board

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

    @property
    def key(self) -> str | None:
        return self.authorization.removeprefix(b"Bearer ").decode() if self.authorization else None

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


@dataclass(frozen=True, slots=True)
class _Entry:
    incarnation: int
    address: WorkerAddress
    models: tuple[str, ...]


class Directory:
    """Slot -> address and models. The prefix index and the loads are the core's.

    With a board, other processes have it, too: `publish` before a worker can be chosen, so that whoever is told a slot
    finds its worker.
    """

    def __init__(self, board: Board | None = None, *, is_writer: bool = True) -> None:
        self._board = board
        self._entries: dict[int, _Entry] = {}
        self._is_published = True
        # Of another process's board, to see at once when there is something new.
        self._version = board.version if board is not None and not is_writer else None
        self._seen = 0

    # -- the data plane's side

    def address(self, slot: int, incarnation: int | None = None) -> WorkerAddress | None:
        """None: the worker left between `select` and now; the attempt counts as CONNECT_FAILED.

        `incarnation`: of the worker that was chosen; another one may have the slot by now.
        """
        if self._version is not None and self._version[0] != self._seen:
            self._refresh()
        entry = self._entries.get(slot)
        if entry is None or (incarnation is not None and incarnation != entry.incarnation):
            return None
        return entry.address

    def models(self) -> list[str]:
        """Every name that some worker serves, for messages."""
        if self._version is not None and self._version[0] != self._seen:
            self._refresh()
        return sorted({name for entry in self._entries.values() for name in entry.models})

    # -- the control plane's side

    def put(
        self, slots: Iterable[int], address: WorkerAddress, models: tuple[str, ...], incarnations: Iterable[int]
    ) -> None:
        for slot, incarnation in zip(slots, incarnations, strict=True):
            self._entries[slot] = _Entry(incarnation, address, models)
        self._is_published = False

    def remove(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._entries.pop(slot, None)
        self._is_published = False

    def publish(self) -> None:
        """To the other processes, if something has changed. Raises BoardFull."""
        if self._board is None or self._is_published:
            return
        by_worker: dict[str, list[Any]] = {}
        for slot, entry in self._entries.items():
            address = entry.address
            worker = by_worker.setdefault(address.worker_id, [address.worker_id, address.url, address.key, [], []])
            worker[3] = entry.models
            worker[4].append((slot, entry.incarnation))
        self._board.write(json.dumps(list(by_worker.values()), separators=(",", ":")).encode())
        self._is_published = True

    def _refresh(self) -> None:
        assert self._board is not None
        self._seen, text = self._board.read()
        entries = {}
        for worker_id, url, key, models, slots in json.loads(text or b"[]"):
            address = WorkerAddress.of(worker_id, url, key)
            for slot, incarnation in slots:
                entries[slot] = _Entry(incarnation, address, tuple(models))
        self._entries = entries


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
