"""SGLang's own endpoints: /generate, /abort_request, /tokenize, /detokenize."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web

from warmroute_worker.http import fields, logprobs
from warmroute_worker.http.errors import ApiError, ErrorCode, invalid
from warmroute_worker.http.generation import Generation
from warmroute_worker.http.service import SERVICE
from warmroute_worker.http.sse import event, json_bytes, stream_answer

if TYPE_CHECKING:
    from warmroute_worker.request_state import Finish, Piece, RequestState

HEALTH_SECONDS = 20.0
_NEW_TOKENS = 128
"""SGLang's default for `max_new_tokens`."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    "token_ids_logprob": ([],),
    "return_text_in_logprobs": (False,),
    "return_hidden_states": (False,),
    "image_data": ([],),
    "audio_data": ([],),
    "video_data": ([],),
    "input_embeds": (),
    "lora_path": (),
}
_SAMPLING_REFUSED: dict[str, tuple[Any, ...]] = {
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
}


async def generate(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    facts = service.open_facts()
    body = fields.json_object(await request.read())
    fields.refuse(body, _REFUSED)
    dp_rank = fields.dp_rank(body, request.headers.get("x-data-parallel-rank"), len(service.engine.clients))
    given = [name for name in ("text", "input_ids") if body.get(name) is not None]
    if len(given) != 1:
        raise invalid("give either `text` or `input_ids`", "text")
    parameters = body.get("sampling_params") or {}
    if not isinstance(parameters, dict):
        raise invalid("`sampling_params` must be an object", "sampling_params")
    fields.refuse(parameters, _SAMPLING_REFUSED, "sampling_params.")
    top = fields.count(body, "top_logprobs_num", logprobs.MOST) or 0
    told = top if fields.boolean(body, "return_logprob", False) else None
    start = fields.logprob_start(body)
    seed = "seed" if parameters.get("sampling_seed") is None else "sampling_seed"
    sampling = fields.sampling(
        parameters,
        limit="max_new_tokens",
        least="min_new_tokens",
        default_limit=_NEW_TOKENS,
        seed=seed,
        vocab_size=facts.vocab_size,
        logprobs=told,
        prompt_logprobs_from=start if told is not None else None,
        prefix="sampling_params.",
    )
    param, value = given[0], body[given[0]]
    parsed = fields.prompts(value, param, facts.vocab_size)
    batch = (isinstance(value, list) and not isinstance(value[0], int)) or sampling.num_answers > 1
    stream = fields.boolean(body, "stream", False)
    prompts = [await service.token_ids(prompt, param, add_special_tokens=True) for prompt in parsed]
    shortest = min(map(len, prompts))
    if start is not None and start > shortest:
        raise invalid(f"`logprob_start_len` {start} is more than the prompt's {shortest} tokens", "logprob_start_len")
    names = fields.names(body, request.headers.get("x-request-id"), len(prompts))
    priority = fields.priority(body)
    generation = Generation(
        service, prompts, param, sampling, stream=stream, names=names, priority=priority, dp_rank=dp_rank
    )
    if stream:
        return await stream_answer(request, generation, _Chunks(generation, batch))
    with generation:
        await generation.finished()
    answers = [
        {
            "text": state.take_text(),
            "output_ids": state.output_ids,
            "meta_info": _meta_info(state, dp_rank, len(state.output_ids), state.finish)
            | logprobs.of_native_prompt(state),
        }
        for state, dp_rank in zip(generation.states, generation.dp_ranks, strict=True)
    ]
    return web.Response(
        body=json_bytes(answers if batch else answers[0]),
        content_type="application/json",
        headers=generation.cache_headers(),
    )


async def abort_request(request: web.Request) -> web.Response:
    """`{"rid"}` ends the answers to requests whose name begins so, `{"abort_all": true}` all; there may be none."""
    service = request.app[SERVICE]
    service.facts()
    body = fields.json_object(await request.read())
    everything = fields.boolean(body, "abort_all", False)
    name = fields.text(body, "rid", "")
    if not name and not everything:
        raise invalid("`rid` must name a request, or `abort_all` be true", "rid")
    return web.Response(
        body=json_bytes({"aborted": service.engine.abort(None if everything else name)}),
        content_type="application/json",
    )


async def health_generate(request: web.Request) -> web.Response:
    """200 once a token has been made, 503 when none was within `HEALTH_SECONDS`."""
    service = request.app[SERVICE]
    facts = service.open_facts()
    sampling = fields.sampling(
        {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        limit="max_new_tokens",
        least="min_new_tokens",
        default_limit=1,
        seed="seed",
        vocab_size=facts.vocab_size,
    )
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            with Generation(service, [[0]], "input_ids", sampling, stream=False) as generation:
                await generation.finished()
    except TimeoutError:
        raise ApiError(ErrorCode.ENGINE_FAILED, f"no token was made within {HEALTH_SECONDS:g} s") from None
    return web.Response()


async def tokenize(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    facts = service.facts()
    body = fields.json_object(await request.read())
    text = body.get("prompt")
    if not isinstance(text, str):
        raise invalid("`prompt` must be a string", "prompt")
    special = fields.boolean(body, "add_special_tokens", True)
    tokens = await service.token_ids(text, "prompt", add_special_tokens=special)
    answer = {"tokens": tokens, "count": len(tokens), "max_model_len": facts.context_length}
    return web.Response(body=json_bytes(answer), content_type="application/json")


async def detokenize(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    facts = service.facts()
    body = fields.json_object(await request.read())
    given = body.get("tokens")
    tokens = [] if given == [] else fields.prompts(given, "tokens", facts.vocab_size)[0]
    if isinstance(tokens, str):
        raise invalid("`tokens` must be a list of token ids", "tokens")
    return web.Response(body=json_bytes({"text": service.tokenizer.decode(tokens)}), content_type="application/json")


class _Chunks:
    """The events of one streamed answer (`sse.Dialect`). Each holds all text and ids so far, as SGLang's do.

    Both grow as JSON, so that an event costs copying, not encoding, what came before. So do logprobs of the prompt.
    """

    def __init__(self, generation: Generation, batch: bool) -> None:
        self._texts = [bytearray(b'"') for _ in generation.states]
        self._ids = [bytearray() for _ in generation.states]
        self._sent_ids = [0] * len(generation.states)
        self._of_prompts: list[bytes | None] = [None] * len(generation.states)
        self._batch, self._generation = batch, generation

    def opening(self, index: int) -> bytes:
        del index
        return b""

    def progress(self, index: int, state: RequestState, piece: Piece, *, is_last: bool) -> bytes:
        self._texts[index] += json_bytes(piece.text)[1:-1]
        if new := state.output_ids[self._sent_ids[index] : piece.tokens]:
            self._ids[index] += (b"," if self._sent_ids[index] else b"") + json_bytes(new)[1:-1]
            self._sent_ids[index] += len(new)
        parts: list[bytes | bytearray] = [b'{"text":', self._texts[index], b'","output_ids":[', self._ids[index]]
        parts.append(b'],"meta_info":')
        finish = state.finish if is_last else None
        meta = json_bytes(_meta_info(state, self._generation.dp_ranks[index], piece.tokens, finish))
        of_prompt = self._of_prompts[index]
        if of_prompt is None:
            of_prompt = self._of_prompts[index] = json_bytes(logprobs.of_native_prompt(state))[1:-1]
        parts += [meta[:-1], b"," if of_prompt else b"", of_prompt, b"}"]
        parts.append(b',"index":%d}' % index if self._batch else b"}")
        return event(b"".join(parts))

    def closing(self, generation: Generation) -> bytes:
        del generation
        return b""


def _meta_info(state: RequestState, dp_rank: int, tokens: int, finish: Finish | None) -> dict[str, Any]:
    """After so many tokens of the answer."""
    reason: dict[str, Any] | None = None
    if finish is not None and not finish.is_failure:
        reason = {"type": finish.kind}
        if finish.kind == "stop":
            reason["matched"] = finish.matched
        elif finish.kind == "abort":
            reason["message"] = finish.message
        else:
            reason["length"] = tokens
    return {
        "id": state.name,
        "finish_reason": reason,
        "prompt_tokens": state.prompt_tokens,
        "completion_tokens": tokens,
        "cached_tokens": state.cached_tokens or 0,
        "dp_rank": dp_rank,
        "e2e_latency": time.monotonic() - state.arrived,
        "weight_version": "default",
        **(logprobs.of_native(state) if state.tells_logprobs else {}),
    }
