"""What all handlers share: the model's text side, the engine, and who may come in."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from warmroute_worker.engine_client import Phase
from warmroute_worker.http.errors import ApiError, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker import messages
    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.chat import ChatTemplate
    from warmroute_worker.data_parallel import DataParallelController
    from warmroute_worker.metrics import Metrics
    from warmroute_worker.rank_statuses import RankStatuses
    from warmroute_worker.tokenizer import Tokenizer


_ENCODED_INLINE = 8192
"""Characters. `tokenizers` encodes about 2.6 MB/s, so a shorter text holds the event loop for at most 3 ms."""


@dataclass
class Service:
    """Owned by the application; everything in it lives as long as the process."""

    args: WorkerArgs
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    engine: DataParallelController
    metrics: Metrics
    ranks: RankStatuses
    created: int
    """When the model was loaded, in seconds since 1970; /v1/models says so."""
    draining: bool = False
    """Set on SIGTERM: no new requests."""

    def facts(self) -> messages.Ready:
        """What the driver said when it was ready. Raises ApiError (503) before that and when the engine has failed."""
        engine = self.engine
        if engine.phase is Phase.FAILED:
            raise ApiError(ErrorCode.ENGINE_FAILED, f"the engine has failed: {engine.failure}")
        if engine.facts is None:
            raise ApiError(ErrorCode.STARTING, "the worker is starting: the model is being loaded")
        return engine.facts

    def open_facts(self) -> messages.Ready:
        """`facts`, also raising ApiError (503) when no new requests are taken."""
        if self.draining or self.engine.phase is Phase.CLOSED:
            raise ApiError(ErrorCode.DRAINING, "the worker is shutting down")
        return self.facts()

    async def token_ids(self, prompt: str | list[int], param: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a prompt (field `param`). Long texts are encoded in a thread, so that streams go on meanwhile."""
        if not isinstance(prompt, str):
            return prompt
        encode = functools.partial(self.tokenizer.encode, prompt, add_special_tokens=add_special_tokens)
        try:
            if self.tokenizer.is_raw_bytes or len(prompt) < _ENCODED_INLINE:
                return encode()
            return await asyncio.to_thread(encode)
        except ValueError as error:
            raise ApiError(ErrorCode.INVALID_REQUEST, f"`{param}`: {error}", param) from error

    def admit(self, prompts: Sequence[Sequence[int]], param: str, answers_each: int) -> messages.Ready:
        """The facts, if these prompts may go to the engine now; else raises ApiError. `param` is the prompts' field."""
        facts = self.open_facts()
        limit = token_limit(facts)
        for prompt in prompts:
            if not prompt:
                raise ApiError(ErrorCode.INVALID_REQUEST, f"`{param}` must hold at least one token", param)
            if len(prompt) >= limit:
                raise ApiError(
                    ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                    f"the prompt has {len(prompt)} tokens; with at least one new token, this worker takes at most "
                    f"{limit - 1} (context length {facts.context_length}, KV pool {facts.max_total_tokens} tokens)",
                    param,
                )
        queue = self.args.max_queued_requests
        if (
            queue is not None
            and self.engine.num_live + len(prompts) * answers_each
            > facts.max_running_requests * len(self.engine.clients) + queue
        ):
            raise ApiError(ErrorCode.QUEUE_FULL, f"{self.engine.num_live} requests run or wait; try again later")
        return facts


def token_limit(facts: messages.Ready) -> int:
    """Prompt and answer of one request together: a request that cannot fit into the pool would wait forever."""
    return min(facts.context_length, facts.max_total_tokens)


SERVICE = web.AppKey("service", Service)
