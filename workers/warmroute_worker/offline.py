"""An engine without a server, for benchmarks and tests: this process is the driver, the other ranks its children."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from warmroute_worker import engine, rank_process
from warmroute_worker._native import Region
from warmroute_worker.args import WorkerArgs
from warmroute_worker.child_process import die_with_parent
from warmroute_worker.comm.rank_links import CollectiveError, RankLinks
from warmroute_worker.executor.model_runner import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from warmroute_worker.engine import Engine

JOIN_SECONDS = 10.0


@contextlib.contextmanager
def ranks(args: WorkerArgs, prepare: Callable[[], None] | None = None) -> Iterator[tuple[Engine, Region]]:
    """The driver's engine, and what the ranks say of themselves. They are gone when this ends.

    `prepare` is called in each of the others before it begins. Raises what `engine.load` raises.
    """
    layout = args.layout
    groups = layout.groups()
    fd = Region.memory_file(layout.world_size, groups)
    region = Region(fd, layout.world_size, groups)
    context = multiprocessing.get_context("forkserver")
    # Torch is imported once, by the process that all ranks are forked from.
    context.set_forkserver_preload(["warmroute_worker.rank_process"])
    children = []
    for rank in range(1, layout.world_size):
        target = (rank, args.to_json(), DupFd(fd), prepare)
        children.append(context.Process(target=_be_rank, args=target, daemon=True))
        children[-1].start()
    os.close(fd)
    try:
        region.set(0, "pid", os.getpid())
        backend = rank_process.torch_backend(args)
        links = RankLinks(layout.place(0), region, args.watchdog_timeout, usable_cores(), backend)
        loaded = engine.load(args, links)
        yield loaded, region
        with contextlib.suppress(CollectiveError):
            loaded.close()
    except BaseException as error:
        region.abort(f"the driver failed: {error}")
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for child in children:
            child.join(JOIN_SECONDS)
            child.kill()
            child.join()
            child.close()


def _be_rank(rank: int, args_json: str, fd: Any, prepare: Callable[[], None] | None) -> None:
    die_with_parent(os.getppid())
    if prepare is not None:
        prepare()
    args = WorkerArgs.from_json(args_json)
    region = Region(fd.detach(), args.layout.world_size, args.layout.groups())
    raise SystemExit(rank_process.run(args.layout.place(rank), args, region, None))
