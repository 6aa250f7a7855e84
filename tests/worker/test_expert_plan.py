"""Where experts should be, and where a step is cut in two. No torch, no ranks."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmroute_worker import step_plan_wire, two_batches
from warmroute_worker.expert_plan import balancedness, expected, moves, place
from warmroute_worker.step_plan import DECODE, IDLE, NO_CHANGES, PREFILL, Record, SamplingColumns, StepPlan
from warmroute_worker.topology import share


def slots_of(total: int, ranks: int) -> list[range]:
    return [share(total, rank, ranks) for rank in range(ranks)]


@given(st.integers(1, 6), st.integers(1, 24), st.integers(0, 8), st.randoms())
def test_every_expert_is_somewhere_and_every_slot_full(
    ranks: int, experts: int, redundant: int, rng: random.Random
) -> None:
    slots = slots_of(experts + redundant, ranks)
    now = [slot % experts for slot in range(experts + redundant)]
    placed = place([rng.random() for _ in range(experts)], slots, now)
    assert len(placed) == experts + redundant
    assert set(placed) == set(range(experts))
    # What is sent is held by the sender, wanted by the receiver, and no rank misses anything.
    sent = moves(slots, now, placed)
    for source, row in enumerate(sent):
        for destination, sent_experts in enumerate(row):
            for expert in sent_experts:
                assert expert in [now[slot] for slot in slots[source]]
                assert expert not in [now[slot] for slot in slots[destination]]
    for rank, own in enumerate(slots):
        arrived = [expert for row in sent for expert in row[rank]]
        assert len(arrived) == len(set(arrived))
        assert {placed[slot] for slot in own} <= {now[slot] for slot in own} | set(arrived)


@pytest.mark.parametrize(("experts", "ranks", "redundant", "best"), [(64, 8, 8, 0.99), (8, 4, 4, 0.95)])
def test_zipf_loads_become_even(experts: int, ranks: int, redundant: int, best: float) -> None:
    loads = [1 / (n + 1) for n in range(experts)]
    slots = slots_of(experts + redundant, ranks)
    now = [slot % experts for slot in range(experts + redundant)]
    assert expected(loads, slots_of(experts, ranks), list(range(experts))) < 0.5
    assert expected(loads, slots, place(loads, slots, now)) >= best


def test_even_loads_with_noise_move_little() -> None:
    rng = random.Random(0)
    slots, placed = slots_of(288, 32), [slot % 256 for slot in range(288)]
    loads = [1 / (n % 40 + 1) for n in range(256)]
    placed = place(loads, slots, placed)
    again = place([load * rng.uniform(0.97, 1.03) for load in loads], slots, placed)
    assert sum(map(len, (to for row in moves(slots, placed, again) for to in row))) < 288 * 0.75
    assert place(loads, slots, placed) == placed or expected(loads, slots, placed) > 0.9


def test_balancedness() -> None:
    assert balancedness([4, 4]) == balancedness([0, 0]) == 1
    assert balancedness([4, 0]) == 0.5


def plan_of(lengths: list[int], starts: list[int] | None = None, **changes: int) -> StepPlan:
    count = len(lengths)
    empty, ints = np.empty(0, np.float32), np.empty(0, np.int32)
    sampling = SamplingColumns(empty, ints, empty, empty, np.empty(0, np.uint64), ints, NO_CHANGES, NO_CHANGES)
    return StepPlan(
        rows=np.arange(count, dtype=np.int32),
        starts=np.array(starts or [0] * count, np.int32),
        lengths=np.array(lengths, np.int32),
        token_ids=np.arange(sum(lengths), dtype=np.int64),
        sampled=np.ones(count, np.bool_),
        sampling=sampling,
        page_updates=np.array([[0, 0, 7]], np.int32),
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("lengths", "threshold", "first"),
    [
        ([], 0.48, 0),
        ([1], 0.48, 0),
        ([1, 1, 1, 1], 0.48, 2),
        ([1, 1, 1], 0.48, 1),  # between decodes there is nothing else
        ([30, 30], 0.48, 30),
        ([1, 1, 98], 0.48, 50),  # inside the long one
        ([1, 1, 98], 0, 2),
        ([100], 0.48, 50),
        ([100], 0, 0),
    ],
)
def test_where_a_step_is_cut(lengths: list[int], threshold: float, first: int) -> None:
    assert two_batches.first_half(plan_of(lengths), threshold) == first


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_the_halves_are_the_whole(lengths: list[int], data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.integers(0, 50), min_size=len(lengths), max_size=len(lengths)))
    cut = data.draw(st.integers(0, sum(lengths)))
    plan = plan_of(lengths, starts, first_half=cut)
    first, second = plan.cut()
    assert first.token_ids.tolist() + second.token_ids.tolist() == plan.token_ids.tolist()
    assert len(first.token_ids) == cut == first.lengths.sum()
    assert len(first.page_updates) == 1
    assert len(second.page_updates) == 0

    def places(part: StepPlan) -> list[tuple[int, int]]:
        columns = zip(part.rows.tolist(), part.starts.tolist(), part.lengths.tolist(), strict=True)
        return [(row, position) for row, start, length in columns for position in range(start, start + length)]

    assert places(first) + places(second) == places(plan)
    assert all(part.lengths.min() > 0 for part in (first, second) if len(part))


def test_records_say_what_everybody_does() -> None:
    modes = [plan_of(lengths).record.mode for lengths in ([], [1, 1], [1, 5])]
    assert modes == [IDLE, DECODE, PREFILL]
    plan = plan_of([4, 4], first_half=4)
    assert plan.records == [Record(8, 2, PREFILL, 4)]
    assert plan.halves == [(4, 4)]
    assert step_plan_wire.decode(step_plan_wire.encode(plan)).first_half == 4
    for other, halves in ((Record(0, 0, IDLE), [(4, 4), (0, 0)]), (Record(1, 1, DECODE), None)):
        told = np.frombuffer(plan.record.encode() + other.encode(), np.int64).reshape(2, -1)
        together = dataclasses.replace(step_plan_wire.decode(step_plan_wire.encode(plan)), everybody=told)
        assert together.records == [plan.record, other]
        assert together.halves == halves
        assert not together.is_idle
