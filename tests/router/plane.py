"""A data plane on a real socket with fake workers behind it and a small control app: what the data plane's tests run
on.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic_ns
from typing import Any

import httpx
from aiohttp import web

from tests.fake_worker import FakeWorker
from warmroute._core import Core
from warmroute.config import RouterConfig
from warmroute.dataplane import DataPlane
from warmroute.directory import Directory, WorkerAddress
from warmroute.engine import build_core


@dataclass
class Plane:
    """The parts, and a client bound to the plane's port."""

    plane: DataPlane
    core: Core
    directory: Directory
    client: httpx.AsyncClient
    port: int

    def add(self, worker: FakeWorker, authorization: bytes | None = None) -> list[int]:
        """Register a worker as ready, as control does after its probes."""
        facts = worker.facts
        slots = self.core.add_worker(list(facts.models), facts.dp_size, facts.kv_tokens, None, monotonic_ns())
        self.directory.put(
            slots,
            WorkerAddress(
                worker_id=f"id-{worker.port}",
                url=worker.url,
                host=worker.host,
                port=worker.port,
                tls=False,
                host_header=f"{worker.host}:{worker.port}".encode(),
                authorization=authorization,
            ),
            facts.models,
            [self.core.target(slot).incarnation for slot in slots],
        )
        for _ in range(2):
            self.core.observe_probe(slots[0], True, monotonic_ns())
        return slots

    def loads(self) -> int:
        return sum(target.load for target in self.core.targets())

    async def quiet(self) -> None:
        """Wait until nothing is in flight."""
        for _ in range(200):
            if not self.plane.active_requests and not self.loads():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"still in flight: {self.plane.active_requests} requests, loads {self.loads()}")

    async def raw(self, *pieces: bytes, until: bytes = b"", seconds: float = 5.0) -> bytes:
        """Send bytes on a connection of their own; read until `until` has come, or until the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            got = b""
            async with asyncio.timeout(seconds):
                while not (until and until in got):
                    data = await reader.read(65536)
                    if not data:
                        break
                    got += data
            return got
        finally:
            writer.close()


async def _echo(request: web.Request) -> web.Response:
    """The control app of these tests: says what reached it."""
    body = await request.read()
    return web.json_response(
        {"method": request.method, "path": request.path_qs, "body": body.decode(), "headers": dict(request.headers)}
    )


@asynccontextmanager
async def running(workers: Sequence[FakeWorker] = (), **config: Any) -> AsyncIterator[Plane]:
    """`config`: fields of RouterConfig."""
    loop = asyncio.get_running_loop()
    settings = replace(RouterConfig(seed=1, hash_seed=1), **config)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", _echo)
    runner = web.AppRunner(app)
    await runner.setup()
    assert runner.server is not None
    server = runner.server

    async def control_upstream() -> socket.socket:
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        await loop.connect_accepted_socket(server, far)
        return near

    core = build_core(settings)
    directory = Directory()
    plane = DataPlane(settings, core, directory, control_upstream)
    listener = await loop.create_server(plane.protocol_factory, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        result = Plane(plane, core, directory, client, port)
        for worker in workers:
            result.add(worker)
        try:
            yield result
            await result.quiet()
            core.check_integrity()
        finally:
            listener.close()
            plane.close()
            await asyncio.sleep(0)
            await runner.cleanup()
