"""What a rank's process does: the driver serves requests, the others follow it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

# By default torch's threads spin between operations. When another process wants the core, that delays the very thread
# they wait for: decode on 2 busy cores was 11 times slower than with threads that sleep. OpenMP reads this once, when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from warmroute_worker import driver, engine
from warmroute_worker.comm.rank_links import CollectiveError, OtherNodes, RankLinks
from warmroute_worker.executor import ranks
from warmroute_worker.executor.model_runner import usable_cores
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    import socket

    from warmroute_worker._native import Region
    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.node_links import NodeLinks
    from warmroute_worker.topology import Place

log = logging.getLogger("warmroute_worker.rank")

PEER_GRACE_SECONDS = 5.0
"""Ranks wait for each other so much longer than the supervisor's watchdog does: it sees which one it is that hangs, and
they see only who did not come."""


def run(
    place: Place, args: WorkerArgs, region: Region, sock: socket.socket | None, node_links: NodeLinks | None = None
) -> int:
    """Until there is nothing more to do. `sock`: a driver's, to the HTTP process. Returns the exit status."""
    timeout = args.watchdog_timeout + PEER_GRACE_SECONDS
    region.set(place.rank, "pid", os.getpid())
    try:
        node = None if args.nnodes == 1 or node_links is None else OtherNodes(args.nodes, node_links)
        links = RankLinks(place, region, timeout, usable_cores(), torch_backend(args), node)
    except CollectiveError:
        return 1  # everybody has been told
    if args.enable_p2p_check:
        try:
            reach = links.measure_reach()
        except CollectiveError as error:
            reach = str(error)
            links.abort(reach)
        if place.rank == 0:
            log.warning("%s", reach)
    return _follow(args, links) if sock is None else driver.main(sock, args, links)


def torch_backend(args: WorkerArgs) -> str | None:
    """Which of torch's libraries adds up, if it is not shared memory."""
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    if on_cuda and torch.cuda.device_count() >= len(args.nodes.local_ranks):
        return "nccl"
    # On fewer devices than ranks NCCL refuses to work, and shared memory does.
    return "gloo" if args.disable_custom_all_reduce else None


def _follow(args: WorkerArgs, links: RankLinks) -> int:
    try:
        folder, config = engine.read_model(args)
        rank = ranks.start(folder, config, args, links)
        with ranks.settled():
            ranks.follow(rank, links)
    except (CollectiveError, StartupError, LookupError):
        return 1  # everybody has been told, by this rank or by another
    except Exception as error:
        log.exception("%s failed", links.place)
        links.abort(f"{links.place} failed: {ranks.failure(error)}")
        return 1
    return 0
