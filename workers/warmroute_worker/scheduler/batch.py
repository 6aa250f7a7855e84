"""Writes a step's chunks down as a StepPlan."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from warmroute_worker.scheduler.logit_changes import logit_changes
from warmroute_worker.step_plan import SamplingColumns, StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker.scheduler.request import Request


_INT32_MAX = 2**31 - 1


class Chunk(NamedTuple):
    """The next `length` pending tokens of a running request."""

    request: Request
    length: int

    @property
    def samples(self) -> bool:
        return self.length == self.request.num_pending


def step_plan(chunks: Sequence[Chunk], page_updates: Sequence[tuple[int, int, int]]) -> StepPlan:
    """The plan that computes `chunks`. Decodes must come before prefills, as executors batch them differently."""
    tokens: list[int] = []
    for request, length in chunks:
        tokens += request.tokens[request.num_computed : request.num_computed + length]
    sampled = [chunk.request for chunk in chunks if chunk.samples]
    scaled, added = logit_changes(sampled)
    return StepPlan(
        rows=np.array([chunk.request.row for chunk in chunks], np.int32),
        starts=np.array([chunk.request.num_computed for chunk in chunks], np.int32),
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
        page_updates=np.array(page_updates, np.int32).reshape(-1, 3),
    )


def _reported(request: Request) -> int:
    return -1 if request.sampling.logprobs is None else request.sampling.logprobs
