"""Who owns which page: free, cached in the radix tree, or private to one request.

`free + cached + private == num_pages` holds between calls, and each page has exactly one owner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmroute_worker.kv.allocator import PageAllocator
from warmroute_worker.kv.radix import Match, Node, PageKey, RadixCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker.kv.events import CacheEvents


class PageLease:
    """The pages of one running request, in the order of its tokens.

    The first `num_shared` belong to the tree and stay because `node`, in which they end, is locked; others are private.
    """

    __slots__ = ("node", "num_shared", "pages")

    def __init__(self, node: Node, num_shared: int, pages: list[int]) -> None:
        self.node = node
        self.num_shared = num_shared
        self.pages = pages


class KvCache:
    """Leases pages to requests and caches what they leave, evicting as need be."""

    def __init__(self, num_pages: int, events: CacheEvents | None = None) -> None:
        self.num_pages = num_pages
        self.evicted_pages_total = 0
        self._allocator = PageAllocator(num_pages)
        self._radix = RadixCache(events)
        self._leases: set[PageLease] = set()
        self._num_private = 0

    @property
    def num_available(self) -> int:
        """Pages that can be had: free ones and cached ones that nobody uses."""
        return len(self._allocator) + self._radix.num_evictable_pages

    def match_length(self, keys: Sequence[PageKey]) -> int:
        """How many leading pages are cached; changes nothing."""
        return self._radix.match_length(keys)

    def match(self, keys: Sequence[PageKey]) -> Match:
        """The longest cached prefix, to be acquired at once or forgotten: nothing keeps its pages yet."""
        return self._radix.match(keys)

    def acquire(self, match: Match, num_pages: int, spare: int = 0) -> PageLease | None:
        """A lease of `num_pages` that begins with those of `match`, which must be fresh.

        None, and nothing changed, if that would leave fewer than `spare` pages available.
        """
        node, shared = match
        self._radix.lock(node)
        missing = num_pages - len(shared)
        if missing + spare > self.num_available:
            self._radix.unlock(node)
            return None
        lease = PageLease(node, len(shared), shared + self._take(missing))
        self._leases.add(lease)
        return lease

    def extend(self, lease: PageLease) -> int | None:
        """One more private page, or None if nothing is available."""
        if self.num_available < 1:
            return None
        [page] = self._take(1)
        lease.pages.append(page)
        return page

    def shrink(self, lease: PageLease, num_pages: int) -> None:
        """Free the private pages behind the first `num_pages`."""
        spare = lease.pages[max(num_pages, lease.num_shared) :]
        if spare:
            del lease.pages[-len(spare) :]
            self._allocator.give_back(spare)
            self._num_private -= len(spare)

    def publish(self, lease: PageLease, keys: Sequence[PageKey]) -> list[int]:
        """Cache the leading pages of the lease, which hold the tokens `keys` now.

        Returns the indices whose page was replaced by one the tree had already; the duplicates are free again.
        """
        old_node, first = lease.node, lease.num_shared
        node, pages = self._radix.insert(keys, lease.pages[: len(keys)])
        self._radix.lock(node)
        self._radix.unlock(old_node)
        replaced = [index for index in range(first, len(keys)) if pages[index] != lease.pages[index]]
        self._allocator.give_back(lease.pages[index] for index in replaced)
        for index in replaced:
            lease.pages[index] = pages[index]
        lease.node, lease.num_shared = node, len(keys)
        self._num_private -= len(keys) - first
        return replaced

    def release(self, lease: PageLease, keys: Sequence[PageKey]) -> None:
        """End the lease: its leading pages hold the tokens `keys` and stay cached, the others are free again."""
        if len(keys) > lease.num_shared:
            self.publish(lease, keys)
        self._radix.unlock(lease.node)
        private = lease.pages[lease.num_shared :]
        self._allocator.give_back(private)
        self._num_private -= len(private)
        self._leases.remove(lease)

    def flush(self) -> None:
        """Forget every cached page that nobody uses. Not counted as eviction."""
        self._allocator.give_back(self._radix.evict(self._radix.num_pages))

    def check_balance(self) -> None:
        """Raise AssertionError if pages were lost or doubled. O(1)."""
        counts = (len(self._allocator), self._radix.num_pages, self._num_private)
        assert sum(counts) == self.num_pages, f"free, cached, private = {counts}, of {self.num_pages} pages"

    def check_integrity(self) -> None:
        """Raise AssertionError if any invariant of pages, tree and leases does not hold. Walks everything."""
        self.check_balance()
        self._radix.check_integrity()
        owned = self._allocator.free_pages()
        owned += [page for node in self._radix.nodes() for page in node.pages]
        owned += [page for lease in self._leases for page in lease.pages[lease.num_shared :]]
        assert sorted(owned) == list(range(1, self.num_pages + 1)), "a page has no owner, or two"
        locks: dict[Node, int] = {}
        for lease in self._leases:
            step: Node | None = lease.node
            shared: list[int] = []
            while step is not None:
                locks[step] = locks.get(step, 0) + 1
                shared = step.pages + shared
                step = step.parent
            assert lease.pages[: lease.num_shared] == shared
        for node in self._radix.nodes():
            assert node.locks == locks.get(node, 0), f"{node!r} is used by {locks.get(node, 0)} requests"

    def _take(self, count: int) -> list[int]:
        missing = count - len(self._allocator)
        if missing > 0:
            evicted = self._radix.evict(missing)
            self.evicted_pages_total += len(evicted)
            self._allocator.give_back(evicted)
        self._num_private += count
        return self._allocator.take(count)
