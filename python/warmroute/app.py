"""Composition root: which processes a router is made of."""

import sys

import uvloop

from warmroute import one_process, supervisor
from warmroute.command_line import Settings
from warmroute.config import RouterConfig
from warmroute.control.check import check_workers
from warmroute.process import CannotStart, raise_open_files_limit, set_up_log


def run(settings: Settings) -> int:
    """A whole router, until it is told to stop; the exit status of the process."""
    prepare_process(settings.config)
    try:
        return uvloop.run(serve(settings, may_reexecute=True))
    except CannotStart as error:
        print(f"launch_router: error: {error}", file=sys.stderr)
        return 1


def check(config: RouterConfig) -> int:
    """Say what a start would find; the exit status."""
    print("launch_router: the configuration is valid")
    found = uvloop.run(check_workers(config))
    for _, line in found:
        print(f"launch_router: {line}")
    if not found:
        print("launch_router: no workers to start with; they join by POST /workers")
    return 0 if all(usable for usable, _ in found) else 1


def prepare_process(config: RouterConfig) -> None:
    """What is the process's, not the router's: its log and its limits."""
    set_up_log(config.log_level)
    raise_open_files_limit()


async def serve(settings: Settings, *, may_reexecute: bool = False) -> int:
    """Start, answer until SIGTERM or SIGINT, finish what runs. `may_reexecute`: this process is the router alone, and
    its command line is the router's. Raises CannotStart."""
    if settings.config.processes == 0 or sys.platform != "linux":
        return await one_process.serve(settings)
    return await supervisor.serve(settings, may_reexecute=may_reexecute)
