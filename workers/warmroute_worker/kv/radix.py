"""The prefix cache: a radix tree whose letters are whole pages of tokens.

Invariants, held between calls and verified by `check_integrity`:
* an edge's first key is unique among its siblings, so a walk never has a choice;
* a locked node's ancestors are locked: `lock` and `unlock` walk to the root;
* every unlocked leaf has an entry in the heap with its present `last_access` (older entries are stale and skipped).

Time is a counter of calls, not a clock, so the same requests always evict the same pages.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from warmroute_worker.kv.events import CacheEvents

PageKey = tuple[int, ...]
"""The page_size tokens of one full page."""


class Node:
    """A run of pages that is shared as a whole. `pages[i]` holds keys and values of the tokens `keys[i]`."""

    __slots__ = ("children", "keys", "last_access", "locks", "pages", "parent", "serial")

    def __init__(self, parent: Node | None, keys: list[PageKey], pages: list[int], serial: int) -> None:
        self.parent = parent
        self.keys = keys
        self.pages = pages
        self.children: dict[PageKey, Node] = {}
        self.locks = 0
        self.last_access = 0
        self.serial = serial

    def __repr__(self) -> str:
        return f"<Node {self.serial} [{len(self.pages)} pages, {len(self.children)} children, {self.locks} locks]>"


class Match(NamedTuple):
    """The longest cached prefix: `pages` in order, and the node in which they end."""

    node: Node
    pages: list[int]


class RadixCache:
    """Finds, keeps and evicts pages by the tokens they hold. Knows nothing of who allocates pages or of requests."""

    def __init__(self, events: CacheEvents | None = None) -> None:
        """`events`: is told what is cached and what no more."""
        self._events = events
        self._serial = 0
        self._now = 0
        self._heap: list[tuple[int, int, Node]] = []
        self.root = self._new_node(None, [], [])
        self.num_pages = 0
        self.num_locked_pages = 0
        self._num_nodes = 0

    @property
    def num_evictable_pages(self) -> int:
        return self.num_pages - self.num_locked_pages

    def match(self, keys: Sequence[PageKey]) -> Match:
        """The longest prefix of `keys` in the tree; counts as a use. Its pages stay only while the node is locked."""
        self._now += 1
        node, pages = self.root, list[int]()
        depth = 0
        while depth < len(keys) and (child := node.children.get(keys[depth])) is not None:
            length = _common_length(child.keys, keys, depth)
            if length < len(child.keys):
                child = self._split(child, length)
            self._touch(child)
            pages += child.pages
            node, depth = child, depth + length
            # A partial match was split off and has the rest as its only child, whose first key differs: the walk ends.
        return Match(node, pages)

    def match_length(self, keys: Sequence[PageKey]) -> int:
        """How many pages `match` would find; changes nothing."""
        node, depth = self.root, 0
        while depth < len(keys) and (child := node.children.get(keys[depth])) is not None:
            length = _common_length(child.keys, keys, depth)
            depth += length
            if length < len(child.keys):
                break
            node = child
        return depth

    def insert(self, keys: Sequence[PageKey], pages: Sequence[int]) -> Match:
        """Make `keys` cached. Where the tree has them its own pages stay; for the rest it takes those of `pages`.

        Returns the match of all of `keys`: a page in it that differs from the caller's is the tree's, and the caller's
        page at that place is a duplicate that still belongs to the caller.
        """
        node, found = self.match(keys)
        depth = len(found)
        if depth < len(keys):
            leaf = self._new_node(node, list(keys[depth:]), list(pages[depth:]))
            node.children[keys[depth]] = leaf
            if self._events is not None:
                self._events.stored(node.pages[-1] if node.pages else None, leaf.keys, leaf.pages)
            self._num_nodes += 1
            self.num_pages += len(leaf.pages)
            self._touch(leaf)
            node, found = leaf, found + leaf.pages
        return Match(node, found)

    def lock(self, node: Node) -> None:
        """Keep the node and all above it until `unlock`."""
        step: Node | None = node
        while step is not None:
            if step.locks == 0:
                self.num_locked_pages += len(step.pages)
            step.locks += 1
            step = step.parent

    def unlock(self, node: Node) -> None:
        step: Node | None = node
        while step is not None:
            step.locks -= 1
            if step.locks == 0:
                self.num_locked_pages -= len(step.pages)
                self._offer(step)
            step = step.parent

    def evict(self, count: int) -> list[int]:
        """Give up at least `count` pages if so many are unlocked, least recently used leaves first, from their ends."""
        evicted: list[int] = []
        while len(evicted) < count and self._heap:
            last_access, _, leaf = heapq.heappop(self._heap)
            if last_access != leaf.last_access or not self._is_evictable(leaf):
                continue
            missing = count - len(evicted)
            if missing < len(leaf.pages):
                evicted += leaf.pages[-missing:]
                del leaf.pages[-missing:], leaf.keys[-missing:]
                self.num_pages -= missing
                self._offer(leaf)
            else:
                evicted += leaf.pages
                self.num_pages -= len(leaf.pages)
                self._remove(leaf)
        if self._events is not None and evicted:
            self._events.removed(evicted)
        return evicted

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_integrity(self) -> None:
        """Raise AssertionError if an invariant of this file does not hold. Walks the whole tree."""
        offered = {(entry[0], entry[2]) for entry in self._heap}
        num_nodes = num_pages = num_locked = 0
        for node in self.nodes():
            assert node.parent is not None
            assert node.parent.children[node.keys[0]] is node
            assert len(node.keys) == len(node.pages) > 0
            assert 0 <= node.locks <= node.parent.locks
            assert node.last_access <= node.parent.last_access or node.parent is self.root
            if self._is_evictable(node):
                assert (node.last_access, node) in offered, f"{node!r} can never be evicted"
            num_nodes += 1
            num_pages += len(node.pages)
            num_locked += len(node.pages) if node.locks else 0
        assert (num_nodes, num_pages, num_locked) == (self._num_nodes, self.num_pages, self.num_locked_pages)

    def _new_node(self, parent: Node | None, keys: list[PageKey], pages: list[int]) -> Node:
        self._serial += 1
        return Node(parent, keys, pages, self._serial)

    def _split(self, node: Node, length: int) -> Node:
        """Put the first `length` pages into a new parent, which is returned; `node` stays what its holders locked."""
        assert node.parent is not None
        upper = self._new_node(node.parent, node.keys[:length], node.pages[:length])
        upper.locks, upper.last_access = node.locks, node.last_access
        node.parent.children[upper.keys[0]] = upper
        node.keys, node.pages, node.parent = node.keys[length:], node.pages[length:], upper
        upper.children[node.keys[0]] = node
        self._num_nodes += 1
        return upper

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.keys[0]]
        leaf.parent = None
        self._num_nodes -= 1
        self._offer(parent)

    def _touch(self, node: Node) -> None:
        node.last_access = self._now
        self._offer(node)

    def _offer(self, node: Node) -> None:
        """Enter the node into the heap if it could be evicted."""
        if not self._is_evictable(node):
            return
        # Stale entries are dropped when they come up; a tree that is read but never evicted must not pile them up.
        if len(self._heap) > 2 * self._num_nodes + 64:
            self._heap = [(leaf.last_access, leaf.serial, leaf) for leaf in self.nodes() if self._is_evictable(leaf)]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (node.last_access, node.serial, node))

    @staticmethod
    def _is_evictable(node: Node) -> bool:
        return node.locks == 0 and not node.children and node.parent is not None


def _common_length(edge: list[PageKey], keys: Sequence[PageKey], start: int) -> int:
    """How many keys of `edge` are those of `keys` from `start` on; the first is known to be."""
    limit = min(len(edge), len(keys) - start)
    length = 1
    while length < limit and edge[length] == keys[start + length]:
        length += 1
    return length
