"""The HTTP process's end of the socket to one driver: frames out, frames in, and who waits for what.

`EngineClient` owns the set of prompts the engine works on (`live`); a prompt leaves it exactly once: when it is
finished, when a stop string ends it, when its client has gone, or when the driver is gone.
"""

from __future__ import annotations

import asyncio
import enum
import time
from typing import TYPE_CHECKING

from warmroute_worker import messages
from warmroute_worker.kv_event_log import KvEventLog

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute_worker.data_parallel import DataParallelController
    from warmroute_worker.metrics import RankMetrics
    from warmroute_worker.request_state import RequestState


_Question = messages.Flush | messages.Pause | messages.Continue | messages.Profile | messages.CountExperts


class Phase(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"
    """Shut down on purpose."""


class EngineClient(asyncio.Protocol):
    """Use on one event loop only."""

    def __init__(self, metrics: RankMetrics, dp_rank: int, controller: DataParallelController) -> None:
        self.dp_rank = dp_rank
        self._controller = controller
        self.phase = Phase.STARTING
        self.failure: str | None = None
        """With FAILED: why."""
        self.failed_with_words = False
        """Whether `failure` is what the driver said; else it died without a word, and only its parent knows how."""
        self.facts: messages.Ready | None = None
        self.load: messages.Load | None = None
        self.kv_events = KvEventLog()
        self.live: dict[str, RequestState] = {}
        self.idle = asyncio.Event()
        """Set while `live` is empty."""
        self.idle.set()
        self._metrics = metrics
        self._born = time.monotonic()
        self._reader = messages.FrameReader()
        self._transport: asyncio.WriteTransport | None = None
        self._replies: dict[int, asyncio.Future[messages.Reply]] = {}
        self._asked = 0

    def __repr__(self) -> str:
        return f"<EngineClient {self.dp_rank} {self.phase.value}, {len(self.live)} live>"

    @property
    def live_tokens(self) -> int:
        """Of all live prompts and their answers so far."""
        return sum(state.prompt_tokens + len(state.output_ids) for state in self.live.values())

    def submit(self, state: RequestState, request: messages.Generate) -> None:
        """Hands a prompt to the engine. Its state is written from now on until it is finished or `cancel`led."""
        self.live[state.rid] = state
        self.idle.clear()
        self._send(request)

    def cancel(self, state: RequestState) -> None:
        """The engine forgets the prompt within one step. Nothing happens when it is finished already."""
        if self._forget(state.rid):
            self._metrics.aborted.inc()
            self._send(messages.Abort(rid=state.rid))

    def abort(self, name: str | None) -> int:
        """End the answers of all prompts whose names begin so, or of all; how many."""
        found = [state for state in self.live.values() if name is None or state.name.startswith(name)]
        for state in found:
            self.cancel(state)
            state.abort()
        return len(found)

    def fail_all(self, message: str) -> None:
        """Ends what still runs with an error, in the engine too."""
        for state in list(self.live.values()):
            self.cancel(state)
            state.fail("abort", message)

    def current_load(self) -> tuple[messages.Load, int] | None:
        """The last step's load and the largest batch; None before the first step."""
        if self.load is None or self.facts is None:
            return None
        return self.load, self.facts.max_running_requests

    async def flush(self) -> messages.Reply:
        """Empties the prefix cache; not ok when requests run. Raises ConnectionError when the driver is gone."""
        return await self._ask(lambda number: messages.Flush(number))

    async def pause(self, mode: str) -> messages.Reply:
        """Nothing is computed until `resume`; see `messages.Pause`. Raises ConnectionError."""
        if mode == "abort":
            self.abort(None)
        return await self._ask(lambda number: messages.Pause(number, mode))

    async def resume(self) -> messages.Reply:
        """Raises ConnectionError."""
        return await self._ask(lambda number: messages.Continue(number))

    async def profile(self, folder: str | None) -> messages.Reply:
        """Begins a trace, or ends it; see `messages.Profile`. Raises ConnectionError."""
        return await self._ask(lambda number: messages.Profile(number, folder))

    async def count_experts(self, order: str) -> messages.Reply:
        """See `messages.CountExperts`. Raises ConnectionError."""
        return await self._ask(lambda number: messages.CountExperts(number, order))

    async def _ask(self, question: Callable[[int], _Question]) -> messages.Reply:
        self._asked += 1
        number = self._asked
        future: asyncio.Future[messages.Reply] = asyncio.get_running_loop().create_future()
        self._replies[number] = future
        self._send(question(number))
        try:
            return await future
        finally:
            self._replies.pop(number, None)

    def tell(self, message: messages.Wake) -> None:
        """Pass on what another rank says."""
        self._send(message)

    def lose(self, message: str) -> None:
        """Another rank of the worker has failed, and so has this one."""
        self._lost(message)

    def shut_down(self) -> None:
        """Tells the driver to end; nothing may be submitted afterwards."""
        self._send(messages.Shutdown())
        self._enter(Phase.CLOSED)

    # The asyncio protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]  # uvloop's does not subclass asyncio's

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            match message:
                case messages.StepOutput():
                    self._step(message, time.monotonic())
                case messages.Ready():
                    self.facts = message
                    self._metrics.started(time.monotonic() - self._born, message.load_seconds)
                    self._enter(Phase.READY)
                case messages.Failed():
                    self.failed_with_words = True
                    self._lost(message.message)
                case messages.Wake():
                    self._controller.woken(self, message)
                case messages.KvEvents():
                    self.kv_events.append(message.events)
                case messages.Reply():
                    waiting = self._replies.get(message.id)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(message)
                case _:
                    raise AssertionError(f"the driver sent {message!r}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if exc is None or isinstance(exc, OSError):
            self._lost("the engine process is gone")
        else:  # ours: asyncio closes the line when `data_received` raises
            self.failed_with_words = True
            self._lost(f"the engine sent what the HTTP process does not understand: {exc}")

    def _step(self, output: messages.StepOutput, now: float) -> None:
        self.load = output.load
        self._metrics.throughput.observe(output.load.generation_tokens_total, now)
        for row in output.rows:
            rid, token_ids = row.rid, row.token_ids
            state = self.live.get(rid)
            if state is None:  # cancelled here while the step ran there
                continue
            self._observe(state, len(token_ids), now)
            if row.times is not None:
                self._metrics.observe_times(row.times)
            stopped_here = state.advance(
                token_ids, row.finish_reason, row.cached_tokens, row.error, row.logprobs, row.prompt_logprobs
            )
            if state.finish is not None:
                self._forget(rid)
                self._metrics.requests.inc()
                self._metrics.request_latency.observe(now - state.arrived)
                if stopped_here:
                    self._send(messages.Abort(rid=rid))

    def _observe(self, state: RequestState, tokens: int, now: float) -> None:
        if not tokens:
            return
        if state.last_token_at is None:
            self._metrics.time_to_first_token.observe(now - state.arrived)
        else:
            for _ in range(tokens):  # as SGLang counts those that come together
                self._metrics.inter_token_latency.observe((now - state.last_token_at) / tokens)
        state.last_token_at = now

    def _lost(self, message: str) -> None:
        if self.phase in (Phase.FAILED, Phase.CLOSED):
            return
        self.failure = message
        self._enter(Phase.FAILED)
        for state in list(self.live.values()):
            self._forget(state.rid)
            state.fail("error", message)
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError(message))

    def _forget(self, rid: str) -> bool:
        """Whether it was live."""
        was_live = self.live.pop(rid, None) is not None
        if not self.live:
            self.idle.set()
        return was_live

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._controller.changed(self)

    def _send(
        self, message: messages.Generate | messages.Abort | messages.Shutdown | messages.Wake | _Question
    ) -> None:
        if self._transport is not None:
            self._transport.write(messages.encode(message))
