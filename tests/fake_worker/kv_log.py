"""The numbered events of one rank's cache, as workers publish them, and what they add up to."""

import asyncio
import secrets
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Events = list[dict[str, Any]]


def stored(hashes: list[int], parent: int | None, tokens: list[int], block_size: int) -> dict[str, Any]:
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": block_size,
        "lora_id": None,
        "medium": "GPU",
    }


class KvLog:
    """Keeps the last `kept` batches. `epoch` is another one after a restart."""

    def __init__(self, kept: int = 10_000) -> None:
        self.epoch = secrets.token_hex(4)
        self.next = 0
        self.batches: deque[tuple[int, Events]] = deque(maxlen=kept)
        self.blocks: dict[int, tuple[int | None, list[int]]] = {}
        self.listener: Callable[[int, Events], None] | None = None
        self._news = asyncio.Event()

    def append(self, events: Events) -> None:
        if not events:
            return
        number, self.next = self.next, self.next + 1
        self.batches.append((number, events))
        for event in events:
            self._apply(event)
        self._news.set()
        self._news = asyncio.Event()
        if self.listener is not None:
            self.listener(number, events)

    async def wait(self, number: int, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while self.next <= number:
                    await self._news.wait()
        except TimeoutError:
            pass

    def answer(self, number: int) -> dict[str, Any] | None:
        """None: too late for that number."""
        oldest = self.batches[0][0] if self.batches else self.next
        if not oldest <= number <= self.next:
            return None
        batches = [{"seq": seq, "events": events} for seq, events in self.batches if seq >= number]
        return {"epoch": self.epoch, "next": number + len(batches), "batches": batches}

    def snapshot(self, rank: int) -> dict[str, Any]:
        blocks = [
            {"block_hash": own, "parent_block_hash": parent, "token_ids": tokens}
            for own, (parent, tokens) in self.blocks.items()
        ]
        return {"epoch": self.epoch, "next": self.next, "dp_rank": rank, "blocks": blocks}

    def restart(self) -> None:
        """As another process has it: empty, and numbered from 0."""
        self.__init__(self.batches.maxlen or 0)  # type: ignore[misc]

    def _apply(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.blocks.clear()
        elif event["type"] == "BlockRemoved":
            for own in event["block_hashes"]:
                self.blocks.pop(own, None)
        else:
            parent, size = event["parent_block_hash"], event["block_size"]
            for index, own in enumerate(event["block_hashes"]):
                self.blocks[own] = (parent, event["token_ids"][index * size : (index + 1) * size])
                parent = own
