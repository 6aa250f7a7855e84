"""Request fields to values: parsed once, here, with a 400 that names the field; nobody looks into the JSON again."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from warmroute_worker.http.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

JsonObject = dict[str, Any]

_MAX_PROMPTS = 1024
"""Prompts of one request; more would only make one client's request crowd out all others."""
_MAX_ANSWERS = 128
_MAX_STOP_STRINGS = 64
"""OpenAI allows 4. Each is searched in each new piece of text, so there has to be some bound."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when an answer ends."""

    max_new_tokens: int | None
    """None: as many as the context holds."""
    temperature: float
    """0: greedy."""
    top_p: float
    top_k: int
    """-1: all."""
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    min_new_tokens: int
    num_answers: int
    """To each prompt."""
    logprobs: int | None
    """How many of the likeliest tokens are told with each; None: nothing is."""
    prompt_logprobs_from: int | None
    """The first token of a prompt of which nothing is said; of those behind it the same as of the answer's."""
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool


def json_object(body: bytes) -> JsonObject:
    try:
        value = json.loads(body)
    except ValueError as error:  # includes UnicodeDecodeError
        raise invalid(f"the body is not valid JSON: {error}", None) from error
    except RecursionError as error:
        raise invalid("the body is nested too deeply", None) from error
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", None)
    return value


def sampling(
    fields: Mapping[str, Any],
    *,
    limit: str,
    least: str,
    default_limit: int | None,
    seed: str,
    vocab_size: int,
    logprobs: int | None = None,
    prompt_logprobs_from: int | None = None,
    prefix: str = "",
) -> Sampling:
    """`limit`, `least` and `seed` name the fields for the most and fewest new tokens and the seed; `prefix` goes before
    names in errors."""
    reader = _Reader(fields, prefix)
    max_new_tokens = reader.integer(limit, default_limit, 0, None)
    temperature = reader.number("temperature", 1.0, 0.0, None)
    top_p = reader.number("top_p", 1.0, 0.0, 1.0)
    top_k = reader.integer("top_k", -1, -1, None)
    chosen_seed = reader.integer(seed, None, -(1 << 63), (1 << 63) - 1)
    min_new_tokens = reader.integer(least, 0, 0, None)
    num_answers = reader.integer("n", 1, 1, _MAX_ANSWERS)
    assert top_k is not None, "it has a default"
    assert min_new_tokens is not None, "so has it"
    assert num_answers is not None, "and it"
    repetition_penalty = reader.number("repetition_penalty", 1.0, 0.0, 2.0)
    if not repetition_penalty:
        raise invalid(f"`{prefix}repetition_penalty` must be above 0", f"{prefix}repetition_penalty")
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k or -1,  # 0 means all in vLLM, -1 in SGLang
        min_p=reader.number("min_p", 0.0, 0.0, 1.0),
        frequency_penalty=reader.number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=reader.number("presence_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=repetition_penalty,
        logit_bias=reader.biases("logit_bias", vocab_size),
        min_new_tokens=min_new_tokens,
        num_answers=num_answers,
        logprobs=logprobs,
        prompt_logprobs_from=prompt_logprobs_from,
        seed=None if chosen_seed is None else chosen_seed & ((1 << 63) - 1),
        stop=reader.strings("stop"),
        stop_token_ids=tuple(reader.integers("stop_token_ids")),
        ignore_eos=reader.boolean("ignore_eos", False),
    )


def count(fields: Mapping[str, Any], name: str, most: int) -> int | None:
    """A number from 0 to `most`; None when it is absent."""
    return _Reader(fields, "").integer(name, None, 0, most)


def logprob_start(fields: Mapping[str, Any]) -> int | None:
    """SGLang's `logprob_start_len`; None for -1, which is its default and means the answer only."""
    start = _Reader(fields, "").integer("logprob_start_len", -1, -1, None)
    return None if start == -1 else start


def refuse(fields: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Refuses fields that would change the answer and are not implemented.

    `neutral`: for each of them the values that ask for nothing; null always does.
    """
    for name, values in neutral.items():
        value = fields.get(name)
        if value is not None and value not in values:
            raise invalid(f"`{prefix}{name}` is not supported by this worker; remove it", prefix + name)


def boolean(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    return _Reader(fields, "").boolean(name, default)


def text(fields: Mapping[str, Any], name: str, default: str) -> str:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise invalid(f"`{name}` must be a string", name)
    return value


def prompts(value: Any, name: str, vocab_size: int) -> list[str | list[int]]:
    """One prompt or a list of them, each as text or as token ids."""
    if isinstance(value, str) or _are_integers(value):
        return [_prompt(value, name, vocab_size)]
    if not isinstance(value, list) or not value:
        raise invalid(f"`{name}` must be a string, a list of token ids, or a list of these", name)
    if len(value) > _MAX_PROMPTS:
        raise invalid(f"`{name}` must hold at most {_MAX_PROMPTS} prompts", name)
    return [_prompt(item, f"{name}[{index}]", vocab_size) for index, item in enumerate(value)]


def names(fields: Mapping[str, Any], header: str | None, count: int) -> list[str] | None:
    """What the client calls each of `count` prompts: `rid`, for several a list, else the x-request-id `header`."""
    given = fields.get("rid")
    if given is None:
        given = header
    if given is None:
        return None
    if isinstance(given, str) and given:
        return [given] if count == 1 else [f"{given}-{index}" for index in range(count)]
    if isinstance(given, list) and len(given) == count and all(isinstance(name, str) and name for name in given):
        return given
    raise invalid(f"`rid` must be a string, or a list of {count} strings", "rid")


def priority(fields: Mapping[str, Any]) -> int:
    """0 if none is given."""
    return _Reader(fields, "").integer("priority", 0, -(1 << 31), 1 << 31) or 0


def dp_rank(fields: Mapping[str, Any], header: str | None, size: int) -> int | None:
    """The data-parallel rank that a router or a client wants; `header`: X-data-parallel-rank, as vLLM has it."""
    given = {name: fields.get(name) for name in ("routed_dp_rank", "data_parallel_rank")}
    if header is not None:
        given["x-data-parallel-rank"] = int(header) if header.isdecimal() and len(header) < 10 else header
    for name in given:
        rank = _Reader(given, "").integer(name, None, -(1 << 63), None)
        if rank is not None:
            if not 0 <= rank < size:
                raise invalid(f"{name}={rank} out of range [0, {size})", name)
            return rank
    return None


def _prompt(value: Any, name: str, vocab_size: int) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not _are_integers(value):
        raise invalid(f"`{name}` must be a string or a list of token ids", name)
    if min(value) < 0 or max(value) >= vocab_size:
        raise invalid(f"`{name}` holds ids outside the model's vocabulary of {vocab_size}", name)
    ids: list[int] = value
    return ids


def _are_integers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class _Reader:
    """Typed access to optional fields; null is the same as absent."""

    def __init__(self, fields: Mapping[str, Any], prefix: str) -> None:
        self._fields = fields
        self._prefix = prefix

    def number(self, name: str, default: float, low: float, high: float | None) -> float:
        value = self._fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._wrong(name, "must be a number")
        if value < low or (high is not None and value > high):
            raise self._wrong(name, f"must be at least {low}" if high is None else f"must be in {low} .. {high}")
        return float(value)

    def integer(self, name: str, default: int | None, low: int, high: int | None) -> int | None:
        value = self._fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            raise self._wrong(name, "must be an integer")
        if value < low or (high is not None and value > high):
            raise self._wrong(name, f"must be at least {low}" if high is None else f"must be in {low} .. {high}")
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "must be true or false")
        return value

    def strings(self, name: str) -> tuple[str, ...]:
        value = self._fields.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
            raise self._wrong(name, "must be a string or a list of strings, none of them empty")
        if len(values) > _MAX_STOP_STRINGS:
            raise self._wrong(name, f"must hold at most {_MAX_STOP_STRINGS} strings")
        return tuple(values)

    def biases(self, name: str, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """A map of token ids, as JSON writes keys, to numbers from -100 to 100."""
        value = self._fields.get(name)
        if value is None:
            return ()
        rule = f"must map ids of the vocabulary of {vocab_size} to numbers in -100 .. 100"
        if not isinstance(value, dict):
            raise self._wrong(name, rule)
        biases = []
        for key, bias in value.items():
            is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if (
                not (key.isascii() and key.isdigit())
                or int(key) >= vocab_size
                or not is_number
                or not -100 <= bias <= 100
            ):
                raise self._wrong(name, rule)
            biases.append((int(key), float(bias)))
        return tuple(biases)

    def integers(self, name: str) -> list[int]:
        value = self._fields.get(name)
        if value is None:
            return []
        values = [value] if type(value) is int else value
        if not isinstance(values, list) or not all(type(item) is int and 0 <= item < 1 << 31 for item in values):
            raise self._wrong(name, "must be a list of token ids")
        return values

    def _wrong(self, name: str, rule: str) -> Exception:
        return invalid(f"`{self._prefix}{name}` {rule}", self._prefix + name)
