"""The pages of the pool that nobody owns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class PageAllocator:
    """A stack of free pages; the page freed last is warm in the CPU's cache and goes first."""

    def __init__(self, num_pages: int) -> None:
        """Owns pages 1 ... num_pages; page 0 is the padding page."""
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages, which must be free: the caller looked at `len` and evicted what was missing."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        self._free.extend(pages)

    def free_pages(self) -> list[int]:
        """A copy, for checks."""
        return list(self._free)
