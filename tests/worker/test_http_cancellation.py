"""Clients that leave, and an engine that dies: what runs is taken back, what waits is told."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.worker.byte_model import write_folder
from tests.worker.http_fixtures import RunningApp, running_app
from warmroute_worker import messages
from warmroute_worker.engine_client import Phase

if TYPE_CHECKING:
    from pathlib import Path


async def opened(app: RunningApp, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    content = json.dumps(body).encode()
    writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["long " * 50, "!hang"])
async def test_a_client_that_leaves_is_forgotten_at_once(tmp_path: Path, stream: bool, text: str) -> None:
    async with running_app(write_folder(tmp_path), step_seconds=0.02) as app:
        reader, writer = await opened(app, {"text": text, "stream": stream, "sampling_params": {"max_new_tokens": 250}})
        if stream and text != "!hang":
            await reader.readuntil(b"data: ")
        else:
            await app.until(lambda: len(app.driver.running) == 1)
        left = asyncio.get_running_loop().time()
        writer.close()
        await app.driver_has_received(messages.Abort)
        assert asyncio.get_running_loop().time() - left < 0.2
        await app.until(lambda: not app.driver.running)
        assert not app.service.engine.live
        assert (await app.client.get("/get_load")).json()[0]["num_reqs"] == 0


async def test_a_client_that_does_not_read_costs_nobody_else(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path), context_length=4000) as app:
        _, writer = await opened(
            app, {"text": "x" * 100, "stream": True, "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
        )
        await app.until(lambda: bool(app.driver.running) or bool(app.driver.received))
        assert (await app.post("/generate", text="quick")).json()["text"] == "quick"
        await app.until(lambda: not app.driver.running)
        assert (await app.post("/generate", text="quick")).json()["text"] == "quick"
        writer.transport.abort()


async def test_the_engines_death_ends_what_runs_with_an_error(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path), step_seconds=0.01) as app:
        streamed, stream_writer = await opened(app, {"text": "long " * 50, "stream": True})
        await streamed.readuntil(b"data: ")
        app.driver.paused.set()
        unary = asyncio.create_task(app.post("/generate", text="waits"))
        await app.until(lambda: len(app.driver.running) == 2)
        app.driver.sock.shutdown(socket.SHUT_RDWR)
        response = await unary
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_failed"
        rest = (await streamed.read()).decode()
        assert '"code": "engine_failed"' in rest
        assert not rest.endswith("0\r\n\r\n"), "no clean end"
        assert "[DONE]" not in rest
        stream_writer.close()
        assert app.service.engine.phase is Phase.FAILED
        assert (await app.client.get("/health")).status_code == 503


async def test_a_driver_that_sends_nonsense(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)  # asyncio reports the protocol's exception, too
        app.driver.sock.sendall(b"\xff" * 10)
        await app.until(lambda: app.service.engine.phase is Phase.FAILED)
        assert app.service.engine.failed_with_words
        assert "does not understand" in str(app.service.engine.failure)


async def test_idle_connections_are_kept(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        for _ in range(3):
            assert (await app.post("/generate", text="a")).status_code == 200
            assert (await app.client.get("/health")).status_code == 200
        assert (await app.client.get("/health", headers={"connection": "close"})).headers["connection"] == "close"
        async with httpx.AsyncClient() as other:
            assert "connection" not in (await other.get(app.url + "/health")).headers
