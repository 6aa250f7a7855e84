"""Workers of several drivers, as tests want them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from warmroute_worker import offline_drivers
from warmroute_worker.args import WorkerArgs

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from warmroute_worker.offline_drivers import Drivers


def drivers(folder: Path, prepare: Callable[[], None] | None = None, **changes: Any) -> AbstractContextManager[Drivers]:
    """See `offline_drivers.drivers`."""
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "max_total_tokens": 4096, "watchdog_timeout": 60.0}
    return offline_drivers.drivers(WorkerArgs(str(folder), "tiny", **(settings | changes)), prepare)
