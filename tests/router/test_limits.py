"""Limits of the data plane, on real sockets; `test_admission.py` has the rules."""

import asyncio
import os
from pathlib import Path

from tests.fake_worker import FakeWorker, Script
from tests.router.plane import running
from tests.router.test_dataplane import CHAT, chat


async def test_limits_make_requests_wait_or_refuse_them() -> None:
    limits = {"max_concurrent_requests": 2, "queue_size": 2, "queue_timeout_secs": 1.5}
    async with FakeWorker() as worker, running([worker], **limits) as router:
        worker.script = Script(first_byte_seconds=0.3)
        answers = await asyncio.gather(*(router.client.post(CHAT, json=chat(str(number))) for number in range(6)))
        assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 2
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        assert router.core.admission() == (0, 0, 4, 2)

        worker.script = Script(stall=True)
        stalled = [asyncio.create_task(router.client.post(CHAT, json=chat(str(number)))) for number in range(2)]
        await asyncio.sleep(0.1)
        gone = asyncio.create_task(router.client.post(CHAT, json=chat("gone")))
        late = asyncio.create_task(router.client.post(CHAT, json=chat("late")))
        await asyncio.sleep(0.1)
        assert router.core.admission()[:2] == (2, 2)
        gone.cancel()
        await asyncio.sleep(0.1)
        assert router.core.admission()[:2] == (2, 1)
        waited = await late
        assert (waited.status_code, waited.json()["error"]["code"]) == (408, "queue_timeout")
        for task in stalled:
            task.cancel()
        await asyncio.sleep(0.1)
        assert router.core.admission()[:2] == (0, 0)


async def test_a_request_that_runs_out_of_time_in_the_queue_is_told_so() -> None:
    async with FakeWorker() as worker, running([worker], max_concurrent_requests=1, request_timeout_secs=1.0) as router:
        worker.script = Script(stall=True)
        ran, waited = await asyncio.gather(*(router.client.post(CHAT, json=chat(text)) for text in ("first", "second")))
        assert (ran.status_code, ran.json()["error"]["code"]) == (504, "upstream_timeout")
        assert (waited.status_code, waited.json()["error"]["code"]) == (408, "queue_timeout")


async def test_a_rate_limit_spreads_requests() -> None:
    async with FakeWorker() as worker, running([worker], rate_limit_tokens_per_second=10.0) as router:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        answers = await asyncio.gather(*(router.client.post(CHAT, json=chat(str(number))) for number in range(15)))
        assert {answer.status_code for answer in answers} == {200}
        assert loop.time() - begin > 0.45


async def test_an_access_log_that_stands_still_does_not_stop_the_router(tmp_path: Path) -> None:
    """A pipe whose reader has fallen asleep."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    async with FakeWorker() as worker, running([worker], access_log=str(pipe)) as router:
        for number in range(600):  # 64 KiB are in the pipe after about 200
            async with asyncio.timeout(5):
                assert (await router.client.post(CHAT, json=chat(str(number)))).status_code == 200
        os.close(reader)
