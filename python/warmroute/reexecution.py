"""SIGHUP: the supervisor becomes a new program without ending. What it leaves to itself, and how.

The memory file with the state, and every descriptor that is named in it, stay open over the exec; the children, who
know nothing of it, go on serving. Signals wait until the new program is ready for them.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from warmroute.child_task import json_file, read_json_file
from warmroute.children import ChildRecord
from warmroute.process import inherited

HANDOVER_VARIABLE = "WARMROUTE_HANDOVER_FD"
CHECK_CONFIG_FLAG = "--check-config"
_VALIDATION_SECONDS = 60.0
_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    seeds: dict[str, int]
    """Those that were drawn."""
    columns: int
    start_ns: int
    region: int
    slab: int
    board: int
    doorbell: int
    listeners: list[list[int]]
    metrics: list[int]
    children: list[ChildRecord]
    control: dict[str, Any]
    """See `ControlPlane.leave`."""

    @property
    def descriptors(self) -> Iterable[int]:
        yield from (self.region, self.slab, self.board, self.doorbell, *self.metrics)
        for seat in self.listeners:
            yield from seat
        for child in self.children:
            yield from (child.slab_fd, child.channel_fd)


async def why_not() -> str | None:
    """Why the program as it is on disk now would not start; None: it would."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "warmroute.launch_router",
        CHECK_CONFIG_FLAG,
        *sys.argv[1:],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_VALIDATION_SECONDS):
            _, complaint = await process.communicate()
    except TimeoutError:
        process.kill()
        return f"it did not check its configuration within {_VALIDATION_SECONDS:g} s"
    if process.returncode == 0:
        return None
    lines = complaint.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"status {process.returncode}"


def reexecute(handover: Handover) -> NoReturn:
    """Raises OSError when the interpreter cannot be run; then nothing has changed."""
    fd = json_file("warmroute-handover", asdict(handover))
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with inherited((fd, *handover.descriptors)):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {HANDOVER_VARIABLE: str(fd)})
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(fd)


def handed_over() -> Handover | None:
    """What the program before left in this process; None: it is a start like any other."""
    fd = os.environ.pop(HANDOVER_VARIABLE, None)
    if fd is None:
        return None
    values = read_json_file(int(fd))
    values["children"] = [ChildRecord(**child) for child in values["children"]]
    handover = Handover(**{field.name: values[field.name] for field in fields(Handover)})
    for one in handover.descriptors:
        os.set_inheritable(one, False)
    return handover


def take_signals() -> None:
    """Those that came meanwhile are delivered now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
