"""The retry decisions, as tables: no clock, no sockets."""

import random
from itertools import pairwise

import pytest

from warmroute.retry import BUDGET_CAP, BUDGET_RESERVE, Decision, Failure, Retries, RetryBudget, RetryPolicy

POLICY = RetryPolicy(
    enabled=True,
    max_attempts=5,
    initial_backoff_seconds=0.05,
    max_backoff_seconds=1.0,
    backoff_multiplier=2.0,
    jitter_factor=0.0,
)
NOW = Decision(0.0, allow_failed=False)


def retries(policy: RetryPolicy = POLICY, budget: RetryBudget | None = None) -> Retries:
    return Retries(policy, budget or RetryBudget(), random.Random(0))


def wait(seconds: float) -> Decision:
    return Decision(seconds, allow_failed=True)


@pytest.mark.parametrize(
    ("failures", "expected"),
    [
        ([Failure.NOT_SENT] * 20, [NOW] * 20),
        ([Failure.NO_ANSWER] * 2, [NOW, None]),
        ([Failure.NOT_SENT, Failure.NO_ANSWER, Failure.NOT_SENT, Failure.NO_ANSWER], [NOW, NOW, NOW, None]),
        ([Failure.BAD_STATUS] * 5, [wait(0.05), wait(0.1), wait(0.2), wait(0.4), None]),
        ([Failure.BAD_STATUS, Failure.NO_ANSWER, Failure.NO_ANSWER], [wait(0.05), NOW, None]),
    ],
)
def test_what_follows_a_failure(failures: list[Failure], expected: list[Decision | None]) -> None:
    state = retries()
    assert [state.after(failure) for failure in failures] == expected


def test_disabled_means_no_second_attempt() -> None:
    off = RetryPolicy(False, 5, 0.05, 1.0, 2.0, 0.0)
    for failure in Failure:
        assert retries(off).after(failure) is None
        assert retries(off).nobody_left(failure) is None


def test_when_all_refused_they_are_asked_again_for_a_while() -> None:
    state = retries()
    waits = []
    assert state.after(Failure.NOT_SENT) == NOW
    while (decision := state.nobody_left(Failure.NOT_SENT)) is not None:
        assert decision.allow_failed
        waits.append(decision.delay_seconds)
    assert waits == [0.05, 0.1, 0.2, 0.4]


def test_a_prompt_that_killed_a_worker_is_not_tried_again_when_nobody_is_left() -> None:
    state = retries()
    assert state.after(Failure.NO_ANSWER) == NOW
    assert state.nobody_left(Failure.NO_ANSWER) is None
    assert state.nobody_left(Failure.NOT_SENT) is None


def test_the_budget_bounds_retries_of_a_fleet_in_trouble() -> None:
    budget = RetryBudget()
    retried = 0
    for _ in range(1000):
        budget.requests += 1
        retried += retries(budget=budget).after(Failure.BAD_STATUS) is not None
    assert retried == pytest.approx(1000 * 0.2 + BUDGET_RESERVE, abs=2)


def test_the_budget_does_not_grow_without_bound() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.requests += 1
    assert budget.withdraw()
    assert budget.balance == BUDGET_CAP - 1


def test_backoff_grows_to_its_bound_and_jitters_around_it() -> None:
    policy = RetryPolicy(True, 5, 0.05, 1.0, 2.0, 0.2)
    generator = random.Random(7)
    waits = [policy.backoff_seconds(retry, generator) for retry in range(12)]
    assert all(a < b for a, b in pairwise(waits[:4]))
    assert all(0.8 <= seconds <= 1.2 for seconds in waits[6:])
    assert len({round(seconds, 6) for seconds in waits[6:]}) > 1
