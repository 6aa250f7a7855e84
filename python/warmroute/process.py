"""What belongs to a process of the router and to no part of it: its log, its limits, its end."""

import ctypes
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Two connections per request; the usual soft limit of 1,024 would be reached by 500 clients.
WANTED_OPEN_FILES = 1 << 20


class CannotStart(Exception):  # noqa: N818
    """One line for the user: what cannot be had, and what to do."""


_LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_PR_SET_PDEATHSIG = 1


def set_up_log(level: str, name: str = "") -> None:
    """`name` tells the processes of one router apart."""
    shown = f" [{name}]" if name else ""
    logging.basicConfig(
        level=_LOG_LEVELS[level], format=f"%(asctime)s %(levelname)s{shown} %(name)s: %(message)s", stream=sys.stderr
    )
    # It logs every request at INFO: each probe would be a line.
    logging.getLogger("httpx").setLevel(max(_LOG_LEVELS[level], logging.WARNING))


def raise_open_files_limit() -> int:
    """As far as the system lets us; the limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return WANTED_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


@contextmanager
def inherited(descriptors: Iterable[int]) -> Iterator[None]:
    """Whatever program is started meanwhile gets these, the standard streams, and nothing else: libraries open
    descriptors that would go along, and a socket that somebody else has open, too, never ends. Linux."""
    wanted = {0, 1, 2, *descriptors}
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 (names, not paths)
        try:
            os.set_inheritable(fd, fd in wanted)
        except OSError:  # that of the listing itself
            pass
    try:
        yield
    finally:
        for fd in wanted - {0, 1, 2}:
            os.set_inheritable(fd, False)


def die_with(parent: int) -> None:
    """Be killed when `parent`, which has started this process, ends. Linux."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        sys.exit(1)
