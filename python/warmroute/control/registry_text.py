"""The registry as text: what a router that takes over a region (`--region-file`) must know of the workers in it.

Credentials are left out: the file outlives the router. Facts are, too: whoever answers is asked anew.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from warmroute.control.worker_spec import BadSpec, WorkerSpec, parse_spec

_FORMAT: Final = 1

Key = Literal["none", "router", "own"]
"""Whose key a worker is sent: none, the router's own, or one that its registration brought."""


@dataclass(frozen=True, slots=True)
class Record:
    worker_id: str
    spec: WorkerSpec
    """Without the key."""
    key: Key
    registered_unix_ms: int
    slots: tuple[int, ...]


def encode(records: Iterable[Record]) -> bytes:
    workers = [
        {
            "id": record.worker_id,
            "key": record.key,
            "registered_unix_ms": record.registered_unix_ms,
            "slots": record.slots,
            "spec": {
                "url": record.spec.url,
                "model_id": record.spec.model_id,
                "priority": record.spec.priority,
                "cost": record.spec.cost,
                "labels": dict(record.spec.labels),
                "disable_health_check": record.spec.disable_health_check,
            },
        }
        for record in records
    ]
    return json.dumps({"format": _FORMAT, "workers": workers}, separators=(",", ":")).encode()


def decode(text: bytes) -> list[Record]:
    """Raises ValueError when it is not what `encode` makes."""
    try:
        given: Any = json.loads(text)
        if given["format"] != _FORMAT:
            raise ValueError(f"format {given['format']!r}")
        return [
            Record(
                worker_id=worker["id"],
                spec=parse_spec(json.dumps(worker["spec"]).encode()),
                key=worker["key"],
                registered_unix_ms=worker["registered_unix_ms"],
                slots=tuple(worker["slots"]),
            )
            for worker in given["workers"]
        ]
    except (KeyError, TypeError, BadSpec) as error:
        raise ValueError(f"not a registry: {error!r}") from None
