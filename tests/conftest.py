"""Fixtures that several kinds of tests share."""

from collections.abc import AsyncIterator

import pytest

from tests.fake_worker import FakeWorker


@pytest.fixture
async def fake_worker() -> AsyncIterator[FakeWorker]:
    """A fake worker in this process."""
    async with FakeWorker() as worker:
        yield worker
