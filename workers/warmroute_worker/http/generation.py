"""The prompts of one HTTP request on their way through the engine.

The endpoints differ only in how they write answers.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Self

from warmroute_worker import messages
from warmroute_worker.http.errors import ApiError, ErrorCode, invalid
from warmroute_worker.http.service import token_limit
from warmroute_worker.request_state import RequestState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from warmroute_worker.engine_client import EngineClient
    from warmroute_worker.http.fields import Sampling
    from warmroute_worker.http.service import Service


MOST_TOLD = 4_000_000
"""Logprobs of prompts of one HTTP request, the likeliest ones included: some 60 MB on their way from the engine."""


class Generation:
    """A context manager: entering submits all prompts, leaving takes back what is unfinished.

    Leaving does not await, so a cancelled handler (its client has gone) cannot be cut in half.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[list[int]],
        param: str,
        sampling: Sampling,
        *,
        stream: bool,
        names: Sequence[str] | None = None,
        priority: int = 0,
        echo: bool = False,
        dp_rank: int | None = None,
    ) -> None:
        """`names`: what the client calls each prompt. `echo`: answers begin with their prompts. `dp_rank`: who is to
        compute them; None: the engine chooses.

        Raises ApiError when the prompts (field `param`) cannot be taken.
        """
        facts = service.admit(prompts, param, sampling.num_answers)
        self.id = uuid.uuid4().hex
        self.tokenizer = service.tokenizer
        self.answers_each = sampling.num_answers
        """Of every prompt; they stand side by side in `states`."""
        prompts = [prompt for prompt in prompts for _ in range(sampling.num_answers)]
        if sampling.prompt_logprobs_from is not None:
            told = sum(max(len(prompt) - sampling.prompt_logprobs_from, 0) for prompt in prompts)
            told *= 1 + (sampling.logprobs or 0)
            if told > MOST_TOLD:
                raise invalid(
                    f"logprobs of prompts: {told} are wanted, the most is {MOST_TOLD}; ask for fewer tokens or prompts",
                    param,
                )
        self.states: list[RequestState] = []
        self._engine = service.engine
        self._clients: list[EngineClient] = []
        """Who computes each prompt: all answers to one are computed by the same one."""
        self._dp_rank = dp_rank
        self._changed = asyncio.Event()
        self._requests: list[messages.Generate] = []
        limit = token_limit(facts)
        trimmed = frozenset((*facts.eos_token_ids, *sampling.stop_token_ids))
        now = time.monotonic()
        for index, prompt in enumerate(prompts):
            rid = self.id if len(prompts) == 1 else f"{self.id}-{index}"
            room = limit - len(prompt)
            self.states.append(
                RequestState(
                    rid,
                    names[index // sampling.num_answers] if names else rid,
                    len(prompt),
                    service.tokenizer.detokenizer(prompt),
                    sampling.stop,
                    trimmed,
                    self._changed,
                    wants_steps=stream,
                    now=now,
                )
            )
            self.states[-1].tells_logprobs = sampling.logprobs is not None
            first = sampling.prompt_logprobs_from
            if first is not None:
                self.states[-1].prompt_ids = prompt[first:]
            if echo:
                self.states[-1].begin_with(service.tokenizer.decode(prompt))
            self._requests.append(
                messages.Generate(
                    rid=rid,
                    token_ids=prompt,
                    max_new_tokens=room if sampling.max_new_tokens is None else min(sampling.max_new_tokens, room),
                    ignore_eos=sampling.ignore_eos,
                    stop_token_ids=list(sampling.stop_token_ids),
                    priority=priority,
                    sampling=messages.Sampling(
                        temperature=sampling.temperature,
                        top_k=sampling.top_k,
                        top_p=sampling.top_p,
                        min_p=sampling.min_p,
                        frequency_penalty=sampling.frequency_penalty,
                        presence_penalty=sampling.presence_penalty,
                        repetition_penalty=sampling.repetition_penalty,
                        logit_bias=sampling.logit_bias,
                        min_new_tokens=sampling.min_new_tokens,
                        logprobs=sampling.logprobs,
                        prompt_logprobs_from=None if first is None else first + 1,
                        seed=None if sampling.seed is None else sampling.seed + index % sampling.num_answers,
                    ),
                )
            )

    def __enter__(self) -> Self:
        for index, (state, request) in enumerate(zip(self.states, self._requests, strict=True)):
            if index % self.answers_each == 0:
                engine, wanted = self._engine, self._dp_rank
                client = engine.choose() if wanted is None else engine.clients[wanted]
            self._clients.append(client)
            client.submit(state, request)
        self._requests.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for client, state in zip(self._clients, self.states, strict=True):
            client.cancel(state)

    async def begun(self) -> None:
        """Until every prompt has its first token. Raises ApiError when one ends without."""
        while any(state.cached_tokens is None and state.finish is None for state in self.states):
            await self.step()
        if (error := self.failure()) is not None:
            raise error

    async def step(self) -> None:
        """Until something is new."""
        await self._changed.wait()
        self._changed.clear()

    async def finished(self) -> None:
        """Until every prompt is answered. Raises ApiError when one failed."""
        while any(state.finish is None for state in self.states):
            await self.step()
            if (error := self.failure()) is not None:
                raise error

    def failure(self) -> ApiError | None:
        """What is wrong with the first prompt that failed."""
        for state in self.states:
            if state.finish is None or not state.finish.is_failure:
                continue
            if self._engine.failure is not None:
                return ApiError(ErrorCode.ENGINE_FAILED, f"the engine has failed: {self._engine.failure}")
            code = ErrorCode.DRAINING if state.finish.kind == "abort" else ErrorCode.GENERATION_FAILED
            return ApiError(code, state.finish.message)
        return None

    @property
    def dp_ranks(self) -> list[int]:
        """Who computes each answer, once they are submitted."""
        return [client.dp_rank for client in self._clients]

    @property
    def prompt_tokens(self) -> int:
        return sum(state.prompt_tokens for state in self.states[:: self.answers_each])

    @property
    def cached_tokens(self) -> int:
        return sum(state.cached_tokens or 0 for state in self.states[:: self.answers_each])

    @property
    def completion_tokens(self) -> int:
        return sum(len(state.output_ids) for state in self.states)

    def cache_headers(self) -> Mapping[str, str]:
        """For a router that does not want to read the body. Only once `begun`."""
        return {"x-prompt-tokens": str(self.prompt_tokens), "x-cached-tokens": str(self.cached_tokens)}
