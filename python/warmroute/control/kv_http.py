"""Following our own workers: `GET /kv_events` by long polls, `GET /kv_events/snapshot` to begin and after a gap."""

import asyncio
import logging
from typing import Any, Final

from warmroute._core import RegionBusy
from warmroute.control.kv_feed import RankFeed
from warmroute.control.kv_shapes import BadEvent, read_events, read_snapshot
from warmroute.control.worker_client import WorkerClient, WorkerUnreachable
from warmroute.control.workers import Worker

log = logging.getLogger(__name__)

POLL_SECONDS: Final = 20
_RETRY_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.05
"""After an answer without events: a worker that does not wait must not be asked without a pause."""
_GONE: Final = 410


class NotTold(Exception):  # noqa: N818
    """The worker has no such events; the message says why."""


class _Gap(Exception):  # noqa: N818
    """Batches are missing: only a snapshot helps."""


async def follow_http(client: WorkerClient, worker: Worker, rank: int, feed: RankFeed) -> None:
    """Until it is cancelled. Raises NotTold when the worker has no such path, ValueError when the rank is gone."""
    epoch: str | None = None
    while True:
        try:
            snapshot = await _ask(client, worker, f"/kv_events/snapshot?dp_rank={rank}")
            if snapshot is None:
                raise NotTold("it has no /kv_events/snapshot")
            if snapshot.get("dp_rank", 0) != rank:
                raise NotTold(f"its /kv_events tell rank {snapshot.get('dp_rank')} when asked for rank {rank}")
            began, number = _head(snapshot)
            feed.resync(read_snapshot(snapshot.get("blocks")), is_new=epoch is not None and epoch != began)
            epoch = began
            while True:
                number = await _poll(client, worker, rank, feed, epoch, number)
        except _Gap:
            feed.counts.gaps += 1
        except (WorkerUnreachable, BadEvent, RegionBusy) as error:
            # The core may have forgotten the cache meanwhile, since the worker seemed to be gone: a snapshot it is.
            log.debug("%s: %s", feed.name, error)
            await asyncio.sleep(_RETRY_SECONDS)


async def _poll(client: WorkerClient, worker: Worker, rank: int, feed: RankFeed, epoch: str, number: int) -> int:
    """The number that comes next. Raises _Gap."""
    path = f"/kv_events?dp_rank={rank}&from={number}&timeout={POLL_SECONDS}"
    answer = await _ask(client, worker, path)
    if answer is None:
        raise _Gap
    began, following = _head(answer)
    if began != epoch:
        raise _Gap  # another process: the snapshot says so, too
    batches = answer.get("batches") or ()
    if not batches:
        await asyncio.sleep(_PAUSE_SECONDS)
    for batch in batches:
        if batch.get("seq") != number:
            raise _Gap
        feed.apply(read_events(batch.get("events")))
        number += 1
    if following != number:
        raise _Gap
    return number


async def _ask(client: WorkerClient, worker: Worker, path: str) -> dict[str, Any] | None:
    """None: the worker has not got it, or not any more. Raises WorkerUnreachable."""
    response = await client.relay(worker, path, POLL_SECONDS + 10.0)
    if response.status_code in (404, 405, _GONE):
        return None
    if not response.is_success:
        raise WorkerUnreachable(f"GET {path} answered {response.status_code}")
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise BadEvent(f"GET {path} did not answer with an object")
    return answer


def _head(answer: dict[str, Any]) -> tuple[str, int]:
    """(epoch, next number). Raises BadEvent."""
    epoch, number = answer.get("epoch"), answer.get("next")
    if not isinstance(epoch, str) or not isinstance(number, int):
        raise BadEvent("events without epoch and number")
    return epoch, number
