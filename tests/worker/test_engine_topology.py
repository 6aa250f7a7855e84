"""Who has what: coordinates, groups, shares, and a plan on its way to other ranks. No torch."""

from __future__ import annotations

from dataclasses import is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmroute_worker import step_plan_wire
from warmroute_worker.step_plan import NO_SAMPLING, NOTHING_TOLD, LogitChanges, SamplingColumns, StepPlan, ToldColumns
from warmroute_worker.topology import TENSOR_GROUPS, Layout, Nodes, kv_heads, share
from warmroute_worker.watchdog import Watchdog

SIZES = (1, 2, 3, 4, 8)


def _layout(pp: int, dp: int, attention_tp: int, dp_attention: bool, parts: int) -> Layout:
    tp = attention_tp * dp if dp_attention else attention_tp
    choices = [size for size in range(1, tp + 1) if tp % size == 0]
    return Layout(tp, pp, dp, dp_attention and dp > 1, choices[parts % len(choices)])


layouts = st.builds(
    _layout,
    st.sampled_from(SIZES),
    st.sampled_from(SIZES),
    st.sampled_from((1, 2, 4)),
    st.booleans(),
    st.integers(0, 2),
)


@given(layouts)
def test_each_rank_is_in_one_group_of_each_kind(layout: Layout) -> None:
    groups = layout.groups()
    names = [name for name, *_ in groups]
    assert len(set(names)) == len(groups)
    everybody = list(range(layout.world_size))
    for kind, size in (
        ("plans of", layout.world_size // layout.dp_size),
        ("tp of", layout.tp_size),
        ("experts of", layout.tp_size if layout.ep_size > 1 else 1),
        ("attention of", layout.attention_tp_size if layout.dp_attention else 1),
    ):
        members = [ranks for name, ranks, *_ in groups if name.startswith(kind)]
        assert sorted(rank for ranks in members for rank in ranks) == (everybody if size > 1 else [])
        assert all(len(ranks) == size for ranks in members)
    for rank in everybody:
        place = layout.place(rank)
        assert rank == (place.replica * layout.pp_size + place.pp_rank) * layout.tp_size + place.tp_rank
        assert rank in layout.stage(place.replica, place.pp_rank)
        assert place.tp_rank == place.ep_rank * layout.expert_tp_size + place.expert_tp_rank
        if layout.dp_attention:
            assert place.tp_rank == place.dp_rank * layout.attention_tp_size + place.attention_tp_rank
        else:
            assert place.dp_rank == place.replica
        neighbours = [members for name, members, *_ in groups if name.startswith("from") and rank in members]
        assert len(neighbours) == (not place.is_first_stage) + (not place.is_last_stage)
        assert all(abs(a - b) == layout.tp_size for a, b in neighbours)
    drivers = [place.rank for place in layout.places() if place.is_driver]
    assert tuple(drivers) == layout.drivers()
    assert len([place for place in layout.places() if place.samples]) == layout.dp_size
    with pytest.raises(ValueError, match="there is no rank"):
        layout.place(layout.world_size)


@given(
    st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from([1, 2])
)
def test_groups_are_divided_among_nodes(tp: int, pp: int, dp: int, dp_attention: bool, ep: int) -> None:
    """Of each group every rank is on one node; each node sees its own part, and who speaks for it is its first rank."""
    dp = min(dp, tp) if dp_attention else 1
    layout = Layout(tp, pp, dp, dp_attention and dp > 1, min(ep, tp))
    for count in (n for n in (1, 2, 3, 4) if layout.world_size % n == 0):
        views = [Nodes(layout, count, own) for own in range(count)]
        assert [rank for view in views for rank in view.local_ranks] == list(range(layout.world_size))
        assert all(view.node_of(rank) == view.own for view in views for rank in view.local_ranks)
        spanning = views[0].spanning()
        for name, members, slots, slot_bytes in layout.groups():
            here = [[group for group in view.local_groups() if group[0] == name] for view in views]
            for view, found in zip(views, here, strict=True):
                own = tuple(rank for rank in members if rank in view.local_ranks)
                assert found == ([(name, own, slots, slot_bytes)] if len(own) > 1 else [])
                if name in spanning and own:
                    assert spanning[name][view.own] == own
            assert (name in spanning) == (len({views[0].node_of(rank) for rank in members}) > 1)
            is_tensors = name.startswith(TENSOR_GROUPS)
            assert (name in views[0].wired()) == (name in spanning and not is_tensors)
        assert count > 1 or views[0].local_groups() == layout.groups()


@given(st.integers(0, 1000), st.integers(1, 9))
def test_shares_are_everything_once(total: int, size: int) -> None:
    shares = [share(total, rank, size) for rank in range(size)]
    assert [number for run in shares for number in run] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 6))
def test_every_query_head_finds_its_kv_head(groups: int, per_group: int, size: int) -> None:
    heads = groups * per_group * size  # some multiple of both
    num_kv_heads = groups * size
    for rank in range(size):
        cached = kv_heads(heads, num_kv_heads, rank, size)
        own = share(heads, rank, size)
        run = len(own) // len(cached)
        assert [cached[index // run] for index in range(len(own))] == [h * num_kv_heads // heads for h in own]


@pytest.mark.parametrize(
    ("heads", "kv", "size", "expected"),
    [
        (8, 4, 2, [[0, 1], [2, 3]]),
        (8, 2, 4, [[0], [0], [1], [1]]),
        (6, 3, 2, [[0, 0, 1], [1, 2, 2]]),
        (8, 8, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_kv_heads_are_divided_shared_or_cut(heads: int, kv: int, size: int, expected: list[list[int]]) -> None:
    assert [kv_heads(heads, kv, rank, size) for rank in range(size)] == expected


@given(st.integers(0, 5), st.integers(0, 3), st.integers(0, 4), st.booleans(), st.integers(0, 3))
def test_a_plan_arrives_as_it_was_sent(sequences: int, changes: int, updates: int, decodes: bool, others: int) -> None:
    draw = np.random.default_rng(sequences * 100 + changes * 10 + updates)

    def numbers(count: int, dtype: type[np.generic]) -> np.ndarray:
        return draw.integers(0, 100, count).astype(dtype)

    def logit_changes() -> LogitChanges:
        return LogitChanges(numbers(changes, np.int64), numbers(changes, np.int64), numbers(changes, np.float32))

    plan = StepPlan(
        rows=numbers(sequences, np.int32),
        starts=numbers(sequences, np.int32),
        lengths=np.ones(sequences, np.int32) if decodes else numbers(sequences, np.int32),
        token_ids=numbers(sequences if decodes else 3 * sequences, np.int64),
        sampled=np.ones(sequences, np.bool_) if decodes else numbers(sequences, np.bool_),
        sampling=SamplingColumns(
            temperatures=numbers(sequences, np.float32),
            top_ks=numbers(sequences, np.int32),
            top_ps=numbers(sequences, np.float32),
            min_ps=numbers(sequences, np.float32),
            seeds=numbers(sequences, np.uint64) + np.uint64(1 << 63),
            logprobs=numbers(sequences, np.int32),
            scaled=logit_changes(),
            added=logit_changes(),
        ),
        page_updates=numbers(3 * updates, np.int32).reshape(-1, 3),
        told=NOTHING_TOLD if decodes else ToldColumns(*(numbers(updates, np.int64) for _ in range(3))),
        everybody=numbers(8 * others, np.int64).reshape(-1, 8),
    )
    if decodes and not others:
        plan = replace(plan, more=updates, stop_ids=numbers(changes, np.int64))
    assert decodes <= (plan.logit_rows is None)
    _check_same(step_plan_wire.decode(step_plan_wire.encode(plan)), plan)
    _check_same(step_plan_wire.decode(step_plan_wire.encode(plan), draws=False), replace(plan, sampling=NO_SAMPLING))


def _check_same(one: object, other: object) -> None:
    for name, column in vars(other).items():
        arrived = getattr(one, name)
        if isinstance(column, np.ndarray):
            assert arrived.dtype == column.dtype, name
            assert arrived.shape == column.shape, name
            assert (arrived == column).all(), name
        elif is_dataclass(column):
            _check_same(arrived, column)
        else:
            assert arrived == column, name


def test_the_watchdog_names_who_stands_still() -> None:
    watchdog = Watchdog(Layout(tp_size=2), timeout=4.0)
    assert watchdog.interval == 1.0

    def look(first: int, second: int, now: float) -> str | None:
        return watchdog.observe([{"heartbeat": first, "pid": 10}, {"heartbeat": second, "pid": 11}], now)

    assert look(0, 0, 100.0) is None
    assert look(1, 1, 101.0) is None
    assert look(2, 1, 104.9) is None
    assert look(3, 1, 105.0) == "rank 1 (tp 1), pid 11, has shown no life for 4 s (--watchdog-timeout)"
    assert look(3, 2, 106.0) is None
