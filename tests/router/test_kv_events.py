"""KV events over HTTP and ZeroMQ: after them the index credits each rank with what it holds, whatever was lost."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from tests.fake_worker import FakeWorker
from tests.fake_worker.kv_log import Events, KvLog
from tests.processes import free_port
from tests.router.running_control import RunningControl, running_control
from tests.router.test_metrics import scrape
from warmroute.control.kv_shapes import BadEvent, Cleared, Removed, Stored, read_events
from warmroute.control.kv_zmq import Publisher as ZmqPublisher
from warmroute.control.kv_zmq import find_publisher

FAST: dict[str, Any] = {"health_check_interval_secs": 0.2, "worker_startup_check_interval": 0.1, "kv_events": True}
PAGE_BYTES = 64


def whole_blocks(held: int) -> int:
    """Of so many bytes of ids, those that whole blocks of the index cover."""
    covered = 0
    for block in [128] * 4 + [256] * 14 + [512] * 2_000:
        if covered + block > held:
            break
        covered += block
    return covered


def credited(control: RunningControl, slot: int, ids: list[int]) -> int:
    # One more id, so that the block that ends with the prompt is none of the cache's.
    body = b'{"input_ids": %b}' % str([*ids, 1]).encode()
    explained = control.core.explain(b"/generate", b"", body, 1)
    return next(held for candidate, held, *_ in explained.candidates if candidate == slot)


def expected(worker: FakeWorker, rank: int, ids: list[int]) -> int:
    text = b"".join(token.to_bytes(4, "little") for token in [*ids, 1])
    return whole_blocks(worker.caches[rank].cached_tokens(text) * 4)


def prompts(seed: int, count: int = 24) -> list[list[int]]:
    """Some share a beginning."""
    dice = random.Random(seed)
    heads = [[dice.randrange(50_000) for _ in range(400)] for _ in range(4)]
    tails = [[dice.randrange(50_000) for _ in range(dice.randint(1, 300))] for _ in range(count)]
    return [dice.choice(heads)[: dice.choice((64, 200, 400))] + tail for tail in tails]


def take(worker: FakeWorker, rank: int, ids: list[int]) -> None:
    """A prompt that came from somebody else."""
    worker.caches[rank].insert(b"".join(token.to_bytes(4, "little") for token in ids))


async def agrees(control: RunningControl, worker: FakeWorker, asked: list[list[int]]) -> None:
    """Waits until the index credits every rank with just what it holds of each prompt."""
    ranks = range(len(worker.caches))
    wanted = {(rank, n): expected(worker, rank, ids) for rank in ranks for n, ids in enumerate(asked)}
    found: dict[tuple[int, int], int] = {}
    for _ in range(250):
        found = {(rank, n): credited(control, rank, ids) for rank in ranks for n, ids in enumerate(asked)}
        if found == wanted:
            return
        await asyncio.sleep(0.02)
    wrong = {key: (found[key], wanted[key]) for key in wanted if found[key] != wanted[key]}
    raise AssertionError(f"(rank, prompt): (credited, held): {wrong}")


async def follow(control: RunningControl, worker: FakeWorker, source: str, **fields: Any) -> str:
    worker_id = await control.register(worker.url, **fields)
    await control.reaches(worker_id, "ready")
    await told(control, worker_id, lambda rows: all((row or {}).get("source") == source for row in rows))
    return worker_id


async def told(control: RunningControl, worker_id: str, until: Any) -> list[dict[str, Any]]:
    """What is said of each rank's events, as soon as it is as wished for."""
    rows: list[dict[str, Any]] = []
    for _ in range(250):
        rows = [target["kv_events"] for target in (await control.info(worker_id))["targets"]]
        if rows and until(rows):
            return rows
        await asyncio.sleep(0.02)
    raise AssertionError(rows)


# -- over HTTP


async def test_each_rank_is_credited_with_what_it_holds() -> None:
    """Caches that are too small, so that blocks leave them, and some that were there before the router came."""
    asked = prompts(1)
    async with FakeWorker(dp_size=2, kv_tokens=2_048, kv_events=True) as worker, running_control(**FAST) as control:
        for n, ids in enumerate(asked[:8]):
            take(worker, n % 2, ids)
        worker_id = await follow(control, worker, "http")
        await agrees(control, worker, asked)
        for n, ids in enumerate(asked[8:]):
            take(worker, n % 2, ids)
            if n % 5 == 0:
                await asyncio.sleep(0.02)
        await agrees(control, worker, asked)
        rows = await told(control, worker_id, lambda rows: True)
        assert [row["tokens"] for row in rows] == [cache.used_tokens for cache in worker.caches]
        assert [row["unmapped_blocks"] for row in rows] == [0, 0]
        samples = await scrape(control)
        for rank in (0, 1):
            labels = {"worker": worker.url, "dp_rank": str(rank)}
            assert samples.of("warmroute_kv_cache_tokens", **labels) == worker.caches[rank].used_tokens
            assert samples.of("smg_kv_event_resyncs_total", **labels) == 1
        worker.caches[0].clear()
        await agrees(control, worker, asked)
        assert expected(worker, 0, asked[-1]) == 0 < expected(worker, 1, asked[-1]) + expected(worker, 1, asked[-2])


async def test_who_comes_too_late_begins_with_a_snapshot() -> None:
    asked = prompts(2)
    async with FakeWorker(kv_tokens=2_048) as worker, running_control(**FAST) as control:
        worker.keep_kv_logs(kept=2)
        worker_id = await follow(control, worker, "http")
        for ids in asked:  # without a pause: all but the last two are gone when the router asks
            take(worker, 0, ids)
        await agrees(control, worker, asked)
        (row,) = await told(control, worker_id, lambda rows: rows[0]["resyncs"] == 2)
        assert row["gaps"] == 1


async def test_a_number_that_is_missing_is_a_gap() -> None:
    asked = prompts(3)
    async with FakeWorker(kv_events=True) as worker, running_control(**FAST) as control:
        worker_id = await follow(control, worker, "http")
        take(worker, 0, asked[0])
        await agrees(control, worker, asked)
        (log,) = worker.kv_logs
        log.next += 3  # three batches that nobody will ever see
        take(worker, 0, asked[1])
        await agrees(control, worker, asked)
        (row,) = await told(control, worker_id, lambda rows: rows[0]["resyncs"] >= 2)
        assert row["gaps"] >= 1


async def test_another_process_begins_with_an_empty_cache() -> None:
    """It answers on the same port before a probe could have noticed; what was sent to the first one counts no more."""
    asked = prompts(4)
    text = b'{"text": "%b"}' % (b"a long text " * 100)
    async with FakeWorker(kv_events=True) as worker, running_control(**FAST) as control:
        worker_id = await follow(control, worker, "http")
        take(worker, 0, asked[0])
        lease = control.core.select(control.core.read(b"/generate", b"", text, 1), 1, False)
        assert lease is not None
        await agrees(control, worker, asked)

        def text_held() -> int:
            return control.core.explain(b"/generate", b"", text, 1).candidates[0][1]

        assert text_held() == 1_200
        worker.caches[0].log = None
        worker.caches[0].clear()
        worker.kv_logs[0].restart()
        worker.caches[0].log = worker.kv_logs[0]
        take(worker, 0, asked[1])
        await agrees(control, worker, asked)
        assert text_held() == 0
        await told(control, worker_id, lambda rows: rows[0]["resyncs"] >= 2)


async def test_a_worker_that_was_away_is_asked_for_everything() -> None:
    """The connection is lost, and the core forgets the cache; the process has lived on."""
    asked = prompts(5)
    async with FakeWorker(kv_events=True) as worker, running_control(**FAST) as control:
        worker_id = await follow(control, worker, "http")
        take(worker, 0, asked[0])
        await agrees(control, worker, asked)
        await worker.stop()
        await control.reaches(worker_id, "not_ready")
        take(worker, 0, asked[1])
        await worker.start()
        await control.reaches(worker_id, "ready")
        await agrees(control, worker, asked)


async def test_workers_without_events_say_why_not() -> None:
    async with FakeWorker() as worker, running_control(**FAST) as control:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        (row,) = await told(control, worker_id, lambda rows: rows[0] is not None and rows[0]["failure"])
        assert "kv_events_endpoint" in row["failure"]
    async with FakeWorker(kv_events=True) as worker, running_control(**FAST | {"kv_events": False}) as control:
        worker_id = await control.register(worker.url)
        await control.reaches(worker_id, "ready")
        assert await told(control, worker_id, lambda rows: True) == [None]
        assert "/kv_events/snapshot" not in worker.record.other_paths


# -- over ZeroMQ


class Publisher:
    """Publishes a log as SGLang and vLLM do. `lost`: numbers that never leave; `as_maps`: the newer shape of events."""

    def __init__(self, log: KvLog, ports: tuple[int, int], as_maps: bool, as_bytes: bool) -> None:
        self.lost: set[int] = set()
        self.replays = 0
        self._times: dict[int, float] = {}
        self._kept: list[Events] = []
        self._as_maps, self._as_bytes = as_maps, as_bytes
        self._context = zmq.asyncio.Context()
        self._pub: Any = zmq.Context.shadow(self._context).socket(zmq.PUB)
        self._pub.bind(f"tcp://127.0.0.1:{ports[0]}")
        self._router = self._context.socket(zmq.ROUTER)
        self._router.bind(f"tcp://127.0.0.1:{ports[1]}")
        self._task = asyncio.create_task(self._replay())
        self.log = log
        log.listener = self.publish

    def publish(self, number: int, events: Events) -> None:
        if number not in self.lost:
            self._pub.send_multipart([b"kv", number.to_bytes(8, "big"), self._packed(events)])

    async def close(self) -> None:
        self.log.listener = None
        self._task.cancel()
        self._pub.close(0)
        self._router.close(0)
        self._context.term()

    async def _replay(self) -> None:
        while True:
            client, empty, first = await self._router.recv_multipart()
            self.replays += 1
            for number, events in list(self.log.batches):
                if number >= int.from_bytes(first, "big"):
                    packed = self._packed(events)
                    await self._router.send_multipart([client, empty, number.to_bytes(8, "big"), packed])
            await self._router.send_multipart([client, empty, (-1).to_bytes(8, "big", signed=True), b""])

    def _packed(self, events: Events) -> bytes:
        shaped = [self._shaped(event) for event in events]
        # Of the same batch always the same, and later of later ones.
        time = self._times.setdefault(id(events), float(len(self._times)))
        self._kept.append(events)
        packed: bytes = msgpack.packb([time, shaped] if self._as_bytes else [time, shaped, 0])
        return packed

    def _shaped(self, event: dict[str, Any]) -> Any:
        def own(value: int | None) -> Any:
            if value is None or not self._as_bytes:
                return value
            return b"\x00" * 24 + (value & (1 << 64) - 1).to_bytes(8, "big")

        event = dict(event)
        if "block_hashes" in event:
            event["block_hashes"] = [own(value) for value in event["block_hashes"]]
        if "parent_block_hash" in event:
            event["parent_block_hash"] = own(event["parent_block_hash"])
        return event if self._as_maps else list(event.values())


@contextlib.asynccontextmanager
async def publishing(worker: FakeWorker, *, as_maps: bool = True, as_bytes: bool = False) -> AsyncIterator[Any]:
    """A publisher for each rank, on ports that follow each other, and the labels that name them."""
    worker.keep_kv_logs()
    logs, worker.kv_logs = worker.kv_logs, []  # nothing over HTTP
    first, replay = free_port(), free_port()
    publishers = [Publisher(log, (first + n, replay + n), as_maps, as_bytes) for n, log in enumerate(logs)]
    labels = {
        "kv_events_endpoint": f"tcp://*:{first}",
        "kv_events_replay_endpoint": f"tcp://*:{replay}",
        "kv_events_topic": "kv",
    }
    try:
        yield publishers, labels
    finally:
        for publisher in publishers:
            await publisher.close()


@pytest.mark.parametrize("as_maps", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
async def test_events_over_zeromq_with_replay(as_maps: bool, as_bytes: bool) -> None:
    """From the first event, though the router comes late; and each that is lost on the way is replayed."""
    asked = prompts(6)
    async with (
        FakeWorker(dp_size=2, kv_tokens=2_048) as worker,
        publishing(worker, as_maps=as_maps, as_bytes=as_bytes) as (publishers, labels),
        running_control(**FAST) as control,
    ):
        for n, ids in enumerate(asked[:8]):
            take(worker, n % 2, ids)
        worker_id = await follow(control, worker, "zmq", labels=labels)
        await agrees(control, worker, asked)
        publishers[1].lost = {publishers[1].log.next + 1, publishers[1].log.next + 2}
        for n, ids in enumerate(asked[8:]):
            take(worker, n % 2, ids)
            await asyncio.sleep(0.002)
        await agrees(control, worker, asked)
        rows = await told(control, worker_id, lambda rows: rows[1]["gaps"] == 1)
        assert (rows[0]["gaps"], rows[0]["losses"], rows[1]["losses"]) == (0, 0, 0)
        assert [row["tokens"] for row in rows] == [cache.used_tokens for cache in worker.caches]


async def test_what_is_lost_for_good_does_not_count() -> None:
    """No claim outlives a gap that cannot be made good; what comes after it, behind a known beginning, counts again."""
    asked = prompts(7)
    async with FakeWorker() as worker, publishing(worker) as (publishers, labels), running_control(**FAST) as control:
        del labels["kv_events_replay_endpoint"]
        worker_id = await follow(control, worker, "zmq", labels=labels)
        await joined(publishers[0], control, worker)
        take(worker, 0, asked[0])
        await agrees(control, worker, asked[:1])
        publishers[0].lost = {publishers[0].log.next}
        take(worker, 0, [7] * 200)
        take(worker, 0, [8] * 200)
        await told(control, worker_id, lambda rows: rows[0]["losses"] == 1)
        assert credited(control, 0, asked[0]) == 0 < expected(worker, 0, asked[0])
        assert credited(control, 0, [8] * 200) == expected(worker, 0, [8] * 200) > 0
        worker.caches[0].clear()
        take(worker, 0, asked[0])
        await agrees(control, worker, asked)


async def joined(publisher: Publisher, control: RunningControl, worker: FakeWorker) -> None:
    """A subscriber takes a moment to be known: until then what is published is lost without a trace."""
    async with asyncio.timeout(5):
        while credited(control, 0, [9] * 64) == 0:
            take(worker, 0, [9] * 64)
            worker.caches[0].clear()
            take(worker, 0, [9] * 64)
            await asyncio.sleep(0.02)


async def test_numbers_that_begin_anew_are_another_process() -> None:
    asked = prompts(8)
    async with FakeWorker() as worker, publishing(worker) as (publishers, labels), running_control(**FAST) as control:
        await follow(control, worker, "zmq", labels=labels)
        for ids in asked[:3]:
            take(worker, 0, ids)
        await agrees(control, worker, asked)
        (log,) = [publisher.log for publisher in publishers]
        worker.caches[0].log = None
        worker.caches[0].clear()
        log.restart()
        log.listener = publishers[0].publish
        worker.caches[0].log = log
        take(worker, 0, asked[3])
        await agrees(control, worker, asked)
        assert expected(worker, 0, asked[0]) < expected(worker, 0, asked[3])


# -- what is read


HASH = -5
READ: list[tuple[Any, list[Any]]] = [
    ([], []),
    ([["AllBlocksCleared"], {"type": "AllBlocksCleared"}], [Cleared(), Cleared()]),
    # SGLang and vLLM at first: arrays, some without what stands last
    ([["BlockStored", [HASH], None, [1, 2], 2]], [Stored([(1 << 64) - 5], None, [1, 2], 2, 1, True)]),
    ([["BlockStored", [1, 2], 9, [1, 2], 1, None, "CPU_PINNED"]], [Stored([1, 2], 9, [1, 2], 1, 2, True)]),
    ([["BlockStored", [1], 9, [1], 1, 3, "GPU"]], [Stored([1], 9, [1], 1, 1, False)]),
    ([["BlockRemoved", [1]], ["BlockRemoved", [2], "GPU"]], [Removed([1], None), Removed([2], 1)]),
    # and now: maps
    (
        [{"type": "BlockStored", "block_hashes": [b"\x01" + bytes(30) + b"\x02"], "token_ids": [7], "block_size": 1}],
        [Stored([2], None, [7], 1, 1, True)],
    ),
    (
        [
            {
                "type": "BlockStored",
                "block_hashes": [1],
                "token_ids": [7],
                "block_size": 1,
                "cache_salt": "s",
                "medium": "DISK",
            }
        ],
        [Stored([1], None, [7], 1, 4, False)],
    ),
    (
        [{"type": "BlockStored", "block_hashes": [1], "token_ids": [7], "block_size": 1, "extra_keys": [None]}],
        [Stored([1], None, [7], 1, 1, True)],
    ),
    (
        [{"type": "BlockStored", "block_hashes": [1], "token_ids": [7], "block_size": 1, "extra_keys": [["image"]]}],
        [Stored([1], None, [7], 1, 1, False)],
    ),
    # further groups of layers, and what is not known yet
    ([{"type": "BlockRemoved", "block_hashes": [1], "group_idx": 1}, ["BlockMoved", 1]], []),
]


@pytest.mark.parametrize(("events", "read"), READ)
def test_both_shapes_are_read(events: Any, read: list[Any]) -> None:
    assert read_events(events) == read


@pytest.mark.parametrize(
    "events",
    [
        None,
        [7],
        [[]],
        [["BlockStored", [1], None, [1]]],
        [["BlockStored", ["x"], None, [1], 1]],
        [["BlockStored", [1], None, [-1], 1]],
        [["BlockStored", [1], None, [1], 0]],
        [["BlockRemoved", 1]],
        [{"type": "BlockRemoved"}],
    ],
)
def test_what_cannot_be_read_is_refused(events: Any) -> None:
    with pytest.raises(BadEvent):
        read_events(events)


def test_where_a_worker_publishes() -> None:
    labels = {"kv_events_endpoint": "tcp://*:5557", "kv_events_replay_endpoint": "tcp://0.0.0.0:6557"}
    found = find_publisher(labels, None, "gpu1")
    assert found is not None
    assert found.of_rank(3) == ZmqPublisher("tcp://gpu1:5560", "tcp://gpu1:6560", "")
    config = '{"publisher": "zmq", "endpoint": "tcp://10.0.0.1:7000", "topic": "kv"}'
    assert find_publisher({}, {"kv_events_config": config}, "gpu1") == ZmqPublisher("tcp://10.0.0.1:7000", None, "kv")
    for nothing in (None, {}, {"kv_events_config": None}, {"kv_events_config": '{"publisher": "null"}'}):
        assert find_publisher({}, nothing, "gpu1") is None
    for wrong in ("5557", "http://x:1", "tcp://x", "tcp://:1"):
        with pytest.raises(ValueError, match="no endpoint"):
            find_publisher({"kv_events_endpoint": wrong}, None, "gpu1")
    ipc = find_publisher({"kv_events_endpoint": "ipc:///run/kv"}, None, "gpu1")
    assert ipc is not None
    with pytest.raises(ValueError, match="no port"):
        ipc.of_rank(1)
