"""Prefix tree, allocator and leases against slow obvious twins."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from warmroute_worker.kv.allocator import PageAllocator
from warmroute_worker.kv.cache import KvCache, PageLease
from warmroute_worker.kv.radix import RadixCache

if TYPE_CHECKING:
    from warmroute_worker.kv.radix import Node, PageKey

# Two letters and short words: prefixes meet all the time.
Keys = st.lists(st.sampled_from([(0,), (1,)]), max_size=6)


class TreeAgainstDict(RuleBasedStateMachine):
    """The twin: a dict from each cached prefix to its page, with the time of its last use and its locks."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = RadixCache()
        self.pages: dict[tuple[PageKey, ...], int] = {}
        self.used: dict[tuple[PageKey, ...], int] = {}
        self.locked: list[tuple[Node, tuple[PageKey, ...]]] = []
        self.next_page = 1
        self.now = 0

    def prefixes(self, keys: list[PageKey]) -> list[tuple[PageKey, ...]]:
        return [tuple(keys[: n + 1]) for n in range(len(keys))]

    def use(self, keys: list[PageKey]) -> list[int]:
        self.now += 1
        found = []
        for prefix in self.prefixes(keys):
            if prefix not in self.pages:
                break
            found.append(self.pages[prefix])
            self.used[prefix] = self.now
        return found

    @rule(keys=Keys)
    def match(self, keys: list[PageKey]) -> None:
        length = self.tree.match_length(keys)
        node, pages = self.tree.match(keys)
        assert pages == self.use(keys)
        assert length == len(pages)
        assert pages == [] or node.pages[-1] == pages[-1]

    @rule(keys=Keys)
    def insert(self, keys: list[PageKey]) -> None:
        offered = list(range(self.next_page, self.next_page + len(keys)))
        self.next_page += len(keys)
        _, pages = self.tree.insert(keys, offered)
        for prefix, page in zip(self.prefixes(keys), offered, strict=True):
            self.pages.setdefault(prefix, page)
        assert pages == self.use(keys)

    @rule(keys=Keys)
    def lock(self, keys: list[PageKey]) -> None:
        node, pages = self.tree.match(keys)
        self.use(keys)
        self.tree.lock(node)
        self.locked.append((node, tuple(keys[: len(pages)])))

    @precondition(lambda self: self.locked)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, _ = self.locked.pop(data.draw(st.integers(0, len(self.locked) - 1)))
        self.tree.unlock(node)

    @rule(count=st.integers(1, 5))
    def evict(self, count: int) -> None:
        """One page after the other, each the least recently used of the unlocked leaves of its moment."""
        expected = min(count, len(self.pages) - len(self.protected()))
        evicted = self.tree.evict(count)
        assert len(evicted) == expected
        by_page = {page: prefix for prefix, page in self.pages.items()}
        gone = {by_page[page] for page in evicted}
        while gone:
            leaves = self.evictable_leaves()
            oldest = min(self.used[prefix] for prefix in leaves)
            prefix = next(prefix for prefix in gone if prefix in leaves and self.used[prefix] == oldest)
            gone.remove(prefix)
            del self.pages[prefix], self.used[prefix]

    def protected(self) -> set[tuple[PageKey, ...]]:
        return {keys[: n + 1] for _, keys in self.locked for n in range(len(keys))}

    def evictable_leaves(self) -> list[tuple[PageKey, ...]]:
        protected = self.protected()
        inner = {prefix[:-1] for prefix in self.pages}
        return [prefix for prefix in self.pages if prefix not in inner and prefix not in protected]

    @invariant()
    def agree(self) -> None:
        self.tree.check_integrity()
        assert sorted(page for node in self.tree.nodes() for page in node.pages) == sorted(self.pages.values())
        assert self.tree.num_locked_pages == len(self.protected())
        for _, keys in self.locked:
            assert self.tree.match_length(keys) == len(keys), "what is locked stays"


TestTreeAgainstDict = TreeAgainstDict.TestCase
TestTreeAgainstDict.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


class LeasesAgainstSets(RuleBasedStateMachine):
    """Requests that come, grow, publish and leave in any order: no page is ever lost, doubled or taken away."""

    @initialize(num_pages=st.integers(1, 14))
    def start(self, num_pages: int) -> None:
        self.cache = KvCache(num_pages)
        self.leases: list[tuple[PageLease, list[PageKey]]] = []

    @rule(keys=Keys, more=st.integers(0, 3), spare=st.integers(0, 3))
    def acquire(self, keys: list[PageKey], more: int, spare: int) -> None:
        before = self.cache.num_available
        match = self.cache.match(keys)
        lease = self.cache.acquire(match, len(match.pages) + more, spare)
        if lease is None:
            assert self.cache.num_available == before
            return
        assert self.cache.num_available >= spare
        assert lease.pages[: lease.num_shared] == match.pages
        private: list[PageKey] = [(2, n) for n in range(more)]
        self.leases.append((lease, keys[: lease.num_shared] + private))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), key=st.sampled_from([(0,), (1,)]))
    def extend(self, data: st.DataObject, key: PageKey) -> None:
        lease, keys = data.draw(st.sampled_from(self.leases))
        before = self.cache.num_available
        if self.cache.extend(lease) is None:
            assert before == 0
        else:
            keys.append(key)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        lease, keys = data.draw(st.sampled_from(self.leases))
        before = list(lease.pages)
        replaced = self.cache.publish(lease, keys)
        assert [n for n, page in enumerate(lease.pages) if page != before[n]] == replaced
        assert self.cache.match(keys).pages == lease.pages

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), cached=st.booleans())
    def release(self, data: st.DataObject, cached: bool) -> None:
        lease, keys = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.cache.release(lease, keys if cached else keys[: lease.num_shared])
        if cached:
            assert self.cache.match_length(keys) == len(keys)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.cache.check_integrity()

    def teardown(self) -> None:
        for lease, keys in getattr(self, "leases", []):
            self.cache.release(lease, keys)
        if hasattr(self, "cache"):
            self.cache.check_integrity()
            assert self.cache.num_available == self.cache.num_pages
            self.cache.flush()
            assert self.cache.match_length([(0,)]) == 0


TestLeasesAgainstSets = LeasesAgainstSets.TestCase
TestLeasesAgainstSets.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@given(st.lists(st.integers(0, 6), max_size=40))
def test_allocator_never_owns_a_page_twice(sizes: list[int]) -> None:
    allocator = PageAllocator(10)
    taken: list[list[int]] = []
    for size in sizes:
        if size > len(allocator):
            with pytest.raises(ValueError, match="pages wanted"):
                allocator.take(size)
            if taken:
                allocator.give_back(taken.pop(0))
        else:
            taken.append(allocator.take(size))
        owned = [page for pages in taken for page in pages] + allocator.free_pages()
        assert sorted(owned) == list(range(1, 11)), "page 0 is nobody's"


def test_least_recently_used_goes_first_and_from_its_end() -> None:
    tree = RadixCache()
    tree.insert([(1,), (2,), (3,)], [1, 2, 3])
    tree.insert([(1,), (9,)], [4, 5])
    tree.match([(1,), (2,), (3,)])
    assert tree.evict(1) == [5], "its page of the common prefix was a duplicate, 4"
    assert tree.evict(1) == [3]
    assert tree.evict(5) == [2, 1]
    assert tree.num_pages == 0


def test_the_heap_does_not_grow_with_reads() -> None:
    tree = RadixCache()
    for n in range(20):
        tree.insert([(n,)], [n])
    for n in range(10_000):
        tree.match([(n % 20,)])
    assert len(tree._heap) <= 2 * 20 + 65
    tree.check_integrity()


def test_eviction_does_not_walk_the_tree() -> None:
    """A thousand times as many nodes make an eviction not even ten times as long, counted in nodes looked at."""
    looked_at = {}
    for size in (10, 10_000):
        tree, draw = RadixCache(), random.Random(0)
        for n in range(size):
            tree.insert([(n, draw.random())], [n])  # type: ignore[list-item]
        counter = [0]
        real = tree._is_evictable

        def counting(node: Node, counter: list[int] = counter, real: object = real) -> bool:
            counter[0] += 1
            return bool(real(node))  # type: ignore[operator]

        tree._is_evictable = counting  # type: ignore[method-assign]
        assert len(tree.evict(5)) == 5
        looked_at[size] = counter[0]
    assert looked_at[10_000] <= 10 * looked_at[10]
