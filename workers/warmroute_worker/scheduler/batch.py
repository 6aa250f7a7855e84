"""Writes a step's chunks down as a StepPlan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from warmroute_worker.scheduler.logit_changes import has_changes, logit_changes
from warmroute_worker.step_plan import NO_IDS, NO_SAMPLING, NOTHING_TOLD, SamplingColumns, StepPlan, ToldColumns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker.scheduler.request import Request
    from warmroute_worker.step_plan import Int64s


_INT32_MAX = 2**31 - 1


_NOTHING = range(0)


class Chunk(NamedTuple):
    """Tokens of a running request that one plan computes."""

    request: Request
    start: int
    length: int
    samples: bool
    """The last pending token is one of them."""
    tells: range
    """Prompt tokens whose logprobs come of it."""
    epoch: int
    """The request's; when it has another, it has left the batch and the tokens are nobody's."""

    @property
    def is_prefill(self) -> bool:
        """Not just the token that was generated last."""
        return self.length > 1 or self.start < self.request.prompt_length

    @classmethod
    def next_of(cls, request: Request, length: int) -> Chunk:
        """The next `length` pending tokens."""
        start = request.num_computed
        tells = request.told_by(start, length) if request.untold < request.prompt_length else _NOTHING
        return cls(request, start, length, length == request.num_pending, tells, request.epoch)


class SamplingMemo:
    """The sampling columns of a plan, for the next one that mostly draws for the same requests."""

    def __init__(self) -> None:
        self._sampled: list[Request] = []
        self._columns = NO_SAMPLING
        self._changes_logits = False
        self._stop_ids: Int64s | None = None

    def of(self, chunks: Sequence[Chunk]) -> SamplingColumns:
        sampled = [chunk.request for chunk in chunks if chunk.samples]
        if sampled != self._sampled:
            self._sampled, self._stop_ids = sampled, None
            self._changes_logits = any(has_changes(request.sampling) for request in sampled)
            self._columns = SamplingColumns(
                temperatures=np.array([request.sampling.temperature for request in sampled], np.float32),
                top_ks=np.array([min(request.sampling.top_k, _INT32_MAX) for request in sampled], np.int32),
                top_ps=np.array([request.sampling.top_p for request in sampled], np.float32),
                min_ps=np.array([request.sampling.min_p for request in sampled], np.float32),
                seeds=np.array([request.seed for request in sampled], np.uint64),
                logprobs=np.array([_reported(request) for request in sampled], np.int32),
            )
        if not self._changes_logits:
            return self._columns
        scaled, added = logit_changes(sampled)
        return replace(self._columns, scaled=scaled, added=added)

    @property
    def is_likeliest(self) -> bool:
        """Of the columns made last: everybody gets the likeliest token, and nothing is said of it."""
        return not self._changes_logits and self._columns.is_greedy and not self._columns.reports

    @property
    def stop_ids(self) -> Int64s:
        """Ids that end one of the requests of the columns made last."""
        if self._stop_ids is None:
            ids = sorted(set().union(*(request.stop_token_ids for request in self._sampled)))
            self._stop_ids = np.array(ids, np.int64)
        return self._stop_ids


def step_plan(
    chunks: Sequence[Chunk],
    page_updates: Sequence[tuple[int, int, int]],
    sampling: SamplingColumns,
    more: int = 0,
    stop_ids: Int64s = NO_IDS,
) -> StepPlan:
    """The plan that computes `chunks`. Decodes must come before prefills, as executors batch them differently."""
    tokens: list[int] = []
    told: list[tuple[int, int, int]] = []
    for request, start, length, _, tells, _ in chunks:
        if tells:
            before = len(tokens) - start - 1
            told += [(before + place, request.tokens[place], _reported(request)) for place in tells]
        if length == 1:
            tokens.append(request.tokens[start])
        else:
            tokens += request.tokens[start : start + length]
    return StepPlan(
        rows=np.array([chunk.request.row for chunk in chunks], np.int32),
        starts=np.array([chunk.start for chunk in chunks], np.int32),
        lengths=np.array([chunk.length for chunk in chunks], np.int32),
        token_ids=np.array(tokens, np.int64),
        sampled=np.array([chunk.samples for chunk in chunks], np.bool_),
        sampling=sampling,
        told=ToldColumns(*np.array(told, np.int64).reshape(-1, 3).T) if told else NOTHING_TOLD,
        page_updates=np.array(page_updates, np.int32).reshape(-1, 3),
        more=more,
        stop_ids=stop_ids,
    )


def _reported(request: Request) -> int:
    return -1 if request.sampling.logprobs is None else request.sampling.logprobs
