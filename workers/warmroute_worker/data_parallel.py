"""All data-parallel ranks of a worker as one engine: who gets a request, and what is asked of or told to all of them.

A worker without data parallelism is one rank. When one rank fails, the worker has failed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from warmroute_worker.engine_client import EngineClient, Phase

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from warmroute_worker import messages
    from warmroute_worker.metrics import Metrics
    from warmroute_worker.request_state import RequestState


class DataParallelController:
    """Use on one event loop only."""

    def __init__(self, metrics: Metrics, dp_size: int = 1, method: str = "round_robin") -> None:
        """`method`: round_robin, total_requests or total_tokens; see `choose`."""
        self.phase_changed = asyncio.Event()
        """Set whenever the phase of a rank changes; whoever waits for it clears it."""
        self.clients = [EngineClient(metrics.of_rank(rank), rank, self) for rank in range(dp_size)]
        self._method, self._next = method, 0

    @property
    def phase(self) -> Phase:
        """The one in which all are, or that of one which has left it for good."""
        phases = {client.phase for client in self.clients}
        for last in (Phase.FAILED, Phase.CLOSED, Phase.STARTING):
            if last in phases:
                return last
        return Phase.READY

    @property
    def failure(self) -> str | None:
        """With FAILED: why; a reason in words before what a closed socket looks like."""
        failed = [client for client in self.clients if client.failure is not None]
        failed.sort(key=lambda client: not client.failed_with_words)
        return failed[0].failure if failed else None

    @property
    def failed_with_words(self) -> bool:
        """Whether some driver said `failure`; else it died without a word, and only its parent knows how."""
        return any(client.failed_with_words for client in self.clients)

    @property
    def facts(self) -> messages.Ready | None:
        """What a rank says, the same on all of them; None until all are ready."""
        return self.clients[0].facts if all(client.facts is not None for client in self.clients) else None

    @property
    def live(self) -> dict[str, RequestState]:
        """The prompts that all ranks work on."""
        return {rid: state for client in self.clients for rid, state in client.live.items()}

    @property
    def num_live(self) -> int:
        return sum(len(client.live) for client in self.clients)

    def choose(self) -> EngineClient:
        """Who gets the next request that names no rank: in turn; who has the fewest requests, or the fewest tokens
        (of prompts that wait and of all that run), in turn among equals."""
        size = len(self.clients)
        inturn = [self.clients[(self._next + n) % size] for n in range(size)]
        if self._method == "total_requests":
            chosen = min(inturn, key=lambda client: len(client.live))
        elif self._method == "total_tokens":
            chosen = min(inturn, key=lambda client: client.live_tokens)
        else:
            chosen = inturn[0]
        self._next = (chosen.dp_rank + 1) % size
        return chosen

    async def wait_until_idle(self) -> None:
        """Until no rank works on anything."""
        while self.num_live:
            await asyncio.gather(*(client.idle.wait() for client in self.clients))

    def abort(self, name: str | None) -> int:
        """End the answers of all prompts whose names begin so, or of all; how many."""
        return sum(client.abort(name) for client in self.clients)

    def fail_all(self, message: str) -> None:
        """Ends what still runs with an error, in the engine too."""
        for client in self.clients:
            client.fail_all(message)

    async def flush(self) -> messages.Reply:
        """Empties all prefix caches; not ok when requests run. Raises ConnectionError when a driver is gone."""
        return await self._all(EngineClient.flush)

    async def pause(self, mode: str) -> messages.Reply:
        """Nothing is computed until `resume`; see `messages.Pause`. Raises ConnectionError."""
        return await self._all(lambda client: client.pause(mode))

    async def resume(self) -> messages.Reply:
        """Raises ConnectionError."""
        return await self._all(EngineClient.resume)

    async def profile(self, folder: str | None) -> messages.Reply:
        """Begins a trace, or ends it; see `messages.Profile`. Raises ConnectionError."""
        return await self._all(lambda client: client.profile(folder))

    async def count_experts(self, order: str) -> messages.Reply:
        """See `messages.CountExperts`. Raises ConnectionError."""
        return await self._all(lambda client: client.count_experts(order))

    def shut_down(self) -> None:
        """Tells the drivers to end; nothing may be submitted afterwards."""
        for client in self.clients:
            client.shut_down()

    async def _all(self, ask: Callable[[EngineClient], Awaitable[messages.Reply]]) -> messages.Reply:
        """The first answer that is no, or what the first rank says."""
        replies = await asyncio.gather(*map(ask, self.clients))
        return next((reply for reply in replies if not reply.ok), replies[0])

    # What the ranks tell each other through this process.

    def woken(self, by: EngineClient, message: messages.Wake) -> None:
        """One rank has work; the others are told."""
        for client in self.clients:
            if client is not by:
                client.tell(message)

    def changed(self, client: EngineClient) -> None:
        """A rank is in another phase."""
        self.phase_changed.set()
        if client.phase is Phase.FAILED:
            for other in self.clients:
                other.lose(f"{client.failure}")
