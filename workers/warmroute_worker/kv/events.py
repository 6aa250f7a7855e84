"""What the prefix cache gained and lost, for routers that follow it: blocks named by a hash of all their tokens.

A block is a page. Its hash depends on its tokens and on the hash of the block before it, on nothing else: the same text
has the same hashes in every worker with this page size. Pure; kv_event_log.py keeps them.
"""

from __future__ import annotations

import array
import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from warmroute_worker.kv.radix import PageKey

_ROOT = bytes(8)


def block_hash(parent: int | None, tokens: Sequence[int]) -> int:
    """63 bits of blake2b over the parent's hash and the tokens, 4 bytes each."""
    before = _ROOT if parent is None else parent.to_bytes(8, "little")
    digest = hashlib.blake2b(before + array.array("I", tokens).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class CacheEvents:
    """Told by the tree, in order; `drain` gives what happened since, in the shape in which SGLang and vLLM publish it:

    * `["BlockStored", block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium]`
    * `["BlockRemoved", block_hashes, medium]`
    * `["AllBlocksCleared"]`
    """

    def __init__(self, page_size: int, medium: str) -> None:
        """`medium`: where the blocks are, `CPU` or `GPU`."""
        self._page_size, self._medium = page_size, medium
        self._hash_of: dict[int, int] = {}
        """By page, of all that are cached."""
        self._events: list[list[Any]] = []

    def stored(self, parent_page: int | None, keys: Sequence[PageKey], pages: Sequence[int]) -> None:
        """A run of pages is cached, behind `parent_page`."""
        parent = before = None if parent_page is None else self._hash_of[parent_page]
        hashes = []
        for key, page in zip(keys, pages, strict=True):
            before = block_hash(before, key)
            self._hash_of[page] = before
            hashes.append(before)
        tokens = [token for key in keys for token in key]
        self._events.append(["BlockStored", hashes, parent, tokens, self._page_size, None, self._medium])

    def removed(self, pages: Iterable[int]) -> None:
        """These are cached no more."""
        hashes = [self._hash_of.pop(page) for page in pages]
        if hashes and not self._hash_of:
            self._events.append(["AllBlocksCleared"])
        elif hashes:
            self._events.append(["BlockRemoved", hashes, self._medium])

    def drain(self) -> list[list[Any]]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events
