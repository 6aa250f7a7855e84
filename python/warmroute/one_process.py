"""A router that is one process: control plane and data plane on one loop (`--processes 0`, and where there is no
Linux)."""

import asyncio
import logging
import signal
from time import monotonic_ns

from warmroute.command_line import Settings
from warmroute.control.control_plane import ControlPlane
from warmroute.dataplane import DataPlane
from warmroute.directory import Directory
from warmroute.listening import LISTEN_BACKLOG, clients_sockets, metrics_sockets
from warmroute.service_manager import notify
from warmroute.startup import check_files, log_start, new_core, with_seeds

log = logging.getLogger(__name__)


async def serve(settings: Settings) -> int:
    """Start, answer until SIGTERM or SIGINT, finish what runs; the exit status. Raises CannotStart."""
    settings = with_seeds(settings)
    config = settings.config
    check_files(config)
    core, directory = new_core(settings), Directory()
    sockets = clients_sockets(config, 1)[0]

    async def find_request(request_id: str) -> list[tuple[str, str]]:
        return data_plane.find(request_id)

    control = ControlPlane(settings, core, directory, metrics_sockets(config), find_request)
    data_plane = DataPlane(config, core, directory, control.control_upstream)
    servers: list[asyncio.Server] = []
    try:
        await control.start()
        loop = asyncio.get_running_loop()
        factory = data_plane.protocol_factory
        servers = [await loop.create_server(factory, sock=sock, backlog=LISTEN_BACKLOG) for sock in sockets]
        log_start(config, sockets, 1)
        notify("READY=1")
        await _until_stopped(data_plane, config.shutdown_grace_period_secs)
    finally:
        for server in servers:
            server.close()
        data_plane.close()
        await control.close()
    return 0


async def _until_stopped(data_plane: DataPlane, grace_seconds: float) -> None:
    """Wait for the first signal, drain; a second one cuts the draining short."""
    signals: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    name = await signals.get()
    notify("STOPPING=1")
    log.info("%s: finishing %d requests, at most %g s", name, data_plane.active_requests, grace_seconds)
    draining = asyncio.create_task(data_plane.drain(grace_seconds))
    second = asyncio.create_task(signals.get())
    began_ns = monotonic_ns()
    await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        log.warning("%s again: %d requests are cut off", second.result(), data_plane.active_requests)
    for task in (draining, second):
        task.cancel()
    await asyncio.gather(draining, second, return_exceptions=True)
    log.info("stopped after %.1f s", (monotonic_ns() - began_ns) / 1e9)
