"""Rules of other routers, written down from their documentation, to compare with; each sees what it sees in reality.

They are rules, not programs: costs of the routers themselves are another bench's subject (`bench.bench_router`).
"""

import bisect
import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import chain

from bench.simulator.engine import PAGE_TOKENS, Job, Worker
from bench.simulator.simulation import Placement
from bench.simulator.workload import BYTES_PER_TOKEN, Request, Workload

Target = tuple[int, int]
"""(worker, rank)"""


class Preset(ABC):
    """What all rules share: who is alive, requests in flight, ties at random."""

    def __init__(self, workload: Workload, workers: list[Worker], seed: int) -> None:
        self.workers = workers
        self.random = random.Random(seed)
        self.targets: list[Target] = [(w, r) for w in range(workload.workers) for r in range(workload.ranks)]
        self.load: dict[Target, int] = dict.fromkeys(self.targets, 0)
        self._dead: set[int] = set()

    def select(self, request: Request, now: float) -> Placement | None:
        alive = [target for target in self.targets if target[0] not in self._dead]
        if not alive:
            return None
        target = self.choose(request, alive)
        self.load[target] += 1
        return Placement(*target)

    @abstractmethod
    def choose(self, request: Request, alive: list[Target]) -> Target: ...

    def least(self, targets: list[Target], cost: Callable[[Target], float]) -> Target:
        costs = [cost(target) for target in targets]
        best = min(costs)
        return self.random.choice([target for target, value in zip(targets, costs, strict=True) if value == best])

    def release(self, placement: Placement, job: Job, now: float) -> None:
        self.load[placement.worker, placement.rank] -= 1

    def lost(self, placement: Placement, now: float) -> None:
        self.load[placement.worker, placement.rank] -= 1

    def down(self, worker: int, now: float) -> None:
        self._dead.add(worker)

    def up(self, worker: int, now: float) -> None:
        self._dead.discard(worker)


class LeastLoad(Preset):
    """The fewest requests in flight."""

    def choose(self, request: Request, alive: list[Target]) -> Target:
        return self.least(alive, lambda target: self.load[target])


class SglangRouter(Preset):
    """sglang-router 0.3.2 with its defaults: an approximate tree per worker, thresholds, smallest tree for new text."""

    CACHE_THRESHOLD = 0.3
    BALANCE_ABS = 64
    BALANCE_REL = 1.5
    TREE_PAGES = (1 << 26) // (PAGE_TOKENS * BYTES_PER_TOKEN)

    def __init__(self, workload: Workload, workers: list[Worker], seed: int) -> None:
        super().__init__(workload, workers, seed)
        self._trees: dict[Target, OrderedDict[int, None]] = {target: OrderedDict() for target in self.targets}

    def choose(self, request: Request, alive: list[Target]) -> Target:
        keys = prompt_keys(request)
        loads = [self.load[target] for target in alive]
        if max(loads) - min(loads) > self.BALANCE_ABS and max(loads) > min(loads) * self.BALANCE_REL:
            target = self.least(alive, lambda target: self.load[target])
        else:
            matched = {target: self._match(target, keys) for target in alive}
            target = max(alive, key=lambda target: matched[target])
            if matched[target] <= len(keys) * self.CACHE_THRESHOLD:
                target = self.least(alive, lambda target: len(self._trees[target]))
        self._insert(target, keys)
        return target

    def down(self, worker: int, now: float) -> None:
        super().down(worker, now)
        for target, tree in self._trees.items():
            if target[0] == worker:
                tree.clear()

    def _match(self, target: Target, keys: list[int]) -> int:
        tree = self._trees[target]
        return next((depth for depth, key in enumerate(keys) if key not in tree), len(keys))

    def _insert(self, target: Target, keys: list[int]) -> None:
        tree = self._trees[target]
        for key in reversed(keys):
            tree[key] = None
            tree.move_to_end(key)
        while len(tree) > self.TREE_PAGES:
            tree.popitem(last=False)


class Dynamo(Preset):
    """NVIDIA Dynamo's default cost: blocks to prefill, own and waiting, plus blocks in decode; exact caches."""

    def choose(self, request: Request, alive: list[Target]) -> Target:
        keys = prompt_keys(request)
        return self.least(alive, lambda target: self._cost(target, request, keys))

    def _cost(self, target: Target, request: Request, keys: list[int]) -> float:
        rank = self.workers[target[0]].ranks[target[1]]
        waiting = sum(job.prompt_tokens - job.prefilled for job in chain(rank.waiting, rank.prefilling))
        new = request.prompt_tokens - rank.cache.match(keys) * PAGE_TOKENS
        decoding = sum(job.prompt_tokens + job.output_tokens // 2 for _, _, job in rank.running)
        return (waiting + new + decoding + request.prompt_tokens) / PAGE_TOKENS


class Affinity(Preset):
    """Nothing but affinity, and never wrong about it: who was sent most of the prompt, however long its queue; of those
    alike the shortest queue. Text that nobody has goes where least was sent. The most hits that can be had."""

    def __init__(self, workload: Workload, workers: list[Worker], seed: int) -> None:
        super().__init__(workload, workers, seed)
        self._sent: dict[Target, set[int]] = {target: set() for target in self.targets}

    def choose(self, request: Request, alive: list[Target]) -> Target:
        keys = prompt_keys(request)
        held = {target: self._held(target, keys) for target in alive}
        most = max(held.values())
        holders = [target for target in alive if held[target] == most]
        target = self.least(holders, lambda target: self.load[target] if most else len(self._sent[target]))
        self._sent[target].update(keys)
        return target

    def down(self, worker: int, now: float) -> None:
        super().down(worker, now)
        for target, sent in self._sent.items():
            if target[0] == worker:
                sent.clear()

    def _held(self, target: Target, keys: list[int]) -> int:
        sent = self._sent[target]
        return next((depth for depth, key in enumerate(keys) if key not in sent), len(keys))


class BoundedHashing(Preset):
    """Consistent hashing of the beginning of the prompt with bounded loads, as KubeAI does it: factor 1.25."""

    POINTS = 256
    FACTOR = 1.25

    def __init__(self, workload: Workload, workers: list[Worker], seed: int) -> None:
        super().__init__(workload, workers, seed)
        points = ((hash((*target, point, 7919)), target) for target in self.targets for point in range(self.POINTS))
        self._ring = sorted(points)
        self._hashes = [point for point, _ in self._ring]

    def choose(self, request: Request, alive: list[Target]) -> Target:
        most = (sum(self.load[target] for target in alive) + 1) / len(alive) * self.FACTOR
        start = bisect.bisect(self._hashes, hash((request.segments[0].id, 104_729)))
        ring = (self._ring[(start + step) % len(self._ring)][1] for step in range(len(self._ring)))
        allowed = set(alive)
        return next(target for target in ring if target in allowed and self.load[target] < most)


def prompt_keys(request: Request) -> list[int]:
    """Keys of the prompt's whole pages."""
    keys: Iterable[int] = chain.from_iterable(request.keys)
    return [key for key, _ in zip(keys, range(request.prompt_tokens // PAGE_TOKENS), strict=False)]


PRESETS: dict[str, Callable[[Workload, list[Worker], int], Preset]] = {
    "preset:sglang-router": SglangRouter,
    "preset:dynamo": Dynamo,
    "preset:least_load": LeastLoad,
    "preset:bounded_hashing": BoundedHashing,
    "preset:affinity": Affinity,
}
