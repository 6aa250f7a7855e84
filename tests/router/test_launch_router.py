"""`launch_router` as a process: start, complaints, signals."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.fake_worker import FakeWorker
from tests.processes import free_port

CHAT = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}]}


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "warmroute.launch_router", "--host", "127.0.0.1", *flags]


@dataclass
class Router:
    process: subprocess.Popen[bytes]
    http: httpx.AsyncClient
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def ended(self, within_seconds: float) -> int:
        """Its exit status."""
        return await asyncio.to_thread(self.process.wait, within_seconds)

    async def ready(self) -> None:
        async with asyncio.timeout(10.0):
            while (await self.http.get("/readiness")).status_code != 200:
                await asyncio.sleep(0.05)


@asynccontextmanager
async def launched(tmp_path: Path, *flags: str) -> AsyncIterator[Router]:
    port = free_port()
    log_path = tmp_path / "router.log"
    flags = (*flags, "--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
    with log_path.open("wb") as log:
        process = subprocess.Popen(command(*flags), stderr=log, stdout=log)  # noqa: ASYNC220 (milliseconds)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10.0) as http:
            router = Router(process, http, log_path)
            async with asyncio.timeout(20.0):
                while not await _listens(port):
                    assert process.poll() is None, router.log
                    await asyncio.sleep(0.05)
            yield router
    finally:
        process.kill()
        process.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return False
    writer.close()
    return True


async def test_start_says_what_it_does_and_sigterm_ends_it(tmp_path: Path) -> None:
    async with FakeWorker() as worker, launched(tmp_path, "--worker-urls", worker.url, "--seed", "7") as router:
        await router.ready()
        assert (await router.http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert "http://127.0.0.1:" in router.log
        assert f"policy cache_aware; workers: {worker.url}" in router.log
        assert "prefix index: 16 MiB know about 167 MB" in router.log
        config = (await router.http.get("/config")).json()
        assert config["seed"] == {"value": 7, "origin": "command line"}
        assert config["hash_seed"] == {"value": "***", "origin": "drawn at start"}
        router.process.send_signal(signal.SIGTERM)
        assert await router.ended(5.0) == 0
        assert "SIGTERM" in router.log
        assert "Traceback" not in router.log


async def says_that_it_goes(url: str) -> None:
    """Whoever comes now learns that there is no use in waiting."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as newcomer:
        readiness = await newcomer.get("/readiness")
        assert (readiness.status_code, readiness.json()["reason"]) == (503, "draining")
        late = await newcomer.post("/v1/chat/completions", json=CHAT)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in late.headers


PROCESSES = pytest.mark.parametrize("processes", ["0", "1", "2"])


@PROCESSES
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_running_stream_is_finished(tmp_path: Path, number: signal.Signals, processes: str) -> None:
    flags = ("--processes", processes)
    async with FakeWorker() as worker, launched(tmp_path, "--worker-urls", worker.url, *flags) as router:
        await router.ready()
        worker.script.chunk_seconds, worker.script.chunks = 0.1, 10
        pieces: list[str] = []
        async with router.http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            async for piece in answer.aiter_text():
                if not pieces:
                    router.process.send_signal(number)
                    await asyncio.sleep(0.1)
                    await says_that_it_goes(str(router.http.base_url))
                pieces.append(piece)
        assert "".join(pieces).rstrip().endswith("data: [DONE]")
        assert await router.ended(5.0) == 0


@PROCESSES
async def test_second_signal_does_not_wait(tmp_path: Path, processes: str) -> None:
    flags = ("--processes", processes)
    async with FakeWorker() as worker, launched(tmp_path, "--worker-urls", worker.url, *flags) as router:
        await router.ready()
        worker.script.stall = True
        request = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT))
        await asyncio.sleep(0.3)
        router.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert router.process.poll() is None
        router.process.send_signal(signal.SIGTERM)
        assert await router.ended(3.0) == 0
        with pytest.raises(httpx.HTTPError):
            await request


@PROCESSES
async def test_grace_period_is_kept(tmp_path: Path, processes: str) -> None:
    flags = ("--shutdown-grace-period-secs", "0.5", "--processes", processes)
    async with FakeWorker() as worker, launched(tmp_path, "--worker-urls", worker.url, *flags) as router:
        await router.ready()
        worker.script.stall = True
        request = asyncio.create_task(router.http.post("/v1/chat/completions", json=CHAT))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        router.process.send_signal(signal.SIGTERM)
        assert await router.ended(5.0) == 0
        assert 0.4 < time.monotonic() - began < 3.0
        with pytest.raises(httpx.HTTPError):
            await request


async def test_control_app_and_data_plane_on_one_connection(tmp_path: Path) -> None:
    limits = httpx.Limits(max_connections=1)
    async with FakeWorker() as worker, launched(tmp_path, "--worker-urls", worker.url) as router:
        await router.ready()
        async with httpx.AsyncClient(base_url=router.http.base_url, trust_env=False, limits=limits) as http:
            for _ in range(10):
                assert (await http.get("/v1/models")).json()["data"][0]["id"] == "fake-model"
                assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
                assert (await http.get("/v1/chat/completions")).status_code == 405


async def test_registration_needs_the_key(tmp_path: Path) -> None:
    async with FakeWorker() as worker, launched(tmp_path, "--api-key", "k") as router:
        refused = await router.http.post("/workers", json={"url": worker.url})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        accepted = await router.http.post("/workers", json={"url": worker.url}, headers={"authorization": "Bearer k"})
        assert accepted.status_code == 202
        await router.ready()
        # The worker has no key of its own: the router's must not reach it.
        answer = await router.http.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer k"})
        assert answer.status_code == 200
        assert worker.record.requests[-1].header("authorization") is None


def test_complaints_about_addresses() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port], "cannot listen on 127.0.0.1"),
            (["--port", str(free_port()), "--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
            (["--port", str(free_port()), "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
            (["--port", str(free_port()), "--prometheus-port", port], "cannot serve metrics on 0.0.0.0"),
            (["--port", "0"], "port: 0 must be between"),
        ]
        for flags, complaint in cases:
            ended = subprocess.run(command(*flags), capture_output=True, text=True, timeout=20, env=dict(os.environ))
            assert ended.returncode != 0, flags
            assert ended.stderr.count("\n") == 1, ended.stderr
            assert f"launch_router: error: {complaint}" in ended.stderr


async def test_check_says_what_a_start_would_find() -> None:
    async with FakeWorker(models=("m", "alias"), dp_size=2) as worker:

        async def checked(*flags: str) -> tuple[int | None, str, str]:
            process = await asyncio.create_subprocess_exec(
                *command("--check", *flags), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            out, err = await process.communicate()
            return process.returncode, out.decode(), err.decode()

        status, out, err = await checked("--worker-urls", worker.url)
        assert (status, err) == (0, "")
        assert "the configuration is valid\n" in out
        assert f"{worker.url}: sglang, serves m, alias; 2 dp ranks, each with " in out
        status, out, _ = await checked("--worker-urls", worker.url, "http://127.0.0.1:9")
        assert status == 1
        assert "http://127.0.0.1:9: cannot be used now: cannot connect" in out
        status, out, err = await checked("--cache-threshold", "7")
        assert (status, out) == (2, "")
        assert "cache_threshold" in err
        assert (await checked())[0] == 0
