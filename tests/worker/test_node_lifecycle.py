"""What the supervisors of several nodes decide, as tables of events; and what nodes must have in common."""

from __future__ import annotations

import dataclasses
import signal
from typing import TYPE_CHECKING, Any

import pytest

from warmroute_worker import node_agreement
from warmroute_worker.args import WorkerArgs
from warmroute_worker.lifecycle import (
    DRAIN_GRACE_SECONDS,
    KILL_AFTER_SECONDS,
    NODE_LOST_SECONDS,
    Actions,
    Lifecycle,
    Part,
)
from warmroute_worker.node_lifecycle import NodeLifecycle

if TYPE_CHECKING:
    from pathlib import Path

NOTHING = Actions()
GONE = "node 1 (10.0.0.2) is gone: its connection ended"


def first() -> Lifecycle:
    return Lifecycle(30.0, "http://h:1")


def other() -> NodeLifecycle:
    life = NodeLifecycle(30.0, "node 1 of 2")
    assert life.ready("a model") == Actions(say="node 1 of 2 is ready (a model)")
    return life


# Node 0.


def test_node_0_ends_with_the_first_node_that_is_lost() -> None:
    life = first()
    life.ready("a model")
    assert life.node_ended(GONE, now=10.0) == Actions(stop=GONE)
    assert life.deadline == 10.0 + NODE_LOST_SECONDS
    assert life.node_ended("node 2 (10.0.0.3) ends: " + GONE, now=11.0) == NOTHING
    life.exited(Part.DRIVER, 8, 1, now=11.0)
    life.exited(Part.HTTP, 7, 1, now=12.0)
    assert (life.exit_code, life.cause) == (1, GONE)


def test_what_becomes_of_other_nodes_once_everything_is_served_does_not_matter() -> None:
    life = first()
    life.terminated(signal.SIGTERM, now=0.0)
    life.exited(Part.HTTP, 7, 0, now=1.0)
    assert life.node_ended(GONE, now=1.1) == NOTHING
    assert life.failed("rank 0, pid 9, was killed by SIGKILL") == NOTHING
    life.exited(Part.DRIVER, 8, 1, now=1.2)
    assert (life.exit_code, life.cause) == (0, None)


def test_a_node_that_is_lost_while_requests_finish() -> None:
    life = first()
    life.terminated(signal.SIGTERM, now=0.0)
    assert life.node_ended(GONE, now=1.0) == Actions(stop=GONE)
    life.exited(Part.DRIVER, 8, 1, now=1.5)
    life.exited(Part.HTTP, 7, 1, now=2.5)
    assert (life.exit_code, life.cause) == (1, GONE)


def test_another_node_was_told_to_end() -> None:
    life = first()
    assert life.told_to_drain(now=0.0) == Actions(forward=signal.SIGTERM)
    assert life.told_to_drain(now=1.0) == NOTHING  # it is not the second signal, which kills
    assert life.node_ended(None, now=2.0) == NOTHING
    assert life.exit_code is None


# The others.


def test_another_node_ends_with_0_when_it_was_told_to() -> None:
    life = other()
    assert life.told_to_drain(now=0.0) == NOTHING
    life.exited(Part.DRIVER, 8, 0, now=1.0)
    assert life.exit_code == 0


def test_ranks_that_end_before_node_0_says_that_everything_is_served() -> None:
    life = other()
    life.exited(Part.DRIVER, 8, 0, now=1.0)
    assert life.exit_code is None
    life.node_ended(None, now=1.5)
    assert life.exit_code == 0


def test_ranks_that_do_not_end_well_after_everything_was_served() -> None:
    life = other()
    life.told_to_drain(now=0.0)
    life.exited(Part.DRIVER, 8, 1, now=1.0)
    assert life.deadline == 1.0 + KILL_AFTER_SECONDS  # it is not over yet
    life.node_ended(None, now=1.5)
    assert (life.exit_code, life.cause) == (0, None)


def test_ranks_that_end_unasked() -> None:
    life = other()
    life.exited(Part.DRIVER, 8, 0, now=1.0)
    assert life.tick(1.0 + KILL_AFTER_SECONDS) == Actions(kill=True)
    assert (life.exit_code, life.cause) == (1, "the engine ended, and nobody told it to")


def test_node_0_is_lost() -> None:
    life = other()
    gone = "node 0 (10.0.0.1) is gone: its connection ended"
    assert life.node_ended(gone, now=1.0) == Actions(stop=gone)
    assert life.tick(1.0 + NODE_LOST_SECONDS) == Actions(kill=True)
    life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=5.0)
    assert (life.exit_code, life.cause) == (1, gone)


def test_the_words_of_the_ranks_here_count_before_those_of_node_0() -> None:
    life = other()
    life.failed("rank 1 (tp 1), pid 9, was killed by SIGKILL")
    life.node_ended("node 0 (10.0.0.1) ends: node 1 ...", now=1.0)
    life.exited(Part.DRIVER, 8, 1, now=1.1)
    assert (life.exit_code, life.cause) == (1, "rank 1 (tp 1), pid 9, was killed by SIGKILL")


def test_the_first_signal_is_passed_on_and_the_second_kills() -> None:
    life = other()
    assert life.terminated(signal.SIGTERM, now=0.0) == NOTHING
    assert life.is_draining
    assert life.deadline == 30.0 + DRAIN_GRACE_SECONDS + KILL_AFTER_SECONDS
    assert life.terminated(signal.SIGTERM, now=1.0) == Actions(kill=True)
    life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=1.1)
    assert life.exit_code == 128 + signal.SIGTERM


def test_node_0_never_says_anything_again() -> None:
    life = other()
    life.told_to_drain(now=0.0)
    assert life.tick(30.0 + DRAIN_GRACE_SECONDS + KILL_AFTER_SECONDS) == Actions(kill=True)
    life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=40.0)
    assert (life.exit_code, life.cause) == (1, "the processes did not end in time after SIGTERM")


# What nodes must have in common.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    return tmp_path


def arguments(**changes: Any) -> WorkerArgs:
    both: dict[str, Any] = {"tp_size": 4, "nnodes": 2, "dist_init_addr": "h:1"}
    return WorkerArgs("m", "m", **(both | changes))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(WorkerArgs)])
def test_every_argument_must_agree_or_may_differ(name: str, folder: Path) -> None:
    """What a node does not say must not count as the same."""
    ours = node_agreement.described(arguments(), folder)
    theirs = node_agreement.described(arguments(node_rank=1), folder)
    assert node_agreement.difference(1, theirs, ours) is None
    theirs["flags"].pop(name, None)
    said = node_agreement.difference(1, theirs, ours)
    if name in node_agreement.MAY_DIFFER:
        assert said is None
    else:
        flag = "--" + name.replace("_", "-")
        assert said is not None
        assert said.startswith(f"node 1 was started with {flag} unset, node 0 with ")


def test_versions_and_models_must_agree(folder: Path) -> None:
    ours = node_agreement.described(arguments(), folder)
    older = ours | {"version": "0.0.1"}
    assert node_agreement.difference(1, older, ours) == f"node 1 runs version 0.0.1, node 0 version {ours['version']}"
    (folder / "model.safetensors").write_bytes(b"123456789")
    theirs = node_agreement.described(arguments(node_rank=1), folder)
    assert "node 1 has another model than node 0" in str(node_agreement.difference(1, theirs, ours))
