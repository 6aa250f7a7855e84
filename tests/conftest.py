"""Fixtures that several kinds of tests share."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import settings

from tests.fake_worker import FakeWorker

# How long an example takes says more of what else runs on the machine.
settings.register_profile("warmroute", deadline=None)
settings.load_profile("warmroute")


@pytest.fixture
async def fake_worker() -> AsyncIterator[FakeWorker]:
    """A fake worker in this process."""
    async with FakeWorker() as worker:
        yield worker
