"""The last events of the prefix cache, numbered, and what is cached now, which is the sum of all events."""

from __future__ import annotations

import array
import asyncio
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

KEPT_BATCHES = 10_000
"""As many as SGLang and vLLM keep for replay."""
MOST_BATCHES = 200
"""In one answer: what it takes to write them down holds up the streams."""


class KvEventLog:
    """The last batches, and what is cached now: the sum of all batches. Written on the event loop only."""

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(8)
        """Another one after a restart: numbers begin again."""
        self.next = 0
        self._batches: deque[tuple[int, float, list[list[Any]]]] = deque(maxlen=KEPT_BATCHES)
        self._cached: dict[int, tuple[int | None, array.array[int]]] = {}
        """By block hash: the parent's, and the tokens. A parent always stands before its children."""
        self._news = asyncio.Event()
        self._listeners: list[Callable[[int, float, list[list[Any]]], None]] = []

    def append(self, events: list[list[Any]]) -> None:
        """One batch, as `CacheEvents.drain` gave it."""
        batch = (self.next, time.time(), events)
        self._batches.append(batch)
        self.next += 1
        for event in events:
            self._apply(event)
        self._news.set()
        self._news = asyncio.Event()
        for listener in self._listeners:
            listener(*batch)

    def listen(self, listener: Callable[[int, float, list[list[Any]]], None]) -> None:
        """Called with each batch from now on: number, time, events."""
        self._listeners.append(listener)

    @property
    def oldest(self) -> int:
        """The first number that is still kept, or the next one."""
        return self._batches[0][0] if self._batches else self.next

    def since(self, number: int) -> list[tuple[int, float, list[list[Any]]]]:
        """The batches from `number` on, which must not be older than `oldest`."""
        skip = number - self.oldest
        return [batch for index, batch in enumerate(self._batches) if index >= skip][:MOST_BATCHES]

    async def wait(self, number: int, seconds: float) -> None:
        """Until batch `number` is there, or the time is over."""
        try:
            async with asyncio.timeout(seconds):
                while self.next <= number:
                    await self._news.wait()
        except TimeoutError:
            pass

    def cached(self) -> list[tuple[int, int | None, array.array[int]]]:
        """All cached blocks: hash, the parent's hash, tokens; each parent before its children."""
        return [(own, parent, tokens) for own, (parent, tokens) in self._cached.items()]

    def _apply(self, event: list[Any]) -> None:
        match event:
            case ["BlockStored", hashes, parent, tokens, size, *_]:
                for index, own in enumerate(hashes):
                    self._cached[own] = (parent, array.array("I", tokens[index * size : (index + 1) * size]))
                    parent = own
            case ["BlockRemoved", hashes, *_]:
                for own in hashes:
                    del self._cached[own]
            case ["AllBlocksCleared"]:
                self._cached.clear()
