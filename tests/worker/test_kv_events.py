"""The events of the prefix cache: who replays them has what is cached, exactly."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from tests.worker.byte_model import write_folder
from tests.worker.http_fixtures import running_app
from warmroute_worker import kv_event_log, messages
from warmroute_worker.http.kv_publisher import PublisherError, publisher
from warmroute_worker.kv.cache import KvCache, PageLease
from warmroute_worker.kv.events import CacheEvents, block_hash
from warmroute_worker.kv_event_log import KvEventLog

if TYPE_CHECKING:
    from pathlib import Path

    from warmroute_worker.kv.radix import PageKey

PAGE = 4


def free_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def cached(cache: KvCache) -> dict[int, tuple[int | None, list[int]]]:
    """What is in the tree, as a follower should have it: hash -> (parent's hash, tokens)."""
    found: dict[int, tuple[int | None, list[int]]] = {}
    stack: list[tuple[Any, int | None]] = [(cache._radix.root, None)]
    while stack:
        node, parent = stack.pop()
        for key in node.keys:
            own = block_hash(parent, key)
            found[own] = (parent, list(key))
            parent = own
        stack += [(child, parent) for child in node.children.values()]
    return found


def followed(log: KvEventLog) -> dict[int, tuple[int | None, list[int]]]:
    return {own: (parent, tokens.tolist()) for own, parent, tokens in log.cached()}


@pytest.mark.parametrize("seed", range(8))
async def test_replaying_the_events_gives_the_cache(seed: int) -> None:
    """Requests that share prefixes come and go, pages run out, the cache is flushed."""
    draw = random.Random(seed)
    events = CacheEvents(PAGE, "CPU")
    cache, log = KvCache(24, events), KvEventLog()
    leases: list[tuple[PageLease, list[PageKey]]] = []
    kinds: set[str] = set()
    for _ in range(600):
        choice = draw.random()
        if choice < 0.5:
            keys: list[PageKey] = [(draw.randrange(2), depth, 7, 7) for depth in range(draw.randrange(1, 8))]
            lease = cache.acquire(cache.match(keys), len(keys))
            if lease is not None:
                leases.append((lease, keys))
        elif choice < 0.7 and leases:
            lease, keys = draw.choice(leases)
            cache.publish(lease, keys[: max(lease.num_shared, draw.randrange(len(keys) + 1))])
        elif choice < 0.98 and leases:
            lease, keys = leases.pop(draw.randrange(len(leases)))
            cache.release(lease, keys)
        elif choice >= 0.98:
            cache.flush()
        if batch := events.drain():
            kinds |= {event[0] for event in batch}
            log.append(batch)
        assert followed(log) == cached(cache)
    for lease, keys in leases:
        cache.release(lease, keys)
    log.append(events.drain())
    cache.flush()
    assert events.drain() == [["AllBlocksCleared"]]
    assert kinds >= {"BlockStored", "BlockRemoved"}


async def test_who_comes_later_replays_the_rest() -> None:
    log, other = KvEventLog(), KvEventLog()
    parent = None
    for n in range(20):
        own = block_hash(parent, [n] * PAGE)
        log.append([["BlockStored", [own], parent, [n] * PAGE, PAGE, None, "CPU"]])
        parent = own
    for number, _, events in log.since(0):
        assert number == other.next
        other.append(events)
    assert followed(other) == followed(log)
    assert [number for number, *_ in log.since(17)] == [17, 18, 19]
    assert next(iter(followed(log).values())) == (None, [0] * PAGE)


def test_a_hash_is_of_all_tokens_before() -> None:
    first = block_hash(None, [1, 2, 3, 4])
    assert block_hash(None, [1, 2, 3, 4]) == first
    assert len({first, block_hash(first, [1, 2, 3, 4]), block_hash(None, [4, 3, 2, 1])}) == 3
    assert 0 <= first < 1 << 63


async def test_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_event_log, "KEPT_BATCHES", 3)
    async with running_app(write_folder(tmp_path)) as app:
        log = app.service.engine.clients[0].kv_events
        log._batches = type(log._batches)(maxlen=3)
        first, second = block_hash(None, [1, 2]), 77
        app.service.engine.clients[0].data_received(
            messages.encode(messages.KvEvents([["BlockStored", [first], None, [1, 2], 2, None, "CPU"]]))
        )
        answer = (await app.client.get("/kv_events?from=0")).json()
        assert answer["next"] == 1
        assert answer["epoch"] == log.epoch
        [batch] = answer["batches"]
        assert (batch["seq"], batch["dp_rank"]) == (0, 0)
        assert batch["ts"] > 1_700_000_000
        assert batch["events"] == [
            {
                "type": "BlockStored",
                "block_hashes": [first],
                "parent_block_hash": None,
                "token_ids": [1, 2],
                "block_size": 2,
                "lora_id": None,
                "medium": "CPU",
            }
        ]
        waiting = asyncio.create_task(app.client.get("/kv_events?from=1&timeout=20"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        log.append([["BlockStored", [second], first, [3, 4], 2, None, "CPU"]])
        assert (await waiting).json()["batches"][0]["seq"] == 1
        log.append([["BlockRemoved", [second], "CPU"]])
        removed = (await app.client.get("/kv_events?from=2")).json()["batches"][0]["events"]
        assert removed == [{"type": "BlockRemoved", "block_hashes": [second], "medium": "CPU"}]
        snapshot = (await app.client.get("/kv_events/snapshot")).json()
        assert snapshot["next"] == 3
        assert snapshot["blocks"] == [{"block_hash": first, "parent_block_hash": None, "token_ids": [1, 2]}]
        log.append([["AllBlocksCleared"]])
        assert (await app.client.get("/kv_events?from=3")).json()["batches"][0]["events"] == [
            {"type": "AllBlocksCleared"}
        ]
        gone = await app.client.get("/kv_events?from=0")
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "gone")
        assert "1 to 4 are" in gone.json()["error"]["message"]
        assert (await app.client.get("/kv_events?from=9")).status_code == 410
        assert (await app.client.get("/kv_events?from=x")).status_code == 400
        assert (await app.client.get("/kv_events?from=4")).json()["batches"] == []


async def test_over_zeromq() -> None:
    """A subscriber that knows the other engines' format: batches as they come, and the missed ones from the replay."""
    log = KvEventLog()
    context = zmq.asyncio.Context()
    sub, replay = context.socket(zmq.SUB), context.socket(zmq.REQ)
    config = {"publisher": "zmq", "endpoint": free_endpoint(), "replay_endpoint": free_endpoint()}
    first: list[Any] = ["BlockStored", [11], None, [1, 2], 2, None, "CPU"]
    with publisher(json.dumps(config | {"topic": "kv"}), [log]):
        log.append([first])  # before anybody listens
        sub.connect(config["endpoint"])
        sub.subscribe(b"kv")
        received: list[list[bytes]] = []
        async with asyncio.timeout(10):
            while not received:
                log.append([["BlockRemoved", [11], "CPU"]] if 11 in log._cached else [first])
                if await sub.poll(50):
                    received.append(await sub.recv_multipart())
            topic, number, batch = received[0]
            assert topic == b"kv"
            moment, events, rank = msgpack.unpackb(batch)
            assert events in ([first], [["BlockRemoved", [11], "CPU"]])
            assert (moment > 1_700_000_000, rank) == (True, 0)
            replay.connect(config["replay_endpoint"])
            await replay.send((0).to_bytes(8, "big"))
            answer = await replay.recv_multipart()
            assert answer[0] == (0).to_bytes(8, "big")
            assert msgpack.unpackb(answer[1])[1] == [first]
        assert int.from_bytes(number, "big") < log.next
    sub.close(0)
    replay.close(0)
    context.term()


async def test_a_replay_ends_with_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_event_log, "MOST_BATCHES", 1)  # so that it takes several looks
    log = KvEventLog()
    for n in range(3):
        log.append([["BlockStored", [n], None, [n], 1, None, "CPU"]])
    context = zmq.asyncio.Context()
    dealer = context.socket(zmq.DEALER)
    config = {"publisher": "zmq", "endpoint": free_endpoint(), "replay_endpoint": free_endpoint()}
    with publisher(json.dumps(config), [log]):
        dealer.connect(config["replay_endpoint"])
        await dealer.send_multipart([b"", b"nonsense?"])
        await dealer.send_multipart([b"", (1).to_bytes(8, "big")])
        async with asyncio.timeout(10):
            answers = [await dealer.recv_multipart() for _ in range(3)]
    assert [int.from_bytes(number, "big", signed=True) for _, number, _ in answers] == [1, 2, -1]
    dealer.close(0)
    context.term()


async def test_a_publisher_that_cannot_be_says_why() -> None:
    log = KvEventLog()
    config = {"publisher": "zmq", "endpoint": free_endpoint()}
    with (
        publisher(json.dumps(config), [log]),
        pytest.raises(PublisherError, match="cannot bind: Address already in use"),
        publisher(json.dumps(config), [log]),
    ):
        pass
    with publisher(None, [log]), publisher("{}", [log]):
        pass
