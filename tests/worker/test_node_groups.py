"""Groups over several nodes against what they are to bring, with threads as ranks: nodes of uneven sizes, uneven parts.

What is between nodes is made of barriers here; `test_nodes.py` has gloo and real processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from warmroute_worker import topology
from warmroute_worker._native import CollectiveError, Region
from warmroute_worker.comm.hierarchical import HierarchicalGroup
from warmroute_worker.comm.node_exchange import added
from warmroute_worker.comm.tensor_group import row_ranges
from warmroute_worker.comm.wires import SpanningGroup, Watch, Wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from warmroute_worker._native import Group

TIMEOUT = 30.0
SIZES = [(1, 1), (2, 2), (3, 1), (1, 2, 3)]
WIDTH = 5


class Between:
    """`NodeExchange` inside a process. Counts the rows that cross from node to node."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)
        self.shown: list[Any] = [None] * size
        self._crossing: list[int] = []

    @property
    def crossing(self) -> int:
        return sum(self._crossing)

    def count(self, rows: int) -> None:
        self._crossing.append(rows)

    def all_show(self, node: int, value: Any) -> list[Any]:
        self.shown[node] = value
        self.barrier.wait()
        seen = list(self.shown)
        self.barrier.wait()
        return seen


class BetweenOf:
    def __init__(self, between: Between, node: int) -> None:
        self._between, self._node = between, node

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return added(self._between.all_show(self._node, x))

    def gather(self, x: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        found = self._between.all_show(self._node, x)
        assert [len(part) for part in found] == list(counts)
        return found

    def exchange(self, parts: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
        found = [part[self._node] for part in self._between.all_show(self._node, parts)]
        found[self._node] = parts[self._node]
        assert [len(part) for node, part in enumerate(found) if node != self._node] == [
            count for node, count in enumerate(counts) if node != self._node
        ]
        self._between.count(sum(len(part) for node, part in enumerate(parts) if node != self._node))
        return found


def on_all_ranks(sizes: Sequence[int], work: Callable[[HierarchicalGroup, int], Any]) -> tuple[list[Any], Between]:
    """What `work` returns on each rank."""
    between = Between(len(sizes))
    results: list[Any] = [None] * sum(sizes)
    errors: list[BaseException] = []
    threads = []
    for node, members in enumerate(row_ranges(sizes)):
        groups = region_of(members)

        def run(rank: int, index: int, node: int = node, region: Region | None = groups) -> None:
            try:
                local = None if region is None else local_group(region, rank)
                leads = BetweenOf(between, node) if index == 0 else None
                group = HierarchicalGroup(sizes, node, local, index, leads)  # type: ignore[arg-type]
                results[rank] = work(group, rank)
            except BaseException as error:
                errors.append(error)
                between.barrier.abort()

        threads += [threading.Thread(target=run, args=(rank, index)) for index, rank in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results, between


def plans(members: range) -> list[topology.GroupPlan]:
    return [("some", tuple(members), 2, 64)]  # slots so small that everything is done in pieces


def region_of(members: range) -> Region | None:
    if len(members) == 1:
        return None
    fd = Region.memory_file(members.stop, plans(members))
    try:
        return Region(fd, members.stop, plans(members))
    finally:
        os.close(fd)


def local_group(region: Region, rank: int) -> Group:
    return region.group(0, rank, 0, TIMEOUT, None)


def numbers(seed: object, *shape: int) -> torch.Tensor:
    """Small and whole, so that the order of a sum does not matter."""
    generator = torch.Generator().manual_seed(random.Random(str(seed)).randrange(1 << 30))
    return torch.randint(-50, 50, shape, generator=generator).float()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_the_same_everywhere(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [numbers(rank, 7, WIDTH).to(dtype) for rank in range(sum(sizes))]
    results, _ = on_all_ranks(sizes, lambda group, rank: group.sum(parts[rank].clone()))
    for result in results:
        assert result.dtype == dtype
        assert torch.equal(result, sum(part.float() for part in parts).to(dtype))  # type: ignore[union-attr]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_each_gets_the_rows_of_the_sum_that_it_wants(sizes: tuple[int, ...], seed: int) -> None:
    draw, size = random.Random(seed), sum(sizes)
    counts = [draw.choice([0, 1, 4, 9]) for _ in range(size)]
    wanted = row_ranges(counts)
    parts = [numbers((seed, rank), sum(counts), WIDTH) for rank in range(size)]
    results, between = on_all_ranks(sizes, lambda group, rank: group.sum_rows(parts[rank].clone(), wanted))
    total = torch.stack(parts).sum(dim=0)
    for rank, result in enumerate(results):
        assert torch.equal(result, total[wanted[rank].start : wanted[rank].stop])
    assert between.crossing == sum(counts) * (len(sizes) - 1)  # no row goes to a node that does not want it


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_rows_of_all_stand_one_after_the_other(sizes: tuple[int, ...], seed: int) -> None:
    draw = random.Random(seed)
    counts = [draw.choice([0, 0, 1, 6]) for _ in range(sum(sizes))]
    parts = [numbers((seed, rank), count, WIDTH) for rank, count in enumerate(counts)]
    results, _ = on_all_ranks(sizes, lambda group, rank: group.gather_rows(parts[rank], counts))
    for result in results:
        assert torch.equal(result, torch.cat(parts))


def test_whole_numbers_are_gathered_too() -> None:
    results, _ = on_all_ranks((2, 1), lambda group, rank: group.gather_rows(torch.tensor([[rank, 7]]), [1, 1, 1]))
    assert all(result.tolist() == [[0, 7], [1, 7], [2, 7]] for result in results)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_rows_find_their_receivers(sizes: tuple[int, ...], seed: int) -> None:
    """Seed 0: none leave their node. A row crosses the network once, and only if it must."""
    draw, size = random.Random(seed), sum(sizes)
    node = [number for number, count in enumerate(sizes) for _ in range(count)]
    counts = [[draw.choice([0, 1, 5]) if seed or node[a] == node[b] else 0 for b in range(size)] for a in range(size)]
    rows = {(a, b): numbers((seed, a, b), counts[a][b], WIDTH) for a, b in itertools.product(range(size), repeat=2)}
    sent = [torch.cat([rows[a, b] for b in range(size)]) for a in range(size)]
    results, between = on_all_ranks(sizes, lambda group, rank: group.exchange_rows(sent[rank], counts))
    for rank, result in enumerate(results):
        assert torch.equal(result, torch.cat([rows[a, rank] for a in range(size)]))
    pairs = itertools.product(range(size), repeat=2)
    assert between.crossing == sum(counts[a][b] for a, b in pairs if node[a] != node[b])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_columns_stand_side_by_side_for_who_wants_them(sizes: tuple[int, ...]) -> None:
    size, total = sum(sizes), 11
    whole = numbers("columns", 6, total)
    shares = [topology.share(total, rank, size) for rank in range(size)]
    wanted = [range(rank, rank + 2) if rank % 2 == 0 else None for rank in range(size)]

    def work(group: HierarchicalGroup, rank: int) -> torch.Tensor | None:
        own = whole[:, shares[rank].start : shares[rank].stop]
        return group.join_columns(own, total, wanted[rank])

    results, between = on_all_ranks(sizes, work)
    # To each node the rows that its ranks want, without the columns that it has.
    expected = 0
    for members in row_ranges(sizes):
        rows_here = [rows for rank in members if (rows := wanted[rank]) is not None]
        own = sum(len(shares[rank]) for rank in members)
        if rows_here:
            expected += (rows_here[-1].stop - rows_here[0].start) * (total - own)
    assert between.crossing == expected
    for rank, result in enumerate(results):
        rows = wanted[rank]
        if rows is None:
            assert result is None
        else:
            assert torch.equal(result, whole[rows.start : rows.stop])


# Messages.


@contextlib.contextmanager
def spanning(
    sizes: Sequence[int], timeout: float = TIMEOUT
) -> Iterator[tuple[list[SpanningGroup], list[Region], list[Wire]]]:
    """By rank, the regions by node, and all wires."""
    members = row_ranges(sizes)
    by_node = {node: tuple(ranks) for node, ranks in enumerate(members)}
    ends: dict[tuple[int, int], int] = {}
    for a, b in itertools.combinations(range(len(sizes)), 2):
        ends[a, b], ends[b, a] = (end.detach() for end in socket.socketpair())
    groups, regions = [], []
    all_wires: list[Wire] = []
    for node, ranks in by_node.items():
        several = len(ranks) > 1
        everybody = plans(members[node]) if several else []
        fd = Region.memory_file(sum(sizes), everybody)
        region = Region(fd, sum(sizes), everybody)
        os.close(fd)
        regions.append(region)
        for rank in ranks:
            watch = Watch(region, rank)
            wires = {}
            if rank == ranks[0]:
                others = [other for other in by_node if other != node]
                wires = {other: Wire(ends[node, other], f"node {other}", watch) for other in others}
                all_wires += wires.values()
            local = local_group(region, rank) if several else None
            groups.append(SpanningGroup(by_node, node, local, wires, watch, timeout))
    try:
        yield groups, regions, all_wires
    finally:
        for wire in all_wires:
            wire.close()


def together(groups: Sequence[SpanningGroup], work: Callable[[SpanningGroup, int], Any]) -> list[Any]:
    results: list[Any] = [None] * len(groups)

    def run(rank: int) -> None:
        results[rank] = work(groups[rank], rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_message_reaches_all_whoever_sends_it(sizes: tuple[int, ...]) -> None:
    size = sum(sizes)

    def work(group: SpanningGroup, rank: int) -> list[bytes]:
        group.barrier()
        return [group.message(bytes([root]) * (100 * root) if root == rank else None, root) for root in range(size)]

    expected = [bytes([root]) * (100 * root) for root in range(size)]
    with spanning(sizes) as (groups, _, _):
        assert together(groups, work) == [expected] * size


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_records_and_vectors(sizes: tuple[int, ...]) -> None:
    size = sum(sizes)

    def work(group: SpanningGroup, rank: int) -> tuple[list[int], list[list[float]]]:
        source, target = torch.full((8,), rank), torch.zeros((size, 8), dtype=torch.int64)
        everything = [(0, source.nbytes)] * size
        group.exchange("gather", source.data_ptr(), [source.nbytes] * size, rank, everything, target.data_ptr())
        vectors = []
        for root in range(size):
            vector = torch.full((50,), float(rank))
            group.broadcast(vector.data_ptr(), vector.nbytes, root)
            vectors.append(sorted(set(vector.tolist())))
        return target[:, 0].tolist(), vectors

    expected = (list(range(size)), [[float(root)] for root in range(size)])
    with spanning(sizes) as (groups, _, _):
        assert together(groups, work) == [expected] * size


def test_who_waits_for_another_node_stops_when_all_do() -> None:
    with spanning((1, 1)) as (groups, regions, _):
        timer = threading.Timer(0.1, regions[0].abort, ("node 1 (10.0.0.2) is gone",))
        timer.start()
        with pytest.raises(CollectiveError, match=r"node 1 \(10.0.0.2\) is gone"):
            groups[0].message(None, 1)
        timer.join()
        assert regions[0].get(0, "heartbeat") > 0  # the watchdog sees that it waits, and does not hang


def test_another_node_has_to_come_in_time_where_it_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warmroute_worker.comm.wires.WORDS_SECONDS", 0.1)
    with spanning((1, 1), timeout=0.3) as (groups, regions, _):
        with pytest.raises(CollectiveError, match=r"node 1 did not come within 0.3 s"):
            groups[0].barrier()
        assert regions[0].aborted() == "node 1 did not come within 0.3 s"


def test_a_broken_wire_waits_for_the_words_of_who_knows_more() -> None:
    with spanning((1, 1)) as (groups, regions, wires):
        wires[1].close()
        timer = threading.Timer(0.3, regions[0].abort, ("node 1 (10.0.0.2) ends: rank 1 was killed",))
        timer.start()
        with pytest.raises(CollectiveError, match="rank 1 was killed"):
            groups[0].message(None, 1)
        timer.join()
