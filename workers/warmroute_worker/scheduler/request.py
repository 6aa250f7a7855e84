"""One request on its way from prompt to finish reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from warmroute_worker.kv.cache import PageLease
    from warmroute_worker.kv.radix import PageKey
    from warmroute_worker.messages import Sampling, TokenLogprobs
    from warmroute_worker.scheduler.logit_changes import TokenCounts


class Request:
    """Tokens so far, and how many of them have keys and values in the pool.

    Waiting: no lease. Running: a lease and a row. Prefill and decode are not states: a running request has
    `num_pending` tokens to compute, just one when it decodes, and the step that computes the last one samples the next.
    """

    __slots__ = (
        "_keys",
        "admitted_at",
        "arrived_at",
        "cached_tokens",
        "counts",
        "epoch",
        "expected_uncached",
        "lease",
        "max_new_tokens",
        "num_computed",
        "page_size",
        "priority",
        "prompt_length",
        "rid",
        "row",
        "sampling",
        "seed",
        "stop_token_ids",
        "tokens",
        "told",
        "untold",
    )

    def __init__(
        self,
        rid: str,
        token_ids: list[int],
        max_new_tokens: int,
        stop_token_ids: frozenset[int],
        sampling: Sampling,
        seed: int,
        page_size: int,
        priority: int = 0,
        arrived_at: float = 0.0,
    ) -> None:
        """`seed` is what random numbers are made from, whether the client chose it or not."""
        self.rid = rid
        self.tokens = list(token_ids)
        self.prompt_length = len(token_ids)
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = stop_token_ids
        self.sampling = sampling
        self.seed = seed
        self.page_size = page_size
        self.priority = priority
        self.arrived_at = self.admitted_at = arrived_at
        """Seconds; `admitted_at` of the first time."""
        self.num_computed = 0
        """Tokens whose keys and values are in the pool, or will be by the time that a later plan runs."""
        self.epoch = 0
        """How often it has left the batch."""
        self.cached_tokens: int | None = None
        """Prompt tokens found cached when the request first ran; None before."""
        self.expected_uncached = 0
        """Prompt tokens that were not cached when it came."""
        self.counts: TokenCounts | None = None
        """Of a request whose sampling asks for it, once it has been sampled."""
        first = sampling.prompt_logprobs_from
        self.untold = self.prompt_length if first is None else max(first, 1)
        """The first prompt token that is still to be told; the prompt's length or more if none is."""
        self.told: list[TokenLogprobs] | None = None if first is None else []
        """Of those before; None: it did not ask, or has been given them with its first token."""
        self.lease: PageLease | None = None
        self.row = -1
        self._keys: list[PageKey] = []

    def __repr__(self) -> str:
        return (
            f"<Request {self.rid} [{self.prompt_length} + {self.num_new} tokens, {self.num_computed} computed,"
            f" {'waiting' if self.lease is None else f'row {self.row}'}]>"
        )

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def num_pending(self) -> int:
        """Tokens without keys and values. 0: they are being computed, and the next token is not known yet."""
        return len(self.tokens) - self.num_computed

    @property
    def num_remaining(self) -> int:
        """Tokens it may still generate."""
        return self.max_new_tokens - self.num_new

    @property
    def num_matchable(self) -> int:
        """Tokens that may come from the cache: at least one must be computed to sample the next, and so must be the one
        before each that is told."""
        most = len(self.tokens) - 1
        return min(most, self.untold - 1) if self.untold < self.prompt_length else most

    def told_by(self, start: int, length: int) -> range:
        """The prompt tokens that are told by what is computed at these positions."""
        return range(max(start + 1, self.untold), min(start + length + 1, self.prompt_length))

    def next_length(self, most_told: int) -> int:
        """Of what is pending, how much can be computed without telling more than so many tokens."""
        tells = self.told_by(self.num_computed, self.num_pending)
        return self.num_pending if len(tells) <= most_told else tells[most_told] - 1 - self.num_computed

    def keys(self, num_tokens: int) -> list[PageKey]:
        """The keys of the full pages among the first `num_tokens` tokens."""
        size, count = self.page_size, num_tokens // self.page_size
        for index in range(len(self._keys), count):
            self._keys.append(tuple(self.tokens[index * size : (index + 1) * size]))
        return self._keys[:count]

    def take(self, new: list[int]) -> str | None:
        """Append `new`, of which all but the last have been computed, too. Returns the finish reason, or None."""
        if not new:
            return "length"
        tokens = self.tokens
        tokens += new
        if len(new) > 1:
            self.num_computed += len(new) - 1
        if new[-1] in self.stop_token_ids:
            return "stop"
        return "length" if len(tokens) >= self.prompt_length + self.max_new_tokens else None
