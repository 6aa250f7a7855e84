"""May this request run, ever and now?"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from warmroute_worker.messages import Generate
    from warmroute_worker.scheduler.request import Request

CLIPPED_NEW_TOKENS = 4096
"""Nobody reserves more than this for one request's output: clients send max_tokens in the millions (SGLang's value)."""


def refusal(message: Generate, context_length: int, pool_tokens: int, vocab_size: int) -> str | None:
    """Why the request could never run, in one line; None if it can."""
    length = len(message.token_ids)
    if length == 0:
        return "the prompt is empty"
    if length >= context_length:
        return f"the prompt has {length} tokens, but the context length is {context_length} with the answer"
    if length >= pool_tokens:
        return f"the prompt has {length} tokens, but the KV pool holds {pool_tokens} with the answer"
    if message.max_new_tokens < 0:
        return f"max_new_tokens must be at least 0, got {message.max_new_tokens}"
    if not 0 <= min(message.token_ids) <= max(message.token_ids) < vocab_size:
        return f"the prompt has token ids outside 0 ... {vocab_size - 1}"
    return None


class NewTokenRatio:
    """Which share of the tokens that running requests may still generate is kept free when another one is admitted.

    Most requests stop long before max_new_tokens, so reserving everything would leave the pool half empty. The share
    falls slowly while all goes well and jumps up when a request had to be retracted.
    """

    # SGLang's shape: begin careful, be bold within 600 steps, take a retraction as a sign of having been too bold.
    INITIAL = 0.7
    MINIMUM = 0.1
    DECAY_STEPS = 600
    RETRACTION_PENALTY = 0.2

    def __init__(self, conservativeness: float) -> None:
        self.value = min(1.0, self.INITIAL * conservativeness)
        self._minimum = min(1.0, self.MINIMUM * conservativeness)
        self._decay = (self.value - self._minimum) / self.DECAY_STEPS

    def stepped(self, steps: int = 1) -> None:
        self.value = max(self._minimum, self.value - steps * self._decay)

    def retracted(self) -> None:
        self.value = min(1.0, self.value + self.RETRACTION_PENALTY)

    def reserve_pages(self, running: Iterable[Request], page_size: int) -> int:
        """Pages to keep available for the growth of `running`, rounded up once."""
        tokens = sum(min(request.num_remaining, CLIPPED_NEW_TOKENS) for request in running)
        return -(-int(tokens * self.value) // page_size)
