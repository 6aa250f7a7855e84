"""OpenAI's endpoints: /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from warmroute_worker.http import fields, logprobs
from warmroute_worker.http.errors import invalid
from warmroute_worker.http.generation import Generation
from warmroute_worker.http.service import SERVICE
from warmroute_worker.http.sse import event, json_bytes, stream_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from warmroute_worker.http.service import Service
    from warmroute_worker.request_state import Piece, RequestState
    from warmroute_worker.tokenizer import Tokenizer

_COMPLETION_TOKENS = 16
"""OpenAI's default for `max_tokens` of /v1/completions; a chat's is what the context holds."""

_SAMPLING_REFUSED: dict[str, tuple[Any, ...]] = {
    "regex": (),
    "ebnf": (),
    "json_schema": (),
}
"""Fields that would change the answer and are not implemented, with the values that ask for nothing."""
_CHAT_REFUSED = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    **_SAMPLING_REFUSED,
}
_COMPLETION_REFUSED = {
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "best_of": (1,),
    **_SAMPLING_REFUSED,
}


async def chat_completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    facts = service.open_facts()
    body = fields.json_object(await request.read())
    fields.refuse(body, _CHAT_REFUSED)
    dp_rank = fields.dp_rank(body, request.headers.get("x-data-parallel-rank"), len(service.engine.clients))
    limit = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    wanted = fields.boolean(body, "logprobs", False)
    top = fields.count(body, "top_logprobs", logprobs.MOST)
    if top and not wanted:
        raise invalid("`top_logprobs` needs `logprobs`: true", "top_logprobs")
    sampling = _sampling(body, limit, None, facts.vocab_size, (top or 0) if wanted else None)
    text = _chat_text(service, body)
    stream = fields.boolean(body, "stream", False)
    prompt = await service.token_ids(text, "messages", add_special_tokens=False)  # the template has written them
    names = fields.names(body, request.headers.get("x-request-id"), 1)
    priority = fields.priority(body)
    generation = Generation(
        service, [prompt], "messages", sampling, stream=stream, names=names, priority=priority, dp_rank=dp_rank
    )
    return await _answer(request, generation, _CHAT, body, stream)


async def completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    facts = service.open_facts()
    body = fields.json_object(await request.read())
    fields.refuse(body, _COMPLETION_REFUSED)
    dp_rank = fields.dp_rank(body, request.headers.get("x-data-parallel-rank"), len(service.engine.clients))
    told = fields.count(body, "logprobs", logprobs.MOST)
    echo = fields.boolean(body, "echo", False)
    sampling = _sampling(body, "max_tokens", _COMPLETION_TOKENS, facts.vocab_size, told, echo=echo)
    given = fields.prompts(body.get("prompt"), "prompt", facts.vocab_size)
    stream = fields.boolean(body, "stream", False)
    prompts = [await service.token_ids(prompt, "prompt", add_special_tokens=True) for prompt in given]
    names = fields.names(body, request.headers.get("x-request-id"), len(prompts))
    priority = fields.priority(body)
    generation = Generation(
        service, prompts, "prompt", sampling, stream=stream, names=names, priority=priority, echo=echo, dp_rank=dp_rank
    )
    return await _answer(request, generation, _COMPLETION, body, stream)


def _sampling(
    body: Mapping[str, Any],
    limit: str,
    default_limit: int | None,
    vocab_size: int,
    told: int | None,
    *,
    echo: bool = False,
) -> fields.Sampling:
    return fields.sampling(
        body,
        limit=limit,
        least="min_tokens",
        default_limit=default_limit,
        seed="seed",
        vocab_size=vocab_size,
        logprobs=told,
        prompt_logprobs_from=0 if echo and told is not None else None,
    )


@dataclass(frozen=True)
class _Format:
    """Where chats and completions differ."""

    id_prefix: str
    kind: str
    chunk_kind: str
    opening: dict[str, Any] | None
    """First chunk of a stream; None: there is none."""
    piece: Callable[[str], dict[str, Any]]
    """A chunk with text; with "" the one that says how it finished."""
    whole: Callable[[str], dict[str, Any]]
    logprobs: Callable[[Tokenizer, RequestState, int, int], dict[str, Any] | None]
    """Of the tokens from a number on (`logprobs.count` is the next one), which stand behind so many characters."""


_CHAT = _Format(
    id_prefix="chatcmpl-",
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    opening={"delta": {"role": "assistant", "content": ""}},
    piece=lambda text: {"delta": {"content": text} if text else {}},
    whole=lambda text: {"message": {"role": "assistant", "content": text}},
    logprobs=lambda tokenizer, state, first, offset: logprobs.of_chat(tokenizer, state, first),
)
_COMPLETION = _Format(
    id_prefix="cmpl-",
    kind="text_completion",
    chunk_kind="text_completion",
    opening=None,
    piece=lambda text: {"text": text},
    whole=lambda text: {"text": text},
    logprobs=logprobs.of_completion,
)


async def _answer(
    request: web.Request, generation: Generation, form: _Format, body: Mapping[str, Any], stream: bool
) -> web.StreamResponse:
    model = fields.text(body, "model", request.app[SERVICE].args.served_model_name)
    common = {"id": form.id_prefix + generation.id, "created": int(time.time()), "model": model}
    if stream:
        return await stream_answer(request, generation, _Chunks(form, common, generation, _include_usage(body)))
    with generation:
        await generation.finished()
    choices = [
        {
            "index": index,
            **form.whole(state.take_text()),
            "logprobs": form.logprobs(generation.tokenizer, state, 0, 0),
            "finish_reason": _finish_reason(state),
        }
        for index, state in enumerate(generation.states)
    ]
    answer = {**common, "object": form.kind, "choices": choices, "usage": _usage(generation)}
    return web.Response(body=json_bytes(answer), content_type="application/json", headers=generation.cache_headers())


class _Chunks:
    """The events of one streamed answer (`sse.Dialect`)."""

    def __init__(self, form: _Format, common: dict[str, Any], generation: Generation, include_usage: bool) -> None:
        self._form = form
        self._tokenizer = generation.tokenizer
        # Tokens whose logprobs are sent, and characters.
        self._told = [(0, 0)] * len(generation.states)
        self._common = {**common, "object": form.chunk_kind}
        self._include_usage = include_usage

    def opening(self, index: int) -> bytes:
        return b"" if self._form.opening is None else self._chunk(index, self._form.opening, None, None)

    def progress(self, index: int, state: RequestState, piece: Piece, *, is_last: bool) -> bytes:
        text = piece.text
        events = self._chunk(index, self._form.piece(text), self._news(index, state, text), None) if text else b""
        if is_last and state.finish is not None and not state.finish.is_failure:
            events += self._chunk(index, self._form.piece(""), self._news(index, state, ""), _finish_reason(state))
        return events

    def _news(self, index: int, state: RequestState, text: str) -> dict[str, Any] | None:
        """Logprobs that were not sent yet, with `text`; None: there are none."""
        first, offset = self._told[index]
        last = logprobs.count(state)
        self._told[index] = max(first, last), offset + len(text)
        return self._form.logprobs(self._tokenizer, state, first, offset) if first < last else None

    def closing(self, generation: Generation) -> bytes:
        if not self._include_usage:
            return b""
        return event(json_bytes({**self._common, "choices": [], "usage": _usage(generation)}))

    def _chunk(
        self, index: int, content: dict[str, Any], told: dict[str, Any] | None, finish_reason: str | None
    ) -> bytes:
        choice = {"index": index, **content, "logprobs": told, "finish_reason": finish_reason}
        return event(json_bytes({**self._common, "choices": [choice]}))


def _chat_text(service: Service, body: Mapping[str, Any]) -> str:
    if service.chat_template is None:
        raise invalid("this model has no chat template; use /v1/completions", "messages")
    try:
        return service.chat_template.render(_messages(body.get("messages")))
    except ValueError as error:
        raise invalid(str(error), "messages") from error


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise invalid("`messages` must be a list of at least one message", "messages")
    messages = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise invalid(f"`{where}` must be an object with a `role`", where)
        if message.get("tool_calls"):
            raise invalid(f"`{where}.tool_calls` is not supported by this worker", f"{where}.tool_calls")
        # Templates know `system`; `developer` is OpenAI's later name for it.
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": _content(message.get("content"), role, f"{where}.content")})
    return messages


def _content(value: Any, role: str, where: str) -> str:
    """A string, or text parts, which are put together as they are."""
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list):
        raise invalid(f"`{where}` must be a string or a list of parts", where)
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise invalid(f"`{where}[{index}]`: only text parts are supported, not {kind!r}", f"{where}[{index}]")
        if not isinstance(part.get("text"), str):
            raise invalid(f"`{where}[{index}].text` must be a string", f"{where}[{index}].text")
        texts.append(part["text"])
    return "".join(texts)


def _include_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise invalid("`stream_options` must be an object", "stream_options")
    return fields.boolean(options, "include_usage", False)


def _usage(generation: Generation) -> dict[str, Any]:
    return {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": generation.completion_tokens,
        "total_tokens": generation.prompt_tokens + generation.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
    }


def _finish_reason(state: RequestState) -> str | None:
    return None if state.finish is None else state.finish.kind
