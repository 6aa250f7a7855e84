"""When a failed attempt may be tried again: pure decisions, no clock, no IO.

Classes of failure, from harmless to harmful (ARCHITECTURE.md, "Failure"):

* NOT_SENT: the worker never saw the request, so another one may have it at once, as often as there are workers. When
  every worker has refused it, back-off and try them again: one of them may be restarting.
* NO_ANSWER: sent whole, then nothing came. The prompt may be what kills workers, so at most one other worker gets it.
* BAD_STATUS: the worker answered with a status that asks for another try. Back-off, bounded by `max_attempts` and by a
  budget that all requests share, so that a fleet in trouble is not asked several times as often as a healthy one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from warmroute.config import RouterConfig

RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})

# Of ten requests two may be retried for their status, over any length of time; the reserve lets small fleets retry at
# all. The ratio is the one of Finagle's and tower's retry budgets.
BUDGET_RATIO = 0.2
BUDGET_RESERVE = 100.0
BUDGET_CAP = 1000.0

# A prompt that kills its worker must not walk the fleet.
MAX_UNANSWERED = 2


class Failure(enum.Enum):
    NOT_SENT = "not_sent"
    NO_ANSWER = "no_answer"
    BAD_STATUS = "bad_status"


@dataclass(frozen=True, slots=True)
class Decision:
    """Try again in `delay_seconds`; `allow_failed`: also workers that have already failed this request."""

    delay_seconds: float
    allow_failed: bool


class RetryBudget:
    """Requests pay in a fraction, retries take out a whole."""

    __slots__ = ("balance", "requests")

    def __init__(self) -> None:
        self.balance = BUDGET_RESERVE
        self.requests = 0
        """Those that have not been paid in yet; whoever begins one counts it here."""

    def withdraw(self) -> bool:
        self.balance = min(self.balance + self.requests * BUDGET_RATIO, BUDGET_CAP)
        self.requests = 0
        if self.balance < 1.0:
            return False
        self.balance -= 1.0
        return True


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The flags. `max_attempts` counts the first attempt too, as sglang-router's `--retry-max-retries` does."""

    enabled: bool
    max_attempts: int
    initial_backoff_seconds: float
    max_backoff_seconds: float
    backoff_multiplier: float
    jitter_factor: float

    @classmethod
    def of(cls, config: RouterConfig) -> RetryPolicy:
        return cls(
            enabled=not config.disable_retries,
            max_attempts=config.retry_max_retries,
            initial_backoff_seconds=config.retry_initial_backoff_ms / 1000,
            max_backoff_seconds=config.retry_max_backoff_ms / 1000,
            backoff_multiplier=config.retry_backoff_multiplier,
            jitter_factor=config.retry_jitter_factor,
        )

    def backoff_seconds(self, retry: int, generator: random.Random) -> float:
        """The wait before retry number `retry` (0: the first)."""
        wait = min(self.initial_backoff_seconds * self.backoff_multiplier**retry, self.max_backoff_seconds)
        return wait * (1 + generator.uniform(-self.jitter_factor, self.jitter_factor))


class Retries:
    """The failures of one request, and what may follow each. Made at the first failure, so that most requests have
    none.
    """

    __slots__ = ("_budget", "_generator", "_policy", "attempts", "backoffs", "unanswered")

    def __init__(self, policy: RetryPolicy, budget: RetryBudget, generator: random.Random) -> None:
        self._policy = policy
        self._budget = budget
        self._generator = generator
        self.attempts = 0
        self.backoffs = 0
        self.unanswered = 0

    def after(self, failure: Failure) -> Decision | None:
        """What follows a failed attempt; None: give up."""
        if not self._policy.enabled:
            return None
        if failure is Failure.NOT_SENT:
            # Costs the fleet nothing and ends by itself, since a failed worker is left out: not counted.
            return Decision(0.0, allow_failed=False)
        self.attempts += 1
        if failure is Failure.NO_ANSWER:
            self.unanswered += 1
            return Decision(0.0, allow_failed=False) if self.unanswered < MAX_UNANSWERED else None
        if self.attempts >= self._policy.max_attempts or not self._budget.withdraw():
            return None
        return self._back_off(allow_failed=True)

    def nobody_left(self, failure: Failure) -> Decision | None:
        """No worker is left that has not failed this request: wait for one of them, or give up."""
        if not self._policy.enabled or failure is Failure.NO_ANSWER or self.unanswered:
            return None
        if self.attempts + self.backoffs + 1 >= self._policy.max_attempts:
            return None
        return self._back_off(allow_failed=True)

    def _back_off(self, *, allow_failed: bool) -> Decision:
        wait = self._policy.backoff_seconds(self.backoffs, self._generator)
        self.backoffs += 1
        return Decision(wait, allow_failed)
