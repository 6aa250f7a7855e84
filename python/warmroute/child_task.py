"""What the supervisor tells a data process at its start: a memory file whose descriptor is its only argument."""

import dataclasses
import json
import os
from typing import Any

from warmroute.config import RouterConfig


@dataclasses.dataclass(frozen=True, slots=True)
class ChildTask:
    config: RouterConfig
    process: int
    """Its column of the region."""
    columns: int
    siblings: int
    """How many data processes share what is limited."""
    supervisor_pid: int
    start_ns: int
    """The zero of recorded times."""
    # Descriptors.
    region: int
    slab: int
    board: int
    doorbell: int
    channel: int
    listeners: tuple[int, ...]

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (self.region, self.slab, self.board, self.doorbell, self.channel, *self.listeners)


def write_task(task: ChildTask) -> int:
    """Its descriptor. The configuration has keys in it, so nobody else gets to see it."""
    return json_file("warmroute-task", dataclasses.asdict(task))


def read_task(fd: int) -> ChildTask:
    values = read_json_file(fd)
    config = {name: _frozen(value) for name, value in values.pop("config").items()}
    listeners = tuple(values.pop("listeners"))
    return ChildTask(config=RouterConfig(**config), listeners=listeners, **values)


def json_file(name: str, value: object) -> int:
    """The descriptor of a memory file with that in it."""
    fd = os.memfd_create(name)
    with os.fdopen(os.dup(fd), "w") as file:
        json.dump(value, file)
    return fd


def read_json_file(fd: int) -> Any:
    """And close it."""
    with os.fdopen(fd) as file:
        file.seek(0)
        return json.load(file)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
