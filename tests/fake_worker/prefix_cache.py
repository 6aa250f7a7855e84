"""What a worker's KV cache would hold: whole pages of prompt text, least recently used leaves evicted first."""

import array
from collections import OrderedDict
from typing import Any

from tests.fake_worker.kv_log import KvLog, stored

BYTES_PER_TOKEN = 4
"""The fake tokenizer: four bytes of UTF-8 are a token (English text on real tokenizers: 3.5 to 4.5)."""


def token_count(text: bytes) -> int:
    return -(-len(text) // BYTES_PER_TOKEN)


class PrefixCache:
    """Page-exact: a page counts as cached only when every page before it is cached too.

    A page is named by the hash of everything up to its end. Pages of one prompt are touched deepest first, so the least
    recently used one is always a leaf and eviction never leaves a page without its parent.
    """

    def __init__(self, capacity_tokens: int, page_tokens: int = 16) -> None:
        self.capacity_pages = capacity_tokens // page_tokens
        self.page_tokens = page_tokens
        self._pages: OrderedDict[int, None] = OrderedDict()
        self.log: KvLog | None = None
        """Who is told what comes and goes."""

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def used_tokens(self) -> int:
        return len(self._pages) * self.page_tokens

    def cached_tokens(self, prompt: bytes) -> int:
        """Tokens of `prompt` that need no prefill; the last token is always computed, as engines do."""
        usable = max(token_count(prompt) - 1, 0) // self.page_tokens
        matched = 0
        for key in self._keys(prompt)[:usable]:
            if key not in self._pages:
                break
            matched += 1
        return matched * self.page_tokens

    def insert(self, text: bytes) -> None:
        """Hold the whole pages of `text` (prompt and answer)."""
        keys = self._keys(text)[: self.capacity_pages]
        known = sum(key in self._pages for key in keys)
        for key in reversed(keys):
            self._pages[key] = None
            self._pages.move_to_end(key)
        gone = []
        while len(self._pages) > self.capacity_pages:
            gone.append(self._pages.popitem(last=False)[0])
        if self.log is not None:
            events: list[dict[str, Any]] = []
            if keys[known:]:
                size = self.page_tokens * BYTES_PER_TOKEN
                tokens = array.array("I", text[known * size : len(keys) * size]).tolist()
                events.append(stored(keys[known:], keys[known - 1] if known else None, tokens, self.page_tokens))
            if gone:
                events.append({"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU"})
            self.log.append(events)

    def clear(self) -> None:
        if self.log is not None and self._pages:
            self.log.append([{"type": "AllBlocksCleared"}])
        self._pages.clear()

    def _keys(self, text: bytes) -> list[int]:
        size = self.page_tokens * BYTES_PER_TOKEN
        keys, parent = [], 0
        for start in range(0, len(text) - size + 1, size):
            parent = hash((parent, text[start : start + size]))
            keys.append(parent)
        return keys
