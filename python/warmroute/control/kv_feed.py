"""One rank's events on their way into the core, and what is counted of them."""

import logging
from dataclasses import dataclass

from warmroute._core import Core
from warmroute.control.kv_shapes import Block, Cleared, Event, Removed, Stored

log = logging.getLogger(__name__)


@dataclass(slots=True)
class FeedCounts:
    batches: int = 0
    gaps: int = 0
    """Batches were missed, and had to be asked for."""
    resyncs: int = 0
    """Everything was read anew."""
    losses: int = 0
    """What was missed could not be had: blocks that were known do not count any more."""


class RankFeed:
    """Owns the core's mirror of one rank's cache. Raises ValueError when the rank is gone."""

    def __init__(self, core: Core, slot: int, models: tuple[str, ...], name: str) -> None:
        """`name`: for the log."""
        self._core = core
        self._slot = slot
        self._models = models
        self._is_begun = False
        self.name = name
        self.counts = FeedCounts()

    def resync(self, blocks: list[Block], *, is_new: bool) -> None:
        """The cache holds just these. `is_new`: it is another one than before, of a worker that was restarted."""
        if is_new or not self._is_begun:
            self._core.kv_begin(self._slot, self._models, is_new, True)
        self._is_begun = True
        self.counts.resyncs += 1
        self._core.kv_resync(self._slot, blocks)

    def begin(self, *, is_new: bool, is_whole: bool) -> None:
        """A stream without snapshots begins, at its first batch (`is_whole`) or later."""
        self._is_begun = True
        self._core.kv_begin(self._slot, self._models, is_new, is_whole)

    def lose(self) -> None:
        """Events are lost for good."""
        self.counts.losses += 1
        log.warning("%s: events were lost and cannot be had again: what they told does not count any more", self.name)
        self.begin(is_new=False, is_whole=False)

    def apply(self, events: list[Event]) -> None:
        """One batch."""
        self.counts.batches += 1
        for event in events:
            match event:
                case Stored():
                    is_sane = self._core.kv_stored(
                        self._slot,
                        event.hashes,
                        event.parent,
                        event.tokens,
                        event.block_size,
                        event.medium,
                        event.plain,
                    )
                    if not is_sane:
                        log.warning("%s: an event whose blocks and tokens do not match was left out", self.name)
                case Removed():
                    self._core.kv_removed(self._slot, event.hashes, event.medium)
                case Cleared():
                    self._core.kv_begin(self._slot, self._models, True, True)

    def end(self) -> None:
        """Nobody tells any more."""
        if self._is_begun:
            self._core.kv_end(self._slot)
