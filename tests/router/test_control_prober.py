"""Workers that come, go, hang, restart and lie, watched by a running control plane."""

import asyncio
import logging
import time
from typing import Any

import pytest

from tests.fake_worker import FakeWorker
from tests.processes import free_port
from tests.router.running_control import RunningControl, running_control
from warmroute._core import OutcomeKind

FAST = {"health_check_interval_secs": 0.2, "health_check_timeout_secs": 0.5}


def fail_one_request(control: RunningControl) -> None:
    """As the data plane does when a worker refuses its connection."""
    now_ns = time.monotonic_ns()
    request = control.core.read(b"/generate", b"", b'{"text": "hello"}', now_ns)
    lease = control.core.select(request, now_ns, False)
    assert lease is not None
    lease.release(OutcomeKind.CONNECT_FAILED, 0, -1, None, None, -1, -1, -1, time.monotonic_ns())
    request.finish(502, -1, time.monotonic_ns())


async def test_dead_worker_is_left_out_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_control(**FAST) as control, FakeWorker() as worker:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        asked = worker.record.other_paths["/server_info"]
        await worker.stop()
        info = await control.reaches(worker_id, "not_ready", 3.0)
        assert (info["is_healthy"], info["targets"][0]["available"]) == (False, False)
        assert "cannot connect" in info["last_failure"]
        await worker.start()
        began = time.monotonic()
        info = await control.reaches(worker_id, "ready")
        assert time.monotonic() - began < 2.0
        assert info["last_failure"] is None
        # It may be another process with another model by now: it was asked again, once.
        assert worker.record.other_paths["/server_info"] == asked + 1
        await worker.stop()
    text = caplog.text
    assert f"worker {worker.url}: health pending -> ready" in text
    assert f"worker {worker.url}: health ready -> unhealthy (cannot connect" in text
    assert f"worker {worker.url}: health unhealthy -> ready" in text


async def test_failed_request_has_its_worker_probed_at_once() -> None:
    """With an hour between checks, nothing else would find out."""
    async with running_control(health_check_interval_secs=3600.0) as control, FakeWorker() as worker:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        await worker.stop()
        await asyncio.sleep(0.3)
        assert (await control.info(worker_id))["status"] == "ready"
        fail_one_request(control)
        began = time.monotonic()
        await control.reaches(worker_id, "not_ready")
        assert time.monotonic() - began < 1.0
        await worker.start()
        began = time.monotonic()
        await control.reaches(worker_id, "ready")
        assert time.monotonic() - began < 2.0
        await worker.stop()


async def test_restart_makes_the_core_forget_its_cache() -> None:
    async with running_control(**FAST) as control, FakeWorker() as worker:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        now_ns = time.monotonic_ns()
        body = b'{"text": "%b"}' % (b"a long text to remember " * 100)
        request = control.core.read(b"/generate", b"", body, now_ns)
        lease = control.core.select(request, now_ns, False)
        assert lease is not None
        lease.release(OutcomeKind.ANSWERED, 200, now_ns, None, None, 600, 1, 0, now_ns)
        request.finish(200, now_ns, now_ns)
        (target,) = (await control.info(worker_id))["targets"]
        assert target["index_characters"] > 2000
        await worker.stop()
        await control.reaches(worker_id, "not_ready")
        await worker.start()
        info = await control.reaches(worker_id, "ready")
        assert info["targets"][0]["index_characters"] == 0
        await worker.stop()


async def test_restart_with_other_ranks_and_another_model() -> None:
    async with running_control(**FAST) as control:
        port = free_port()
        first = FakeWorker(models=("old",))
        await first.start(port=port)
        worker_id = await control.register(first.url)
        await control.reaches(worker_id, "ready")
        await first.stop()
        await control.reaches(worker_id, "not_ready")
        second = FakeWorker(models=("new",), dp_size=3)
        await second.start(port=port)
        info = await control.reaches(worker_id, "ready")
        assert (info["model_id"], info["dp_size"], len(info["targets"])) == ("new", 3, 3)
        assert control.directory.models() == ["new"]
        assert len(control.core.targets()) == 3
        await second.stop()


async def test_sick_worker() -> None:
    async with running_control(**FAST) as control, FakeWorker() as worker:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        worker.script.health_status = 503
        info = await control.reaches(worker_id, "not_ready", 3.0)
        assert info["last_failure"] == "GET /health answered 503"
        worker.script.health_status = 200
        await control.reaches(worker_id, "ready", 2.0)
        # It never refused a connection, so it is the same process with the same cache.
        assert worker.record.other_paths["/server_info"] == 1


async def test_one_bad_check_is_not_the_end() -> None:
    async with running_control(**FAST) as control, FakeWorker() as worker:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        checks = worker.record.other_paths["/health"]
        worker.script.health_status = 500
        while worker.record.other_paths["/health"] == checks:
            await asyncio.sleep(0.005)
        worker.script.health_status = 200
        for _ in range(20):
            assert (await control.info(worker_id))["status"] == "ready"
            await asyncio.sleep(0.02)


async def test_hanging_worker() -> None:
    """It accepts connections and says nothing."""
    held: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda reader, writer: held.append(writer), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with running_control(**FAST) as control, FakeWorker() as good:
        hanging = await control.register(url)
        began = time.monotonic()
        await control.reaches(await control.register(good.url), "ready")
        assert time.monotonic() - began < 0.5  # it does not hold up anybody else
        await asyncio.sleep(0.6)
        info = await control.info(hanging)
        assert (info["status"], info["last_failure"]) == ("pending", "GET /health: no answer within 0.5 s")
    server.close()
    for writer in held:
        writer.close()
        await writer.wait_closed()


async def test_worker_without_a_model_is_not_ready() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running_control(**FAST) as control:
        worker_id = await control.register(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await asyncio.sleep(0.3)
        info = await control.info(worker_id)
        assert (info["status"], info["last_failure"]) == (
            "pending",
            "neither /server_info nor /v1/models names a model",
        )
    server.close()


async def test_vllm_worker() -> None:
    async with running_control() as control, FakeWorker(models=("base", "lora"), dialect="vllm") as worker:
        info = await control.reaches(await control.register(worker.url), "ready")
        assert (info["runtime_type"], info["models"], info["dp_size"]) == ("vllm", ["base", "lora"], 1)


CHECKED: list[tuple[dict[str, Any], dict[str, Any], str, bool]] = [
    ({}, {}, "/health", True),
    ({"health_check_endpoint": "/health_generate"}, {}, "/health_generate", True),
    ({"disable_health_check": True}, {}, "/health", False),
    ({}, {"disable_health_check": True}, "/health", False),
]


@pytest.mark.parametrize(("fields", "spec", "path", "is_checked"), CHECKED)
async def test_what_is_checked(fields: dict[str, Any], spec: dict[str, Any], path: str, is_checked: bool) -> None:
    async with running_control(**{**FAST, **fields}) as control, FakeWorker() as worker:
        worker_id = await control.register(worker.url, **spec)
        await control.reaches(worker_id, "ready")
        await asyncio.sleep(0.7)
        checks = worker.record.other_paths.get(path, 0)
        assert (checks >= 3) == is_checked
        assert (checks == 0) != is_checked
        await worker.stop()
        await asyncio.sleep(1.0)
        assert ((await control.info(worker_id))["status"] == "not_ready") == is_checked


async def test_success_threshold() -> None:
    async with running_control(health_success_threshold=5, **FAST) as control, FakeWorker() as worker:
        began = time.monotonic()
        await control.reaches(await control.register(worker.url), "ready")
        assert 0.35 < time.monotonic() - began < 1.5
        assert worker.record.other_paths["/health"] >= 5


async def test_silent_worker_is_spoken_of_at_once_and_then_rarely(caplog: pytest.LogCaptureFixture) -> None:
    fields = {"worker_startup_check_interval": 0.5, "health_check_interval_secs": 0.05}
    async with running_control(**fields) as control:
        await control.register(f"http://127.0.0.1:{free_port()}")
        await asyncio.sleep(1.3)
    lines = [record.message for record in caplog.records if "not ready after" in record.message]
    assert 2 <= len(lines) <= 3
    assert all("cannot connect" in line for line in lines)


async def test_two_hundred_dead_workers_do_not_delay_a_live_one() -> None:
    async with running_control() as control, FakeWorker() as worker:
        for port in range(1, 201):
            await control.register(f"http://127.0.0.1:{port}")
        began = time.monotonic()
        await control.reaches(await control.register(worker.url), "ready")
        assert time.monotonic() - began < 2.0
