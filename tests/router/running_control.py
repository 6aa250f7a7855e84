"""A control plane as the router runs it, reached over TCP through its `control_upstream`."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.processes import free_port
from warmroute._core import Core
from warmroute.command_line import Settings
from warmroute.config import RouterConfig
from warmroute.control.control_plane import ControlPlane
from warmroute.directory import Directory
from warmroute.engine import build_core
from warmroute.listening import metrics_sockets


@dataclass
class RunningControl:
    core: Core
    directory: Directory
    plane: ControlPlane
    http: httpx.AsyncClient
    config: RouterConfig
    running: dict[str, list[tuple[str, str]]]
    """What a data plane would say of who has a request."""

    async def register(self, url: str, **fields: Any) -> str:
        """The id of a worker that was accepted."""
        answer = await self.http.post("/workers", json={"url": url, **fields})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["worker_id"])

    async def info(self, worker_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/workers/{worker_id}")
        assert answer.status_code == 200, answer.text
        info: dict[str, Any] = answer.json()
        return info

    async def reaches(self, worker_id: str, status: str, within_seconds: float = 5.0) -> dict[str, Any]:
        """Waits until the worker has that status; its info."""
        async with asyncio.timeout(within_seconds):
            while (info := await self.info(worker_id))["status"] != status:
                await asyncio.sleep(0.02)
        return info


@asynccontextmanager
async def running_control(**fields: Any) -> AsyncIterator[RunningControl]:
    """`fields` are those of RouterConfig."""
    given: dict[str, Any] = {
        "prometheus_host": "127.0.0.1",
        "prometheus_port": free_port(),
        "seed": 1,
        "hash_seed": 2,
    } | fields
    config = RouterConfig(**given)
    settings = Settings(config, dict.fromkeys(RouterConfig.__slots__, "default"))
    core, directory = build_core(config), Directory()
    found: dict[str, list[tuple[str, str]]] = {}

    async def find_request(request_id: str) -> list[tuple[str, str]]:
        return found.get(request_id, [])

    plane = ControlPlane(settings, core, directory, metrics_sockets(config), find_request)
    await plane.start()
    try:
        async with (
            _tcp_front(plane.control_upstream) as url,
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=10.0) as http,
        ):
            yield RunningControl(core, directory, plane, http, config, found)
    finally:
        await plane.close()
        core.check_integrity()


@asynccontextmanager
async def _tcp_front(upstream: Callable[[], Awaitable[socket.socket]]) -> AsyncIterator[str]:
    """Pumps bytes between TCP clients and upstream sockets: the data plane without its opinions."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(sock=await upstream())
        await asyncio.gather(pump(reader, upstream_writer), pump(upstream_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
