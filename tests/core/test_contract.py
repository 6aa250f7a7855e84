"""The `core` part of the extension through Python: what crosses the border, and that it stands as the stub says."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import warmroute
from tests.core.fleet import CHAT, MODEL, NOW, SECOND, add, chat, core, read, release, route, select
from warmroute._core import (
    BadRequest,
    Core,
    Endpoint,
    Lease,
    OutcomeKind,
    RegionBusy,
    RoutedRequest,
    TargetInfo,
    Transition,
    UnknownModel,
    policy_names,
)

KINDS = ["ANSWERED", "CONNECT_FAILED", "NO_ANSWER", "BROKEN_STREAM", "CANCELLED"]


# -- kinds of things


@pytest.mark.parametrize(("enum", "names"), [(OutcomeKind, KINDS), (Endpoint, ["CHAT", "COMPLETIONS", "GENERATE"])])
def test_enums_are_ints_hashable_and_equal_to_themselves(enum: Any, names: list[str]) -> None:
    members = [getattr(enum, name) for name in names]
    assert [int(member) for member in members] == list(range(len(names)))
    assert len(set(members)) == len(names)
    assert all(member == getattr(enum, name) for member, name in zip(members, names, strict=True))
    assert members[0] != members[1]
    assert members[0] != "ANSWERED"


def test_exceptions_are_builtins_children() -> None:
    parents = {BadRequest: ValueError, UnknownModel: LookupError, RegionBusy: TimeoutError}
    assert all(issubclass(child, parent) for child, parent in parents.items())
    assert all(child.__module__ == "warmroute._core" for child in parents)


@pytest.mark.parametrize("made", [Core, Lease, RoutedRequest, TargetInfo, Transition])
def test_classes_are_final_and_say_where_they_are_from(made: type) -> None:
    assert made.__module__ == "warmroute._core"
    with pytest.raises(TypeError):
        type("Child", (made,), {})


def test_policies() -> None:
    assert {"cache_aware", "power_of_two", "round_robin", "random"} <= set(policy_names())
    for policy in policy_names():
        assert route(core(1, policy=policy), chat("hello")) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": "smallest_tree"},
        {"cache_threshold": float("nan")},
        {"max_tree_size": 0},
        {"health_failure_threshold": 0},
        {"breaker_success_threshold": 0},
        {"breaker_failure_threshold": 65_536},
        {"breaker_window_ns": 0},
        {"duration_buckets_ns": [2, 1]},
    ],
)
def test_settings_that_cannot_be_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changed)).split("_")[0]):
        core(**changed)


def test_nothing_has_a_default() -> None:
    with pytest.raises(TypeError, match="missing"):
        Core(policy="random")  # type: ignore[call-arg]


# -- read


def test_a_request_tells_what_its_body_says() -> None:
    made = core()
    body = b'{"model":"m","stream":true,"prompt":"h\\u00e9llo"}'
    request = made.read(b"/v1/completions", b"", body, NOW)
    assert (request.endpoint, request.model, request.stream) == (Endpoint.COMPLETIONS, "m", True)
    assert request.prompt_bytes == len("héllo".encode())
    request = made.read(b"/generate", b"", b'{"text":"hello"}', NOW)
    assert (request.endpoint, request.model, request.stream) == (Endpoint.GENERATE, None, False)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"text"', None),
        (b"\xff", None),
        (b'{"messages": []', None),
        (b"{}", "messages"),
        (b'{"model": 3, "messages": []}', "model"),
    ],
)
def test_a_body_that_cannot_be_routed_is_a_bad_request(body: bytes, param: str | None) -> None:
    made = core(1)
    with pytest.raises(BadRequest) as caught:
        read(made, body)
    message, found = caught.value.args
    assert isinstance(message, str)
    assert message
    assert found == param
    (series,) = made.series()
    assert (series.model, series.accepted, series.answered) == ("other", 1, {400: 1})


def test_read_takes_bytes_and_routed_paths_only() -> None:
    made = core()
    with pytest.raises(ValueError, match="path"):
        made.read(b"/v1/embeddings", b"", b"{}", NOW)
    with pytest.raises(TypeError):
        made.read(CHAT, b"", "{}", NOW)  # type: ignore[arg-type]


# -- select and release


def test_nobody_is_none_and_an_unknown_model_is_an_error() -> None:
    made = core()
    assert made.select(read(made, chat("x")), NOW, False) is None
    made.add_worker([MODEL], 1, 0, None, NOW)
    assert made.select(read(made, chat("x")), NOW, False) is None, "pending"
    add(made, ("other",))
    assert made.select(read(made, chat("x")), NOW, False) is None, "known, but only by the pending one"
    with pytest.raises(UnknownModel) as caught:
        made.select(read(made, chat("x", model="third")), NOW, False)
    assert caught.value.args == ("third",)


def test_a_lease_tells_what_was_chosen() -> None:
    made = core(1)
    lease = select(made, chat("hello " * 100))
    target = made.target(0)
    assert (lease.slot, lease.incarnation, lease.match_bytes, lease.predicted_cached_tokens) == (
        0,
        target.incarnation,
        0,
        0,
    )
    assert lease.splice is None
    assert (target.load, made.load(0), target.outstanding_tokens) == (1, 1, 150)
    again = select(made, chat("hello " * 100))
    assert (again.match_bytes, again.predicted_cached_tokens) == (600, 150)


def test_release_is_idempotent_and_a_drop_is_a_release() -> None:
    made = core(1)
    first, second = select(made, chat("x")), select(made, chat("y"))
    assert release(first) == ()
    assert release(first, OutcomeKind.NO_ANSWER, 0) == ()
    assert made.load(0) == 1
    assert made.take_probe_requests() == []
    del second
    gc.collect()
    assert made.load(0) == 0
    del first
    assert made.load(0) == 0
    made.check_integrity()


def test_a_lease_keeps_what_it_needs() -> None:
    lease = select(core(1), chat("x"))
    gc.collect()
    assert release(lease) == ()


def test_transitions_say_what_moved() -> None:
    made = core(breaker_failure_threshold=2)
    (slot,) = made.add_worker([MODEL], 1, 0, None, NOW)
    (moved,) = made.observe_probe(slot, True, NOW)
    assert (moved.head, moved.machine, moved.previous, moved.current) == (0, "health", "pending", "ready")
    assert release(select(made, chat("x")), OutcomeKind.ANSWERED, 500) == ()
    (moved,) = release(select(made, chat("x")), OutcomeKind.NO_ANSWER, 0)
    assert (moved.head, moved.machine, moved.previous, moved.current) == (0, "breaker", "closed", "open")
    assert repr(moved) == "<Transition of 0: breaker closed -> open>"
    target = made.target(0)
    assert (target.health, target.breaker, target.available, target.failures) == ("ready", "open", False, 2)
    assert made.take_probe_requests() == [0]
    assert made.take_probe_requests() == []


def test_what_failed_a_request_is_left_out_unless_allowed() -> None:
    made = core(2)
    request = read(made, chat("x"))
    used = set()
    for _ in range(2):
        lease = made.select(request, NOW, False)
        assert lease is not None
        used.add(lease.slot)
        release(lease, OutcomeKind.CONNECT_FAILED, 0)
    assert used == {0, 1}
    assert made.select(request, NOW, False) is None
    assert made.select(request, NOW, True) is not None


@pytest.mark.parametrize("body", [chat("x"), b' {"messages": [{"role": "user", "content": "x"}]\n}\n'])
def test_a_rank_is_spliced_in(body: bytes) -> None:
    made = core()
    assert add(made, dp_size=3) == [0, 1, 2]
    lease = select(made, body)
    assert lease.splice is not None
    offset, inserted = lease.splice
    spliced = body[:offset] + inserted + body[offset:]
    assert json.loads(spliced) == json.loads(body) | {"data_parallel_rank": lease.slot}
    pinned = select(made, chat("x", data_parallel_rank=2))
    assert (pinned.slot, pinned.splice) == (2, None)


# -- workers


def test_workers_come_change_and_go() -> None:
    made = core()
    assert made.readiness() == (0, 0)
    assert add(made, ("a", "alias"), 2) == [0, 1]
    assert add(made, ("b",)) == [2]
    assert made.readiness() == (2, 2)
    made.update_worker(2, ["c"], 1_000, None, NOW)
    assert route(made, chat("x", model="c")) == 2
    assert route(made, chat("x", model="alias")) in (0, 1)
    made.drain_worker(0)
    assert made.select(read(made, chat("x", model="a")), NOW, False) is None
    assert [(t.slot, t.head, t.rank, t.draining) for t in made.targets()] == [
        (0, 0, 0, True),
        (1, 0, 1, True),
        (2, 2, 0, False),
    ]
    made.remove_worker(0)
    assert [t.slot for t in made.targets()] == [2]
    assert made.readiness() == (1, 1)
    made.check_integrity()


def test_a_late_release_leaves_the_successor_alone() -> None:
    made = core(1)
    late = select(made, chat("x"))
    made.remove_worker(0)
    add(made)
    current = select(made, chat("x"))
    assert late.incarnation != current.incarnation
    assert release(late, OutcomeKind.NO_ANSWER, 0) == ()
    assert made.load(0) == 1
    made.check_integrity()


def test_a_worker_that_restarted_holds_nothing() -> None:
    made = core(1)
    route(made, chat("hello"))
    assert select(made, chat("hello")).match_bytes == 5
    made.restart_worker(0, NOW)
    assert made.target(0).index_characters == 0
    assert select(made, chat("hello")).match_bytes == 0


def test_mistakes_are_refused() -> None:
    made = core(1)
    for call in (
        lambda: made.add_worker([], 1, 0, None, NOW),
        lambda: made.add_worker([MODEL], 0, 0, None, NOW),
        lambda: made.update_worker(1, [MODEL], 0, None, NOW),
        lambda: made.remove_worker(1),
        lambda: made.drain_worker(4_096),
        lambda: made.restart_worker(1, NOW),
        lambda: made.observe_probe(1, True, NOW),
        lambda: made.load(1),
        lambda: made.target(4_096),
    ):
        with pytest.raises(ValueError, match="worker"):
            call()
    with pytest.raises(MemoryError):
        made.add_worker([MODEL], 4_096, 0, None, NOW)
    with pytest.raises(MemoryError):
        made.add_worker([f"model {i}" for i in range(65)], 1, 0, None, NOW)
    made.check_integrity()


# -- what is counted


def test_answers_are_counted_by_target() -> None:
    made = core(1)
    lease = select(made, chat("hello " * 100))
    lease.release(OutcomeKind.ANSWERED, 200, NOW, None, None, 600, 40, 0, NOW)
    lease = select(made, chat("hello " * 100))
    lease.release(OutcomeKind.ANSWERED, 200, NOW, None, None, 600, -1, 590, NOW)
    lease = select(made, chat("hello " * 100))
    lease.release(OutcomeKind.ANSWERED, 200, NOW, None, None, 600, 2, -1, NOW)
    target = made.target(0)
    assert (target.selections, target.failures, target.completion_tokens) == (3, 0, 42)
    assert (target.prompt_tokens, target.reported_cached_tokens, target.predicted_cached_tokens) == (1_200, 590, 600)
    assert 600 <= target.index_characters < 700


def test_requests_are_counted_by_series() -> None:
    made = core(2)
    request = read(made, chat("x", stream=True, model="any name"))
    for kind, status in ((OutcomeKind.ANSWERED, 503), (OutcomeKind.ANSWERED, 200)):
        lease = made.select(request, NOW, False)
        assert lease is not None
        release(lease, kind, status)
    for _ in range(2):
        request.finish(200, NOW + SECOND // 200, NOW + SECOND // 2)
    read(made, chat("x", stream=True)).finish(499, -1, NOW + 2 * SECOND)

    by_model = {series.model: series for series in made.series()}
    series = by_model[MODEL]
    assert (series.endpoint, series.streaming, series.accepted) == (Endpoint.CHAT, True, 1)
    assert (series.answered, series.attempts, series.retries) == ({200: 1}, 2, 1)
    assert (series.duration_buckets, series.duration_sum_ns) == ([0, 1, 0], SECOND // 2)
    assert (series.first_byte_buckets, series.first_byte_sum_ns) == ([1, 0, 0], SECOND // 200)
    other = by_model["other"]
    assert (other.accepted, other.answered, other.duration_buckets) == (1, {499: 1}, [0, 0, 1])
    assert other.first_byte_buckets == [0, 0, 0]


def test_the_stub_is_the_extensions() -> None:
    stub_folder = Path(warmroute.__file__).parent.parent
    command = [sys.executable, "-m", "mypy.stubtest", "warmroute._core"]
    checked = subprocess.run(command, cwd=stub_folder, capture_output=True, text=True, timeout=100, check=False)
    assert checked.returncode == 0, checked.stdout
