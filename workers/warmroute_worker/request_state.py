"""One prompt in the engine's hands, as the HTTP process sees it: ids come in, text goes out.

Written by `engine_client` when a frame arrives, read by the handler that waits for it; both on the event loop. Time is
passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from warmroute_worker.stop_strings import StopStrings

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from warmroute_worker.messages import TokenLogprobs
    from warmroute_worker.tokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class Finish:
    """Why an answer ended."""

    kind: Literal["stop", "length", "abort", "error"]
    matched: str | int | None = None
    """With `stop`: the stop string, or the id of the token that ended the answer."""
    message: str = ""
    """With `abort` and `error`: one line."""
    wanted: bool = False
    """With `abort`: somebody asked for it (/abort_request), so that what there is, is the answer."""

    @property
    def is_failure(self) -> bool:
        return self.kind in ("abort", "error") and not self.wanted


class Piece(NamedTuple):
    """Some text of an answer."""

    text: str
    tokens: int
    """Of the answer, up to its end."""


class RequestState:
    """Invariant: nothing changes any more once `finish` is set."""

    __slots__ = (
        "_detokenizer",
        "_late",
        "_pending",
        "_stop",
        "_trimmed",
        "arrived",
        "cached_tokens",
        "changed",
        "echoed",
        "finish",
        "last_token_at",
        "logprobs",
        "name",
        "output_ids",
        "prompt_ids",
        "prompt_logprobs",
        "prompt_tokens",
        "rid",
        "tells_logprobs",
        "wants_steps",
    )

    def __init__(
        self,
        rid: str,
        name: str,
        prompt_tokens: int,
        detokenizer: Detokenizer,
        stop_strings: Sequence[str],
        trimmed_ids: frozenset[int],
        changed: asyncio.Event,
        wants_steps: bool,
        now: float,
    ) -> None:
        """`name`: what the client calls it, which need not be unique. `trimmed_ids`: ids that end an answer and are not
        part of its text, when the engine stops at one.

        `changed` is set after each step when `wants_steps`, else only at the first token and at the end.
        """
        self.rid = rid
        self.name = name
        self.prompt_tokens = prompt_tokens
        self.cached_tokens: int | None = None
        """None until the first token; then what the engine found in its prefix cache."""
        self.output_ids: list[int] = []
        self.tells_logprobs = False
        """They were asked for."""
        self.logprobs: list[TokenLogprobs] = []
        """Of each of `output_ids`, when they were asked for."""
        self.prompt_ids: list[int] = []
        """The end of the prompt whose logprobs were asked for; of its first token nothing is said."""
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        """Of each of `prompt_ids`, from the first token of the answer on."""
        self.echoed = 0
        """Characters before the answer."""
        self.finish: Finish | None = None
        self.arrived = now
        self.last_token_at: float | None = None
        self.changed = changed
        self.wants_steps = wants_steps
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop_strings)
        self._trimmed = trimmed_ids
        self._pending: list[Piece] = []
        self._late = False
        """There was something pending when the last row came."""

    def __repr__(self) -> str:
        end = f", {self.finish.kind}" if self.finish else ""
        return f"<RequestState {self.rid}: {self.prompt_tokens} + {len(self.output_ids)} tokens{end}>"

    def advance(
        self,
        token_ids: Sequence[int],
        finish_reason: str | None,
        cached_tokens: int,
        error: str | None,
        logprobs: TokenLogprobs | None = None,
        prompt_logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> bool:
        """Takes one row of a step. Returns whether a stop string ended the answer before the engine did."""
        first = self.cached_tokens is None
        if first:
            self.cached_tokens = cached_tokens
        self.output_ids += token_ids
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if prompt_logprobs is not None and self.prompt_ids:
            self.prompt_logprobs = [None, *prompt_logprobs]
        self._late = bool(self._pending)
        ends_at = self.output_ids[-1] if finish_reason == "stop" and self.output_ids else None
        trimmed = ends_at is not None and ends_at in self._trimmed and bool(token_ids)
        self._take_text_of(token_ids[:-1] if trimmed else token_ids, len(self.output_ids) - len(token_ids))
        stopped_here = self._stop.matched is not None
        if stopped_here:
            self.finish = Finish("stop", self._stop.matched)
        elif finish_reason in ("stop", "length"):
            self._add_text(self._stop.finish(), len(self.output_ids))
            self.finish = Finish("stop", ends_at) if finish_reason == "stop" else Finish("length")
        elif finish_reason is not None:
            self.fail("abort" if finish_reason == "abort" else "error", error or "the engine gave no reason")
        if first or self.wants_steps or self.finish is not None:
            self.changed.set()
        return stopped_here and finish_reason is None

    def _take_text_of(self, new: Sequence[int], before: int) -> None:
        """Of the tokens that came after `before` others. Those behind the one that completes a stop string are dropped
        from `output_ids`."""
        if len(new) <= 1 or not (self._stop or self.wants_steps):
            self._add_text(self._stop.feed(self._detokenizer.feed(new)), before + len(new))
            return
        for count, token in enumerate(new, before + 1):
            self._add_text(self._stop.feed(self._detokenizer.feed([token])), count)
            if self._stop.matched is not None:
                del self.output_ids[count:]
                break

    def _add_text(self, text: str, tokens: int) -> None:
        if text:
            self._pending.append(Piece(text, tokens))

    def begin_with(self, text: str) -> None:
        """Put `text` before the answer, which stop strings do not look at."""
        self._add_text(text, 0)
        self.echoed = len(text)

    def fail(self, kind: Literal["abort", "error"], message: str) -> None:
        self.finish = Finish(kind, message=message)
        self.changed.set()

    def abort(self) -> None:
        """End the answer where it is."""
        self._add_text(self._stop.finish(), len(self.output_ids))
        self.finish = Finish("abort", message="aborted by request", wanted=True)
        self.changed.set()

    @property
    def num_text_tokens(self) -> int:
        """Of `output_ids` without the one that ended the answer."""
        ended = self.finish is not None and self.finish.kind == "stop" and isinstance(self.finish.matched, int)
        return len(self.output_ids) - ended

    def take_text(self) -> str:
        """The text that is new since the last call."""
        pieces, self._pending = self._pending, []
        return "".join(piece.text for piece in pieces)

    def take_pieces(self) -> list[Piece]:
        """The same, if any: token by token, of those that came together; or in one, if there was another row since the
        last call, since who is late has better to do than to send many events."""
        if self._late and self._pending:
            tokens = self._pending[-1].tokens
            return [Piece(self.take_text(), tokens)]
        pieces, self._pending = self._pending, []
        return pieces
