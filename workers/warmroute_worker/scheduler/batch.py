"""Writes a step's chunks down as a StepPlan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from warmroute_worker.scheduler.logit_changes import logit_changes
from warmroute_worker.step_plan import NOTHING_TOLD, SamplingColumns, StepPlan, ToldColumns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker.scheduler.request import Request


_INT32_MAX = 2**31 - 1


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
        return cls(request, start, length, length == request.num_pending, request.told_by(start, length), request.epoch)


def step_plan(chunks: Sequence[Chunk], page_updates: Sequence[tuple[int, int, int]]) -> StepPlan:
    """The plan that computes `chunks`. Decodes must come before prefills, as executors batch them differently."""
    tokens: list[int] = []
    told: list[tuple[int, int, int]] = []
    for request, start, length, _, tells, _ in chunks:
        before = len(tokens) - start - 1
        told += [(before + place, request.tokens[place], _reported(request)) for place in tells]
        tokens += request.tokens[start : start + length]
    sampled = [chunk.request for chunk in chunks if chunk.samples]
    scaled, added = logit_changes(sampled)
    return StepPlan(
        rows=np.array([chunk.request.row for chunk in chunks], np.int32),
        starts=np.array([chunk.start for chunk in chunks], np.int32),
        lengths=np.array([chunk.length for chunk in chunks], np.int32),
        token_ids=np.array(tokens, np.int64),
        sampled=np.array([chunk.samples for chunk in chunks], np.bool_),
        sampling=SamplingColumns(
            temperatures=np.array([request.sampling.temperature for request in sampled], np.float32),
            top_ks=np.array([min(request.sampling.top_k, _INT32_MAX) for request in sampled], np.int32),
            top_ps=np.array([request.sampling.top_p for request in sampled], np.float32),
            min_ps=np.array([request.sampling.min_p for request in sampled], np.float32),
            seeds=np.array([request.seed for request in sampled], np.uint64),
            positions=np.array([len(request.tokens) for request in sampled], np.int64),
            logprobs=np.array([_reported(request) for request in sampled], np.int32),
            scaled=scaled,
            added=added,
        ),
        told=ToldColumns(*np.array(told, np.int64).reshape(-1, 3).T) if told else NOTHING_TOLD,
        page_updates=np.array(page_updates, np.int32).reshape(-1, 3),
    )


def _reported(request: Request) -> int:
    return -1 if request.sampling.logprobs is None else request.sampling.logprobs
