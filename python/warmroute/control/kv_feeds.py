"""Whose KV events are followed, and how: our own workers over HTTP, SGLang's and vLLM's over ZeroMQ."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from warmroute._core import Core
from warmroute.control.kv_feed import RankFeed
from warmroute.control.kv_http import NotTold, follow_http
from warmroute.control.kv_zmq import ENDPOINT_LABEL, find_publisher, follow_zmq, is_installed
from warmroute.control.worker_client import WorkerClient, WorkerUnreachable
from warmroute.control.workers import Registry, Worker

log = logging.getLogger(__name__)

_AGAIN_NS: Final = 60_000_000_000
"""After which a worker that told nothing is asked again ..."""
_SOON_NS: Final = 5_000_000_000
"""... and one that did not answer."""
_MISSING: Final = "it publishes over ZeroMQ, which needs the packages pyzmq and msgpack: pip install 'warmroute[zmq]'"
_NOWHERE: Final = (
    "it has no /kv_events and names no publisher; if it has one, register it with the label "
    f"{ENDPOINT_LABEL}, like tcp://*:5557"
)


@dataclass(slots=True)
class _Following:
    """Of one worker, in one life of it."""

    slots: tuple[int, ...]
    lives: int
    task: asyncio.Task[None] | None = None
    source: str | None = None
    feeds: list[RankFeed] = field(default_factory=list)
    failure: str | None = None
    again_ns: int = 0


class KvFeeds:
    """Owns the tasks that follow workers. `clock`: CLOCK_MONOTONIC in ns."""

    def __init__(
        self, core: Core, registry: Registry, client: WorkerClient, enabled: bool, clock: Callable[[], int]
    ) -> None:
        self._core = core
        self._registry = registry
        self._client = client
        self._enabled = enabled
        self._clock = clock
        self._following: dict[str, _Following] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def start_due(self) -> None:
        """Follow who has become ready, and nobody who is gone."""
        if not self._enabled:
            return
        present = {worker.worker_id: worker for worker in self._registry if worker.slots}
        for worker_id, following in list(self._following.items()):
            worker = present.get(worker_id)
            if worker is None or (worker.slots, worker.lives) != (following.slots, following.lives):
                self._stop(self._following.pop(worker_id))
        now_ns = self._clock()
        for worker_id, worker in present.items():
            known = self._following.get(worker_id)
            if known is not None and (known.task is not None or now_ns < known.again_ns):
                continue
            if self._registry.health(worker) == "ready":
                following = _Following(worker.slots, worker.lives)
                self._following[worker_id] = following
                following.task = asyncio.create_task(self._follow(worker, following))

    def view(self, worker: Worker, rank: int) -> dict[str, Any] | None:
        """What is known of one rank's cache by its events, for people; None: they are not followed."""
        following = self._following.get(worker.worker_id)
        if following is None:
            return None
        if rank >= len(following.feeds):
            return {"source": None, "failure": following.failure}
        blocks, tokens, unmapped = self._core.kv_view(worker.slots[rank]) or (0, 0, 0)
        counts = following.feeds[rank].counts
        return {
            "source": following.source,
            "failure": following.failure,
            "blocks": blocks,
            "tokens": tokens,
            "unmapped_blocks": unmapped,
            "batches": counts.batches,
            "gaps": counts.gaps,
            "resyncs": counts.resyncs,
            "losses": counts.losses,
        }

    async def close(self) -> None:
        for following in self._following.values():
            self._stop(following)
        self._following.clear()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _stop(self, following: _Following) -> None:
        if following.task is not None:
            following.task.cancel()
            self._ending.add(following.task)
            following.task.add_done_callback(self._ending.discard)

    async def _follow(self, worker: Worker, following: _Following) -> None:
        wait_ns = _AGAIN_NS
        try:
            await self._follow_ranks(worker, following)
        except* WorkerUnreachable as errors:
            following.failure, wait_ns = str(errors.exceptions[0]), _SOON_NS
            log.debug("worker %s: its KV events cannot be followed yet: %s", worker.spec.url, following.failure)
        except* (NotTold, ValueError) as errors:
            following.failure = str(errors.exceptions[0])
            log.warning("worker %s: its KV events cannot be followed: %s", worker.spec.url, following.failure)
        except* Exception as errors:  # a defect of ours must not end the control plane
            following.failure = repr(errors.exceptions[0])
            log.exception("worker %s: following its KV events failed", worker.spec.url)
        finally:
            for feed in following.feeds:
                feed.end()
            following.feeds, following.task = [], None
            following.again_ns = self._clock() + wait_ns

    async def _follow_ranks(self, worker: Worker, following: _Following) -> None:
        assert worker.facts is not None
        models, slots = worker.facts.models, following.slots
        url = worker.spec.url
        feeds = [
            RankFeed(self._core, slot, models, f"worker {url}, KV events of dp rank {rank}")
            for rank, slot in enumerate(slots)
        ]
        # Whoever names a publisher wants it.
        is_told = ENDPOINT_LABEL in worker.spec.labels
        has_path = not is_told and (await self._client.relay(worker, "/kv_events/snapshot?dp_rank=0")).is_success
        async with asyncio.TaskGroup() as tasks:
            if has_path:
                following.source = "http"
                for rank, feed in enumerate(feeds):
                    tasks.create_task(follow_http(self._client, worker, rank, feed))
            else:
                info = await self._client.relay(worker, "/server_info")
                server_info = info.json() if info.is_success else None
                publisher = find_publisher(worker.spec.labels, server_info, worker.address.host)
                if publisher is None:
                    raise NotTold(_NOWHERE)
                if not is_installed():
                    raise NotTold(_MISSING)
                following.source = "zmq"
                for rank, feed in enumerate(feeds):
                    tasks.create_task(follow_zmq(publisher.of_rank(rank), feed))
            following.feeds = feeds
            log.info("worker %s: following its KV events over %s", url, following.source)
