"""Logprobs of tokens in the words of each endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute_worker.messages import TokenLogprobs
    from warmroute_worker.request_state import RequestState
    from warmroute_worker.tokenizer import Tokenizer

MOST = 20
"""Alternatives per token: OpenAI's limit for chats."""


def of_chat(tokenizer: Tokenizer, state: RequestState, first: int) -> dict[str, Any] | None:
    """Of the tokens from number `first` on; None: they were not asked for."""
    if not state.tells_logprobs:
        return None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(token, told.own), "top_logprobs": [entry(*pair) for pair in told.top]}
        for token, told in _told(state, first)
        if told is not None
    ]
    return {"content": content, "refusal": None}


def of_completion(tokenizer: Tokenizer, state: RequestState, first: int, offset: int) -> dict[str, Any] | None:
    """As `of_chat`; `offset`: characters of the text before the token. An echoed prompt's tokens come first."""
    if not state.tells_logprobs:
        return None

    def text(token: int) -> str:
        return tokenizer.token_bytes(token).decode(errors="replace")

    answer: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    echoed = tokenizer.detokenizer(())
    for number, (token, told) in enumerate(_told(state, first), first):
        answer["tokens"].append(text(token))
        answer["token_logprobs"].append(None if told is None else told.own)
        answer["top_logprobs"].append(None if told is None else _by_text(text, told))
        if number == len(state.prompt_logprobs) and number > first:
            offset = state.echoed
        answer["text_offset"].append(offset)
        offset += len(echoed.feed([token]) if number < len(state.prompt_logprobs) else answer["tokens"][-1])
    return answer


def of_native(state: RequestState) -> dict[str, Any]:
    """SGLang's: [logprob, token id, None] of every token, the one that ended the answer included."""
    pairs = list(zip(state.output_ids, state.logprobs, strict=False))
    return {
        "output_token_logprobs": [[told.own, token, None] for token, told in pairs],
        "output_top_logprobs": [[[logprob, other, None] for other, logprob in told.top] for _, told in pairs],
    }


def of_native_prompt(state: RequestState) -> dict[str, Any]:
    """The same of the prompt, from `logprob_start_len` on; as in SGLang nothing is said of the first of them."""
    if not state.tells_logprobs:
        return {}
    # An answer may end before its prompt's are known.
    pairs = list(zip(state.prompt_ids, state.prompt_logprobs, strict=True)) if state.prompt_logprobs else []
    return {
        "input_token_logprobs": [[None if told is None else told.own, token, None] for token, told in pairs],
        "input_top_logprobs": [
            None if told is None else [[logprob, other, None] for other, logprob in told.top] for _, told in pairs
        ],
    }


def count(state: RequestState) -> int:
    """How many tokens `of_chat` and `of_completion` can say something of.

    The token that ended an answer is one of them only behind an echoed prompt: who adds up a prompt's logprobs takes
    off as many at the end as were generated.
    """
    if state.prompt_logprobs:
        return len(state.prompt_logprobs) + len(state.output_ids)
    return state.num_text_tokens


def _told(state: RequestState, first: int) -> list[tuple[int, TokenLogprobs | None]]:
    """Tokens from number `first` on, an echoed prompt's included."""
    echoed = len(state.prompt_logprobs)
    begin, end = max(first - echoed, 0), count(state) - echoed
    prompt = zip(state.prompt_ids[first:], state.prompt_logprobs[first:], strict=True) if first < echoed else ()
    return [*prompt, *zip(state.output_ids[begin:end], state.logprobs[begin:end], strict=True)]


def _by_text(text: Callable[[int], str], told: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens; of several with the same text (parts of characters) the likeliest."""
    found: dict[str, float] = {}
    for token, logprob in told.top:
        found.setdefault(text(token), logprob)
    return found
