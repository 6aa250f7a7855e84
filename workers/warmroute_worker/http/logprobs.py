"""Logprobs of an answer's tokens in the words of each endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from warmroute_worker.request_state import RequestState
    from warmroute_worker.tokenizer import Tokenizer

MOST = 20
"""Alternatives per token: OpenAI's limit for chats."""


def of_chat(tokenizer: Tokenizer, state: RequestState, first: int) -> dict[str, Any] | None:
    """Of the tokens from number `first` on; None: they were not asked for."""
    if not state.logprobs:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(token, told.own), "top_logprobs": [entry(*pair) for pair in told.top]}
        for token, told in _told(state, first)
    ]
    return {"content": content, "refusal": None}


def of_completion(tokenizer: Tokenizer, state: RequestState, first: int, offset: int) -> dict[str, Any] | None:
    """As `of_chat`; `offset`: characters of the answer before the token."""
    if not state.logprobs:
        return None

    def text(token: int) -> str:
        return tokenizer.token_bytes(token).decode(errors="replace")

    answer: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, told in _told(state, first):
        answer["tokens"].append(text(token))
        answer["token_logprobs"].append(told.own)
        answer["top_logprobs"].append({text(other): logprob for other, logprob in told.top})
        answer["text_offset"].append(offset)
        offset += len(answer["tokens"][-1])
    return answer


def of_native(state: RequestState) -> dict[str, Any]:
    """SGLang's: [logprob, token id, None] of every token, the one that ended the answer included."""
    pairs = list(zip(state.output_ids, state.logprobs, strict=False))
    return {
        "output_token_logprobs": [[told.own, token, None] for token, told in pairs],
        "output_top_logprobs": [[[logprob, other, None] for other, logprob in told.top] for _, told in pairs],
    }


def _told(state: RequestState, first: int) -> list[tuple[int, Any]]:
    last = state.num_text_tokens
    return list(zip(state.output_ids[first:last], state.logprobs[first:last], strict=True))
