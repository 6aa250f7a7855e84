"""The fleet: real processes, all gone after the test; their logs are in the test's temporary folder."""

from collections.abc import Iterator

import pytest

from tests.e2e.fleet import Fleet
from tests.processes import Processes


@pytest.fixture
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Processes(tmp_path_factory.mktemp("fleet")) as processes:
        yield Fleet(processes)


@pytest.fixture(scope="module")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """For modules whose tests leave the fleet as they found it."""
    with Processes(tmp_path_factory.mktemp("fleet")) as processes:
        yield Fleet(processes)
