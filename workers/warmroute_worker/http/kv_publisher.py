"""The events of the prefix cache over ZeroMQ, as SGLang and vLLM publish them; needs the package pyzmq.

A PUB socket sends (topic, number, batch) for each batch: the number in 8 bytes, big-endian; the batch as msgpack
[time, events, data-parallel rank]. Who missed some asks the ROUTER socket, if there is one, with the first number
wanted; it answers with (empty, number, batch) for each that is still kept, and ends with number -1 and nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from warmroute_worker.kv_event_log import KvEventLog

END = (-1).to_bytes(8, "big", signed=True)


class PublisherError(ValueError):
    """It cannot publish; the message is one line."""


@contextlib.contextmanager
def publisher(config: str | None, logs: Sequence[KvEventLog]) -> Iterator[None]:
    """Publishes what the logs get, as `--kv-events-config` says. Within an event loop. Raises PublisherError.

    `logs`: one per data-parallel rank, each with sockets of its own; see `of_rank`.
    """
    settings: dict[str, Any] = json.loads(config) if config else {}
    if settings.get("publisher") != "zmq":
        yield
        return
    try:
        import zmq
        import zmq.asyncio
    except ImportError:
        text = "--kv-events-config: publisher zmq needs the package pyzmq: pip install 'warmroute-worker[zmq]'"
        raise PublisherError(text) from None
    context = zmq.asyncio.Context()
    topic = str(settings.get("topic", "")).encode()
    sockets: list[Any] = []
    replaying: list[asyncio.Task[None]] = []
    try:
        for rank, log in enumerate(logs):
            # Sent without waiting: a subscriber that is too slow loses batches, and sees it by their numbers.
            pub: Any = zmq.Context.shadow(context).socket(zmq.PUB)
            sockets.append(pub)
            pub.set_hwm(int(settings.get("hwm", 100_000)))
            pub.bind(of_rank(settings.get("endpoint", "tcp://*:5557"), rank))
            if "replay_endpoint" in settings:
                router = context.socket(zmq.ROUTER)
                sockets.append(router)
                router.bind(of_rank(settings["replay_endpoint"], rank))
                replaying.append(asyncio.create_task(_replay(router, log, rank)))
            log.listen(functools.partial(_publish, pub, topic, rank))
    except zmq.ZMQError as error:
        _close(sockets, context)
        raise PublisherError(f"--kv-events-config: cannot bind: {error}") from error
    try:
        yield
    finally:
        for task in replaying:
            task.cancel()
        _close(sockets, context)


def of_rank(endpoint: str, rank: int) -> str:
    """The endpoint of a data-parallel rank, as in SGLang and vLLM: the port plus its number; of a name, with it."""
    if rank == 0:
        return endpoint
    head, colon, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + rank}" if colon and port.isdecimal() else f"{endpoint}_dp{rank}"


def _publish(pub: Any, topic: bytes, rank: int, number: int, time: float, events: list[list[Any]]) -> None:
    pub.send_multipart([topic, _number(number), _batch(time, events, rank)])


async def _replay(router: Any, log: KvEventLog, rank: int) -> None:
    while True:
        frames = await router.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            continue  # not a question that we know
        client, empty, wanted = frames
        first = max(int.from_bytes(wanted, "big"), log.oldest)
        while batches := log.since(first):
            for number, time, events in batches:
                await router.send_multipart([client, empty, _number(number), _batch(time, events, rank)])
            first = batches[-1][0] + 1
        await router.send_multipart([client, empty, END, b""])


def _close(sockets: list[Any], context: Any) -> None:
    for socket in sockets:
        socket.close(0)
    context.term()


def _number(number: int) -> bytes:
    return number.to_bytes(8, "big")


def _batch(time: float, events: list[list[Any]], rank: int) -> bytes:
    packed: bytes = msgpack.packb([time, events, rank])
    return packed
