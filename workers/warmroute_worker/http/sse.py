"""Server-sent events: one answer as a stream of `data:` lines, one for each token, one write for those that come
together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from warmroute_worker.request_state import Piece

if TYPE_CHECKING:
    from collections.abc import Mapping

    from warmroute_worker.http.errors import ApiError
    from warmroute_worker.http.generation import Generation
    from warmroute_worker.request_state import RequestState

DONE = b"data: [DONE]\n\n"


def json_bytes(value: object) -> bytes:
    """Compact JSON, ASCII only: any text is safe in one line."""
    return json.dumps(value, separators=(",", ":")).encode()


def event(json_text: bytes) -> bytes:
    """One event. JSON holds no raw line breaks, so it is one line."""
    return b"data: " + json_text + b"\n\n"


class Dialect(Protocol):
    """How an endpoint writes an answer as events."""

    def opening(self, index: int) -> bytes:
        """Before the first text of the prompt `index`."""

    def progress(self, index: int, state: RequestState, piece: Piece, *, is_last: bool) -> bytes:
        """New text of a prompt, perhaps none when it is the last; and then how it finished, unless it failed."""

    def closing(self, generation: Generation) -> bytes:
        """After all prompts, before the end mark."""


async def stream_answer(request: web.Request, generation: Generation, dialect: Dialect) -> web.StreamResponse:
    """Runs the generation and relays it. Raises ApiError as long as nothing was sent."""
    with generation:
        await generation.begun()
        # A batch's prompts begin at different times, so only the usage at the end tells its tokens.
        headers = generation.cache_headers() if len(generation.states) == 1 else {}
        stream = await EventStream.begin(request, headers)
        running = dict(enumerate(generation.states))
        events = b"".join(map(dialect.opening, running))
        while True:
            events += _progress(running, dialect)
            if (error := generation.failure()) is not None:
                return await stream.break_off(events, error)
            if not running:
                return await stream.end(events + dialect.closing(generation) + DONE)
            if events:
                await stream.send(events)
            await generation.step()
            events = b""


def _progress(running: dict[int, RequestState], dialect: Dialect) -> bytes:
    """The events of one step; takes finished prompts out of `running`."""
    events = []
    for index, state in list(running.items()):
        pieces = state.take_pieces()
        if state.finish is not None:
            last = pieces.pop() if pieces else Piece("", 0)
            pieces.append(Piece(last.text, len(state.output_ids)))
            del running[index]
        for piece in pieces:
            is_last = state.finish is not None and piece is pieces[-1]
            events.append(dialect.progress(index, state, piece, is_last=is_last))
    return b"".join(events)


class EventStream:
    """The response of one streaming request."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self._request = request
        self._response = response

    @classmethod
    async def begin(cls, request: web.Request, headers: Mapping[str, str]) -> EventStream:
        """Sends the head."""
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", **headers}
        )
        await response.prepare(request)
        return cls(request, response)

    async def send(self, events: bytes) -> None:
        """One write. Raises ConnectionError when the client is gone; waits while its buffers are full."""
        await self._response.write(events)

    async def end(self, events: bytes) -> web.StreamResponse:
        """The last events and a clean end."""
        await self._response.write_eof(events)
        return self._response

    async def break_off(self, events: bytes, error: ApiError) -> web.StreamResponse:
        """The last events, then what is wrong, then a closed connection in the middle of the body.

        A clean end would tell proxies and clients that the answer is complete.
        """
        await self._response.write(events + event(error.body()))
        if self._request.transport is not None:
            self._request.transport.close()
        return self._response
