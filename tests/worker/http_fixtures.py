"""The HTTP side of a worker inside the test's own event loop, in front of a scripted driver."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import threading
from typing import TYPE_CHECKING, Any

import httpx
from aiohttp import web

from tests.worker.fake_driver import FakeDriver
from warmroute_worker._native import Region
from warmroute_worker.args import WorkerArgs
from warmroute_worker.engine_client import Phase
from warmroute_worker.http.app import make_runner
from warmroute_worker.http.process import load_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from warmroute_worker.http.service import Service


@dataclasses.dataclass
class RunningApp:
    service: Service
    driver: FakeDriver
    client: httpx.AsyncClient
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    async def driver_has_received(self, kind: type[object]) -> None:
        await self.until(lambda: any(isinstance(message, kind) for message in self.driver.received))

    async def post(self, path: str, **body: Any) -> httpx.Response:
        content = json.dumps(body)  # httpx itself cannot send a lone surrogate
        return await self.client.post(path, content=content, headers={"content-type": "application/json"})


@contextlib.asynccontextmanager
async def running_app(folder: Path, *, ready: bool = True, **driver_options: Any) -> AsyncIterator[RunningApp]:
    args = driver_options.pop("args", {})
    worker_args = WorkerArgs(model_path=str(folder), served_model_name="tiny", **args)
    layout = worker_args.layout
    ranks_fd = Region.memory_file(layout.world_size, layout.groups())
    service = load_service(worker_args, ranks_fd)
    os.close(ranks_fd)
    here, there = socket.socketpair()
    driver = FakeDriver(there, **driver_options)

    def run_driver() -> None:
        try:
            driver.run()
        except OSError:
            pass  # the test is over, or has cut the line
        there.close()

    thread = threading.Thread(target=run_driver)
    thread.start()
    runner = make_runner(service, 0.5)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    transport, _ = await asyncio.get_running_loop().create_unix_connection(lambda: service.engine.clients[0], sock=here)
    port = listener.getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            app = RunningApp(service, driver, client, port)
            if ready:
                await app.until(lambda: service.engine.phase is Phase.READY)
            yield app
    finally:
        service.engine.shut_down()
        await runner.cleanup()
        transport.close()
        await asyncio.to_thread(thread.join, 10)


def sse_data(text: str) -> list[str]:
    """The data of each event; fails on anything that is not one line of data and an empty one."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]
