"""Penalties, biases and bans as changes of single logits, from what a request has said so far."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from warmroute_worker.step_plan import NO_CHANGES, LogitChanges

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from warmroute_worker.messages import Sampling
    from warmroute_worker.scheduler.request import Request


class TokenCounts:
    """Of one request: which tokens its prompt has, and how often each has been generated. Grows with the request."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt = frozenset(prompt)
        self.generated: Counter[int] = Counter()
        self._seen = len(prompt)

    def see(self, tokens: Sequence[int]) -> None:
        """`tokens`: the whole request, prompt included."""
        self.generated.update(tokens[self._seen :])
        self._seen = len(tokens)


def has_changes(sampling: Sampling) -> bool:
    return bool(
        sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.repetition_penalty != 1
        or sampling.logit_bias
        or sampling.min_new_tokens
    )


def logit_changes(requests: Sequence[Request]) -> tuple[LogitChanges, LogitChanges]:
    """(scaled, added) for the requests that get a token, in their order."""
    scaled: list[tuple[int, int, float]] = []
    added: list[tuple[int, int, float]] = []
    for row, request in enumerate(requests):
        sampling = request.sampling
        if not has_changes(sampling):
            continue
        counts = request.counts
        if counts is None:
            counts = request.counts = TokenCounts(request.tokens[: request.prompt_length])
        counts.see(request.tokens)
        factor = sampling.repetition_penalty
        if factor != 1:
            scaled += [(row, token, factor) for token in counts.prompt | counts.generated.keys()]
        often, once = sampling.frequency_penalty, sampling.presence_penalty
        if often or once:
            added += [(row, token, -often * count - once) for token, count in counts.generated.items()]
        added += [(row, token, value) for token, value in sampling.logit_bias]
        if request.num_new < sampling.min_new_tokens:
            added += [(row, token, -math.inf) for token in request.stop_token_ids]
    return _columns(scaled), _columns(added)


def _columns(changes: Iterable[tuple[int, int, float]]) -> LogitChanges:
    columns = list(zip(*changes, strict=True))
    if not columns:
        return NO_CHANGES
    rows, ids, values = columns
    return LogitChanges(np.array(rows, np.int64), np.array(ids, np.int64), np.array(values, np.float32))
