"""The supervisor's decisions, as tables of events: no processes, no clock."""

from __future__ import annotations

import signal

from warmroute_worker.lifecycle import DRAIN_GRACE_SECONDS, KILL_AFTER_SECONDS, Actions, Lifecycle, Part

NOTHING = Actions()
KILL = Actions(kill=True)


def lifecycle() -> Lifecycle:
    return Lifecycle(drain_timeout=30.0, address="http://h:1")


def test_a_worker_that_is_told_to_end() -> None:
    life = lifecycle()
    assert life.ready("a model") == Actions(say="ready on http://h:1 (a model)")
    assert life.terminated(signal.SIGTERM, now=10.0) == Actions(forward=signal.SIGTERM)
    assert life.deadline == 10.0 + 30.0 + DRAIN_GRACE_SECONDS
    assert life.tick(20.0) == NOTHING
    assert life.exited(Part.HTTP, 7, 0, now=21.0) == NOTHING
    assert life.exit_code is None
    assert life.deadline == 21.0 + KILL_AFTER_SECONDS
    assert life.exited(Part.DRIVER, 8, 0, now=21.5) == NOTHING
    assert life.exit_code == 0


def test_a_driver_in_the_middle_of_a_long_step_does_not_spoil_a_clean_end() -> None:
    life = lifecycle()
    life.terminated(signal.SIGTERM, now=0.0)
    life.exited(Part.HTTP, 7, 0, now=1.0)
    assert life.tick(1.0 + KILL_AFTER_SECONDS) == KILL
    life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=4.0)
    assert life.exit_code == 0


def test_told_to_end_before_the_http_process_knew_the_signal() -> None:
    life = lifecycle()
    life.terminated(signal.SIGINT, now=0.0)
    life.exited(Part.HTTP, 7, -signal.SIGTERM, now=0.1)
    life.exited(Part.DRIVER, 8, 1, now=0.2)
    assert life.exit_code == 0


def test_a_driver_that_ends_just_before_its_peer_is_seen_to() -> None:
    life = lifecycle()
    life.terminated(signal.SIGTERM, now=0.0)
    life.exited(Part.DRIVER, 8, 1, now=1.0)
    life.exited(Part.HTTP, 7, 0, now=1.1)
    assert (life.exit_code, life.cause) == (0, None)


def test_a_driver_that_dies_while_requests_finish() -> None:
    life = lifecycle()
    life.terminated(signal.SIGTERM, now=0.0)
    life.exited(Part.DRIVER, 8, -signal.SIGSEGV, now=1.0)
    life.exited(Part.HTTP, 7, 1, now=2.1)
    assert (life.exit_code, life.cause) == (1, "the engine process (pid 8) was killed by SIGSEGV")


def test_the_second_signal_kills() -> None:
    life = lifecycle()
    life.terminated(signal.SIGINT, now=0.0)
    assert life.terminated(signal.SIGTERM, now=1.0) == KILL
    life.exited(Part.HTTP, 7, -signal.SIGKILL, now=1.1)
    life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=1.1)
    assert life.exit_code == 128 + signal.SIGTERM
    assert life.cause is None


def test_processes_that_do_not_end() -> None:
    life = lifecycle()
    life.terminated(signal.SIGTERM, now=0.0)
    assert life.tick(30.0 + DRAIN_GRACE_SECONDS) == KILL
    life.exited(Part.HTTP, 7, -signal.SIGKILL, now=36.0)
    life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=36.0)
    assert life.exit_code == 1
    assert life.cause == "the processes did not end in time after SIGTERM"


def test_a_killed_driver_leaves_the_http_process_time_for_its_last_words() -> None:
    life = lifecycle()
    assert life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=5.0) == NOTHING
    assert life.tick(5.0 + KILL_AFTER_SECONDS - 0.1) == NOTHING
    assert life.tick(5.0 + KILL_AFTER_SECONDS) == KILL
    life.exited(Part.HTTP, 7, 1, now=6.0)
    assert life.exit_code == 1
    assert life.cause == "the engine process (pid 8) was killed by SIGKILL (out of memory?)"


def test_the_drivers_own_words_are_the_cause_whenever_they_come() -> None:
    for order in ("words first", "exit first"):
        life = lifecycle()
        if order == "words first":
            life.failed("no memory")
        life.exited(Part.DRIVER, 8, 1, now=5.0)
        if order == "exit first":
            life.failed("no memory")
        life.exited(Part.HTTP, 7, 1, now=5.1)
        assert (life.cause, life.exit_code) == ("no memory", 1)


def test_nothing_runs_without_the_http_process() -> None:
    life = lifecycle()
    assert life.exited(Part.HTTP, 7, -signal.SIGSEGV, now=5.0) == KILL
    life.exited(Part.DRIVER, 8, -signal.SIGKILL, now=5.1)
    assert life.cause == "the HTTP process (pid 7) was killed by SIGSEGV"
    assert life.exit_code == 1


def test_an_exit_that_nobody_asked_for_is_an_error_whatever_its_code() -> None:
    life = lifecycle()
    life.exited(Part.DRIVER, 8, 0, now=5.0)
    life.exited(Part.HTTP, 7, 1, now=5.1)
    assert life.cause == "the engine process (pid 8) exited with code 0"
    assert life.exit_code == 1
