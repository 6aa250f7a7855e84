"""What the HTTP process and the driver say to each other over one unix socketpair.

A frame is a 4-byte little-endian length and a msgpack map; its key `type` names the class, the others are the fields.
The driver writes at most one `StepOutput` per step, for all requests together. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

MAX_FRAME_BYTES = 256 << 20
"""A longer length is a broken stream, not a message: a prompt of 10 million token ids is 50 MB."""


# ---- to the driver


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; the defaults of the others switch them off."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    """None: drawn from `--random-seed` and the request's number. The same seed gives the same tokens in any batch."""
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are left out."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time that it has been generated; the next: once it has."""
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Positive logits of tokens of prompt and answer are divided by it, negative ones multiplied."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """How many of the likeliest tokens are reported with each generated one; None: not even its own logprob."""
    prompt_logprobs_from: int | None = None
    """The prompt's tokens from this one on are told, too, with as many of the likeliest as `logprobs` says; at least 1,
    since nothing is before the first. None: none are. What is told is computed, even if it is cached."""
    min_new_tokens: int = 0
    """Before so many, nothing that would end the answer is generated."""


@dataclass(frozen=True, slots=True)
class Generate:
    """Start a request. It is answered by rows of `StepOutput`, the last of which has a `finish_reason`."""

    rid: str
    token_ids: list[int]
    max_new_tokens: int
    """Cut down by the scheduler to what context and pool hold; then the request ends with `length`. 0: the prompt is
    computed and stays in the cache, and its logprobs are told if they are asked for."""
    ignore_eos: bool = False
    stop_token_ids: list[int] = dataclasses.field(default_factory=list)
    """End the request besides the model's own eos ids; heeded even with `ignore_eos`."""
    sampling: Sampling = Sampling()
    priority: int = 0
    """With `--enable-priority-scheduling` higher ones are admitted first."""


@dataclass(frozen=True, slots=True)
class Abort:
    """End a request in whatever state it is; an unknown or finished `rid` is no error. Answered by a row `abort`."""

    rid: str


@dataclass(frozen=True, slots=True)
class Flush:
    """Empty the prefix cache; refused while requests run or wait. Answered by `Reply` with the same `id`."""

    id: int


@dataclass(frozen=True, slots=True)
class Pause:
    """Compute nothing until `Continue`. Answered by `Reply`.

    `mode`, as in SGLang: `abort` (the HTTP process ends what runs), `in_place` (what runs keeps its pages), `retract`
    (it gives them up, so that the cache can be flushed, and is computed again later).
    """

    id: int
    mode: str


@dataclass(frozen=True, slots=True)
class Continue:
    """Go on. Answered by `Reply`."""

    id: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Begin a trace of every rank's work into `folder`, or with None end it and write it. Answered by `Reply`."""

    id: int
    folder: str | None


@dataclass(frozen=True, slots=True)
class CountExperts:
    """`start experts`: every rank counts for how many rows each expert is chosen; `stop experts`; `dump experts:FOLDER`
    writes the counts down. Answered by `Reply`."""

    id: int
    order: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Of data-parallel ranks that go in step: one has work and waits for the others in that round. From a driver to the
    HTTP process, and from there to all other drivers. Not answered."""

    round: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave now: running requests are not answered any more."""


# ---- from the driver


@dataclass(frozen=True, slots=True)
class Ready:
    """The first message when all went well: what the driver really runs with."""

    context_length: int
    vocab_size: int
    max_total_tokens: int
    """Tokens the KV pool holds."""
    page_size: int
    max_running_requests: int
    eos_token_ids: list[int]
    model_type: str
    architectures: list[str]
    dtype: str
    device: str
    weight_bytes: int
    """Of all ranks together, as is the next: what each rank has a copy of counts as often."""
    kv_pool_bytes: int
    load_seconds: float
    """Until the weights of all ranks were there."""
    attention_backend: str
    """`native`: our own kernel; `torch_native`: torch's."""
    layout: str
    """How the model is divided, such as `tp 2, pp 2`; empty for one rank."""
    collectives: str
    """What carries sums between ranks; `none` if nothing does."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The first and last message when the driver could not start: one line for the user."""

    message: str


class TokenLogprobs(NamedTuple):
    """Of one token, as the model gave them: before temperature, penalties and biases."""

    own: float
    top: list[tuple[int, float]]
    """(token id, logprob) of the likeliest ones, best first."""


class Times(NamedTuple):
    """Of a request until its first token, in seconds."""

    queue: float
    """From when the scheduler got it until it was admitted."""
    prefill: float
    """From then until the token was there."""


class Row(NamedTuple):
    """What one step brought to one request."""

    rid: str
    token_ids: list[int]
    """New tokens. With `stop` the last one is the eos or stop token that ended it: count it, do not print it."""
    finish_reason: str | None
    """`stop`, `length`, `abort` or `error` in the last row of a request, None before."""
    cached_tokens: int
    """Prompt tokens found in the prefix cache; the same in every row of the request."""
    error: str | None
    """One line, only with finish_reason `error`; such a request got no tokens because it could never run."""
    logprobs: TokenLogprobs | None = None
    """Of the one new token, for a request that asked for it."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of the prompt's tokens from `prompt_logprobs_from` on, in the row of the first new token."""
    times: Times | None = None
    """In the row of the first new token."""


@dataclass(frozen=True, slots=True)
class Load:
    """The scheduler after a step. Totals only grow."""

    running: int
    waiting: int
    used_tokens: int
    """KV pool tokens that running requests hold, cached pages they share included; `total_tokens` is all."""
    total_tokens: int
    cached_tokens_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    evicted_tokens_total: int
    retractions_total: int
    """How often a running request had to give up its pages."""
    new_token_ratio: float
    """Share of future tokens that is kept free at present when a request is admitted."""
    waiting_uncached_tokens: int
    """Prompt tokens of waiting requests that were not in the prefix cache when they came."""
    retracted: int
    """Waiting requests that had to give up their pages."""
    prefill_passes_total: int
    """Steps that computed more than decodes."""
    decode_passes_total: int
    prefilled_tokens_total: int
    """Computed in prefills, those of retracted requests again."""
    reused_tokens_total: int
    """Found in the prefix cache, those of retracted requests again."""
    decoded_tokens_total: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    rows: list[Row]
    load: Load


@dataclass(frozen=True, slots=True)
class KvEvents:
    """What the prefix cache gained and lost since the last such message; see `kv.events.CacheEvents`."""

    events: list[list[Any]]


@dataclass(frozen=True, slots=True)
class Reply:
    """To the message with the same `id`."""

    id: int
    ok: bool
    message: str


Message = (
    Generate
    | Abort
    | Flush
    | Pause
    | Continue
    | Profile
    | CountExperts
    | Wake
    | Shutdown
    | Ready
    | Failed
    | StepOutput
    | KvEvents
    | Reply
)

_CLASSES: dict[str, type[Any]] = {cls.__name__: cls for cls in Message.__args__}
_LENGTH = struct.Struct("<I")


def encode(message: Message) -> bytes:
    """One whole frame, length included."""
    payload: bytes = msgpack.packb({"type": type(message).__name__, **_fields(message)}, default=_fields)
    return _LENGTH.pack(len(payload)) + payload


def decode(payload: bytes | memoryview) -> Message:
    """The message of one frame without its length. Raises ValueError for anything that `encode` does not write."""
    try:
        fields = msgpack.unpackb(payload)
        cls = _CLASSES[fields.pop("type")]
        if cls is Generate:
            sampling = fields["sampling"]
            sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
            fields["sampling"] = Sampling(**sampling)
        elif cls is StepOutput:
            fields["rows"] = [_row(row) for row in fields["rows"]]
            fields["load"] = Load(**fields["load"])
        message: Message = cls(**fields)
    except (KeyError, TypeError, AttributeError, ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"not a message of the worker: {error!r}") from error
    return message


class FrameReader:
    """Turns the pieces in which a stream arrives into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes, in order. Raises ValueError for a broken stream, which stays broken."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is longer than {MAX_FRAME_BYTES}")
            end = start + _LENGTH.size + length
            if len(buffer) < end:
                break
            messages.append(decode(bytes(buffer[start + _LENGTH.size : end])))
            start = end
        del buffer[:start]
        return messages


def _row(values: list[Any]) -> Row:
    row = Row(*values)
    if row.logprobs is not None:
        row = row._replace(logprobs=_token_logprobs(row.logprobs))
    if row.prompt_logprobs is not None:
        row = row._replace(prompt_logprobs=[_token_logprobs(told) for told in row.prompt_logprobs])
    if row.times is not None:
        row = row._replace(times=Times(*row.times))
    return row


def _token_logprobs(values: Any) -> TokenLogprobs:
    own, top = values
    return TokenLogprobs(own, [(token, logprob) for token, logprob in top])


def _fields(value: Any) -> dict[str, Any]:
    """One level of a dataclass; msgpack comes back for the dataclasses inside."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
