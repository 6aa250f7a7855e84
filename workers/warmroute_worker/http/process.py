"""The process that serves HTTP: `python -m warmroute_worker.http.process`, started by the supervisor only.

Imports no torch. It answers from its first moment (503 until the driver is ready) to the end of its last request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from aiohttp import web

from warmroute_worker import model_folder
from warmroute_worker._native import Region
from warmroute_worker.args import WorkerArgs
from warmroute_worker.chat import ChatTemplate
from warmroute_worker.child_process import StatusPipe, die_with_parent, leave_signals_to_parent
from warmroute_worker.data_parallel import DataParallelController
from warmroute_worker.engine_client import EngineClient, Phase
from warmroute_worker.http.app import make_runner
from warmroute_worker.http.kv_publisher import PublisherError, publisher
from warmroute_worker.http.service import Service
from warmroute_worker.metrics import Buckets, Metrics
from warmroute_worker.rank_statuses import RankStatuses
from warmroute_worker.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

LAST_WORDS_SECONDS = 1.0
"""After the engine's death: running requests get their errors and health checks their 503 before the port closes."""
FLUSH_SECONDS = 1.0
"""For answers that are complete but not yet written when the process ends."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--engine-fds", required=True, help="this process's ends of the socket pairs, by rank")
    parser.add_argument("--listener-fd", type=int, required=True)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--ranks-fd", type=int, required=True, help="the memory that the ranks share")
    parser.add_argument("--worker-args", type=WorkerArgs.from_json, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent_pid)
    leave_signals_to_parent()
    args: WorkerArgs = options.worker_args
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    status = StatusPipe(options.status_fd)
    try:
        service = load_service(args, options.ranks_fd)
    except (LookupError, ValueError) as error:
        status.failed(str(error))
        return 1
    listener = socket.socket(fileno=options.listener_fd)
    engine_sockets = [socket.socket(fileno=int(fd)) for fd in options.engine_fds.split(",")]
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve(service, listener, engine_sockets, status))


def load_service(args: WorkerArgs, ranks_fd: int) -> Service:
    """The text side of the model. `ranks_fd`: the memory that the ranks share.

    Raises LookupError or ValueError with one line.
    """
    folder = model_folder.resolve(args.model_path)
    buckets = Buckets(args.bucket_time_to_first_token, args.bucket_inter_token_latency, args.bucket_e2e_request_latency)
    metrics = Metrics(args.served_model_name, args.layout, buckets)
    engine = DataParallelController(metrics, args.dp_size, args.effective()["load_balance_method"])
    metrics.follow(lambda: [client.current_load() for client in engine.clients], time.monotonic)
    ranks = RankStatuses(args.nodes, Region(ranks_fd, args.layout.world_size, args.nodes.local_groups()))
    metrics.follow_ranks(ranks)
    return Service(
        args=args,
        tokenizer=Tokenizer.from_folder(folder),
        chat_template=ChatTemplate.from_folder(folder),
        engine=engine,
        metrics=metrics,
        ranks=ranks,
        created=int(time.time()),
    )


async def serve(
    service: Service, listener: socket.socket, engine_sockets: list[socket.socket], status: StatusPipe
) -> int:
    """Until SIGTERM (0) or the engine's death (1)."""
    loop = asyncio.get_running_loop()
    engine = service.engine
    drain = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, drain.set)
    runner = make_runner(service, FLUSH_SECONDS)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    publishing = contextlib.ExitStack()
    try:
        publishing.enter_context(
            publisher(service.args.kv_events_config, [client.kv_events for client in engine.clients])
        )
    except PublisherError as error:
        status.failed(str(error))
        await runner.cleanup()
        return 1
    for client, sock in zip(engine.clients, engine_sockets, strict=True):
        # A driver on another node is reached over TCP, one here over a socket pair.
        connect = loop.create_unix_connection if sock.family == socket.AF_UNIX else loop.create_connection
        await connect(functools.partial(_itself, client), sock=sock)
    watching = asyncio.create_task(_watch(engine, status))
    draining = asyncio.create_task(_drain(service, drain))
    try:
        await asyncio.wait((watching, draining), return_when=asyncio.FIRST_COMPLETED)
        if not watching.done():
            engine.shut_down()
            return 0
        if watching.result() is not Phase.STARTING:
            await asyncio.sleep(LAST_WORDS_SECONDS)
        return 1
    finally:
        for task in (watching, draining):
            task.cancel()
        publishing.close()
        await runner.cleanup()


def _itself(client: EngineClient) -> EngineClient:
    return client


async def _watch(engine: DataParallelController, status: StatusPipe) -> Phase:
    """Reports what becomes of the engine; returns at its end with the phase in which that happened."""
    before = engine.phase
    while True:
        await engine.phase_changed.wait()
        engine.phase_changed.clear()
        if engine.phase is Phase.FAILED:
            if engine.failed_with_words:
                status.failed(str(engine.failure))
            return before
        before = engine.phase
        if engine.phase is Phase.READY and engine.facts is not None:
            facts = engine.facts
            sums = f", sums by {facts.collectives}" if facts.collectives != "none" else ""
            ranks = f"{facts.layout}{sums}, " if facts.layout else ""
            status.ready(
                f"{facts.model_type} on {facts.device}, {facts.dtype}, {ranks}context {facts.context_length} tokens, "
                f"KV pool {facts.max_total_tokens} tokens"
            )


async def _drain(service: Service, told: asyncio.Event) -> None:
    """Once told: takes no more requests, and returns when the last is answered or has had its `drain_timeout`."""
    await told.wait()
    service.draining = True
    try:
        async with asyncio.timeout(service.args.drain_timeout):
            await service.engine.wait_until_idle()
    except TimeoutError:
        pass
    service.engine.fail_all("the worker is shutting down and this request did not finish in time")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop


if __name__ == "__main__":
    sys.exit(main())
