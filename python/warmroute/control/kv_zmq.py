"""Following SGLang's and vLLM's workers: a SUB socket for each rank, and a DEALER for what was missed.

Batches come as (topic, number in 8 bytes, msgpack). The replay is asked with (empty, first number wanted) and answers
(empty, number, batch) for each that is kept, and number -1 at the end. Needs the packages pyzmq and msgpack.
"""

import asyncio
import importlib.util
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from warmroute._core import RegionBusy
from warmroute.control.kv_feed import RankFeed
from warmroute.control.kv_shapes import BadEvent, Event, Order, read_events

log = logging.getLogger(__name__)

_END: Final = (-1).to_bytes(8, "big", signed=True)
_REPLAY_SECONDS: Final = 5.0
_ANYWHERE: Final = ("*", "0.0.0.0", "::", "[::]")

ENDPOINT_LABEL: Final = "kv_events_endpoint"
REPLAY_LABEL: Final = "kv_events_replay_endpoint"
TOPIC_LABEL: Final = "kv_events_topic"


@dataclass(frozen=True, slots=True)
class Publisher:
    """Where a worker publishes; of its first rank. Each further rank has the ports after it."""

    endpoint: str
    replay_endpoint: str | None
    topic: str

    def of_rank(self, rank: int) -> "Publisher":
        replay = None if self.replay_endpoint is None else _offset(self.replay_endpoint, rank)
        return Publisher(_offset(self.endpoint, rank), replay, self.topic)


def find_publisher(labels: Any, server_info: Any, host: str) -> Publisher | None:
    """As the worker's labels say, else its own `kv_events_config`; None: neither does. Raises ValueError, whose message
    is for people."""
    if endpoint := labels.get(ENDPOINT_LABEL):
        replay = labels.get(REPLAY_LABEL)
        return Publisher(_at(endpoint, host), replay and _at(replay, host), labels.get(TOPIC_LABEL, ""))
    config = server_info.get("kv_events_config") if isinstance(server_info, dict) else None
    try:
        config = json.loads(config) if isinstance(config, str) else config
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("publisher") != "zmq":
        return None
    endpoint = config.get("endpoint") or "tcp://*:5557"
    replay = config.get("replay_endpoint")
    return Publisher(_at(endpoint, host), replay and _at(replay, host), str(config.get("topic") or ""))


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("zmq", "msgpack"))


async def follow_zmq(publisher: Publisher, feed: RankFeed) -> None:
    """Until it is cancelled. Raises ValueError when the rank is gone."""
    import zmq
    import zmq.asyncio

    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    try:
        # Without a limit: what is dropped here would have to be replayed.
        subscriber.set_hwm(0)
        subscriber.setsockopt_string(zmq.SUBSCRIBE, publisher.topic)
        subscriber.connect(publisher.endpoint)
        await _Stream(context, publisher, feed).follow(subscriber)
    finally:
        subscriber.close(0)
        context.term()


@dataclass(frozen=True, slots=True)
class Batch:
    time: float
    events: list[Event]


class _Stream:
    """One rank's numbered batches, in order."""

    def __init__(self, context: Any, publisher: Publisher, feed: RankFeed) -> None:
        self._context = context
        self._publisher = publisher
        self._feed = feed
        self._order = Order()

    async def follow(self, subscriber: Any) -> None:
        self._feed.begin(is_new=False, is_whole=False)
        try:
            await self._catch_up()  # what was published before we came
        except (BadEvent, RegionBusy) as error:
            self._fail(error)
        while True:
            frames = await subscriber.recv_multipart()
            if len(frames) != 3 or len(frames[1]) != 8:
                log.warning("%s: a message that is no batch of events", self._feed.name)
                continue
            number = int.from_bytes(frames[1], "big")
            try:
                await self._take(number, unpack(frames[2]))
            except (BadEvent, RegionBusy) as error:
                self._fail(error)
                self._order.skip(number)

    def _fail(self, error: Exception) -> None:
        log.warning("%s: %s", self._feed.name, error or type(error).__name__)
        self._feed.lose()

    async def _take(self, number: int, batch: Batch) -> None:
        verdict = self._order.arrived(number, batch.time)
        if verdict == "restart":
            # Another process publishes there now, with an empty cache.
            self._order.begin_anew()
            self._feed.begin(is_new=True, is_whole=number == 0)
            if number:
                await self._catch_up()
            verdict = "skip" if (self._order.next or 0) > number else "apply"
        elif verdict == "gap":
            has_begun = self._order.next is not None
            self._feed.counts.gaps += has_begun
            await self._catch_up()
            if (self._order.next or 0) <= number:
                if has_begun and self._order.next != number:
                    self._feed.lose()
                verdict = "apply"
        if verdict == "apply":
            if number == 0:
                self._feed.begin(is_new=False, is_whole=True)
            self._apply(number, batch)

    async def _catch_up(self) -> None:
        """Apply what is kept of what is missing, as far as it follows on what is known."""
        async for number, batch in self._replay(self._order.next or 0):
            if not self._order.replayed(number):
                continue
            if number == 0:
                self._feed.begin(is_new=False, is_whole=True)
            self._apply(number, batch)

    def _apply(self, number: int, batch: Batch) -> None:
        self._feed.apply(batch.events)
        self._order.applied(number, batch.time)

    async def _replay(self, first: int) -> AsyncIterator[tuple[int, Batch]]:
        if self._publisher.replay_endpoint is None:
            return
        import zmq

        dealer = self._context.socket(zmq.DEALER)
        try:
            dealer.connect(self._publisher.replay_endpoint)
            await dealer.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(_REPLAY_SECONDS):
                    frames = await dealer.recv_multipart()
                if len(frames) < 2 or frames[-2] == _END:
                    return
                yield int.from_bytes(frames[-2], "big"), unpack(frames[-1])
        except TimeoutError:
            log.warning("%s: %s did not replay", self._feed.name, self._publisher.replay_endpoint)
        finally:
            dealer.close(0)


def unpack(batch: bytes) -> Batch:
    """Raises BadEvent."""
    import msgpack

    try:
        fields = msgpack.unpackb(batch, strict_map_key=False)
    except ValueError as error:
        raise BadEvent(f"a batch that is not msgpack: {error}") from None
    if not isinstance(fields, list) or len(fields) < 2 or not isinstance(fields[0], int | float):
        raise BadEvent("a batch that is not [time, events, dp rank]")
    return Batch(float(fields[0]), read_events(fields[1]))


def _at(endpoint: str, host: str) -> str:
    """Where to connect to what was bound as `endpoint`. Raises ValueError with a message."""
    parts = urlsplit(endpoint)
    if parts.scheme == "ipc":
        return endpoint
    bound, _, port = parts.netloc.rpartition(":")
    if parts.scheme != "tcp" or not port.isdecimal() or not bound:
        raise ValueError(f"{endpoint!r} is no endpoint: expected tcp://host:port")
    if bound in _ANYWHERE:
        bound = f"[{host}]" if ":" in host else host
    return f"tcp://{bound}:{port}"


def _offset(endpoint: str, rank: int) -> str:
    """As SGLang and vLLM count on: the port of rank 0, and those after it."""
    if rank == 0:
        return endpoint
    if not endpoint.startswith("tcp://"):
        raise ValueError(f"{endpoint!r} has no port after which those of further dp ranks could follow")
    before, _, port = endpoint.rpartition(":")
    return f"{before}:{int(port) + rank}"
