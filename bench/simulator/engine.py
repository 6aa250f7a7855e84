"""A simulated worker: chunked prefill, decode steps that grow with the batch, a paged prefix cache with LRU eviction.

The parameters are those of the mock engine that smg's benchmarks publish (8,000 prompt tokens/s, chunks of 2,048,
6 ms + 0.35 ms per running request and step), so that results compare. Times are seconds of simulated time.
"""

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Engine:
    """What one rank of a worker can do."""

    kv_tokens: int = 524_288
    prefill_tokens_per_second: float = 8_000.0
    chunk_tokens: int = 2_048
    step_seconds: float = 0.006
    step_seconds_per_request: float = 0.000_35
    max_running: int = 256
    fifo: bool = False
    """Evicts what was computed first, not what was used last."""


@dataclass(slots=True, eq=False)
class Job:
    """One request on one rank."""

    keys: Sequence[range]
    """Page keys of prompt and answer: equal keys stand for equal text from the beginning."""
    prompt_tokens: int
    output_tokens: int
    submitted: float
    request: object = None
    cached_tokens: int = 0
    prefilled: int = 0
    finish_step: int = 0
    first_token: float = -1.0
    finished: float = -1.0
    _held: int = 0
    """Pages of `keys`, from the first, that are pinned in the cache."""
    _own: int = 0
    """Pages that only this job has."""

    @property
    def prompt_pages(self) -> int:
        return self.prompt_tokens // PAGE_TOKENS

    def pages(self, start: int, stop: int) -> Iterable[int]:
        return islice(chain.from_iterable(self.keys), start, stop)


class PrefixCache:
    """Pages by key. A page in use is pinned. The others leave in the order in which they were last used; with `fifo`,
    those without successors leave in the order in which they came, as SGLang's radix cache does it."""

    def __init__(self, pages: int, fifo: bool) -> None:
        self.free = pages
        self._pins: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._fifo = fifo
        # When each page came and after which one; how many came after it; who may leave (some may not any more).
        self._came: dict[int, tuple[int, int | None]] = {}
        self._successors: dict[int, int] = {}
        self._leaves: list[tuple[int, int]] = []
        self._arrivals = 0
        self.evicted = 0

    def __contains__(self, key: int) -> bool:
        return key in self._pins

    @property
    def available(self) -> int:
        return self.free + len(self._idle)

    def match(self, keys: Iterable[int]) -> int:
        """How many of the keys, from the first, are here."""
        count = 0
        for key in keys:
            if key not in self._pins:
                break
            count += 1
        return count

    def pin(self, keys: Iterable[int]) -> None:
        for key in keys:
            pins = self._pins[key]
            if pins == 0:
                del self._idle[key]
            self._pins[key] = pins + 1

    def unpin(self, keys: Sequence[int]) -> None:
        """The deepest page becomes the first to leave."""
        for key in reversed(keys):
            pins = self._pins[key] - 1
            self._pins[key] = pins
            if pins == 0:
                self._idle[key] = None
                if self._fifo:
                    self._offer(key)

    def take(self, count: int) -> bool:
        """`count` pages for somebody's own use; False and no change when there are not as many."""
        if count > self.available:
            return False
        while self.free < count:
            del self._pins[self._leave()]
            self.free += 1
            self.evicted += 1
        self.free -= count
        return True

    def _leave(self) -> int:
        """The page that leaves."""
        if not self._fifo:
            return self._idle.popitem(last=False)[0]
        while True:
            came, key = heapq.heappop(self._leaves)
            if key not in self._idle or self._successors[key] or self._came[key][0] != came:
                continue
            _, before = self._came.pop(key)
            del self._idle[key], self._successors[key]
            if before is not None:
                self._successors[before] -= 1
                self._offer(before)
            return key

    def _offer(self, key: int) -> None:
        if key in self._idle and not self._successors[key]:
            heapq.heappush(self._leaves, (self._came[key][0], key))

    def add(self, key: int, before: int | None = None) -> bool:
        """One page of somebody's own becomes everybody's, pinned once; False when the cache has that text already.

        `before`: the page whose text it continues."""
        if key in self._pins:
            self.pin([key])
            return False
        self._pins[key] = 1
        if self._fifo:
            self._arrivals += 1
            self._came[key] = (self._arrivals, before)
            self._successors[key] = 0
            if before is not None:
                self._successors[before] += 1
        return True


class Rank:
    """Its queue, its batch, its cache."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache = PrefixCache(engine.kv_tokens // PAGE_TOKENS, engine.fifo)
        self.waiting: deque[Job] = deque()
        self.prefilling: deque[Job] = deque()
        self.running: list[tuple[int, int, Job]] = []
        self._ties = 0
        self._chunks: list[tuple[Job, int]] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running)

    def jobs(self) -> list[Job]:
        return [*self.waiting, *self.prefilling, *(job for _, _, job in self.running)]

    def plan(self) -> float:
        """Admit, and divide the next step's chunk; how long the step takes."""
        budget = self.engine.chunk_tokens
        self._chunks = []
        for job in self.prefilling:
            budget -= self._take_chunk(job, budget)
        while budget > 0 and (admitted := self._admit()):
            budget -= self._take_chunk(admitted, budget)
        computed = self.engine.chunk_tokens - budget
        seconds = computed / self.engine.prefill_tokens_per_second
        if self.running:
            seconds += self.engine.step_seconds + self.engine.step_seconds_per_request * len(self.running)
        return seconds

    def steps_alike(self, done: int) -> int:
        """How many steps like the planned one can follow each other, if no job comes; `done` were done before."""
        if self._chunks or not self.running:
            return 1
        return max(self.running[0][0] - done, 1)

    def complete(self, now: float, done: int) -> list[Job]:
        """The planned steps are over and `done` is their count since ever; the jobs that are answered."""
        answered = []
        while self.running and self.running[0][0] <= done:
            _, _, job = heapq.heappop(self.running)
            answered.append(self._finish(job, now))
        for job, tokens in self._chunks:
            job.prefilled += tokens
            # Each chunk is shared as soon as it is computed: siblings that wait in the queue find it.
            self._share(job, job.prefilled // PAGE_TOKENS)
            if job.prefilled == job.prompt_tokens:
                self.prefilling.popleft()
                job.first_token = now
                if job.output_tokens <= 1:
                    answered.append(self._finish(job, now))
                else:
                    job.finish_step = done + job.output_tokens - 1
                    self._ties += 1
                    heapq.heappush(self.running, (job.finish_step, self._ties, job))
        self._chunks = []
        return answered

    def _take_chunk(self, job: Job, budget: int) -> int:
        tokens = min(budget, job.prompt_tokens - job.prefilled)
        if tokens:
            self._chunks.append((job, tokens))
        return tokens

    def _admit(self) -> Job | None:
        """The first that waits, now with pages for all that it will need; None: none waits, or it does not fit."""
        if not self.waiting or len(self.running) + len(self.prefilling) >= self.engine.max_running:
            return None
        job = self.waiting[0]
        # The last prompt token is always computed: its logits are the first token.
        matched = self.cache.match(job.pages(0, (job.prompt_tokens - 1) // PAGE_TOKENS))
        self.cache.pin(job.pages(0, matched))
        own = math.ceil((job.prompt_tokens + job.output_tokens) / PAGE_TOKENS) - matched
        if not self.cache.take(own):
            self.cache.unpin(list(job.pages(0, matched)))
            if not (self.running or self.prefilling):
                raise ValueError(f"a request of {job.prompt_tokens} + {job.output_tokens} tokens fits no cache")
            return None
        job._held, job._own = matched, own
        job.cached_tokens = job.prefilled = matched * PAGE_TOKENS
        self.prefilling.append(self.waiting.popleft())
        return job

    def _share(self, job: Job, pages: int) -> None:
        """The job's pages up to `pages` are computed: others can use them."""
        before = next(iter(job.pages(job._held - 1, job._held)), None) if job._held else None
        for key in job.pages(job._held, pages):
            if not self.cache.add(key, before):
                self.cache.free += 1
            job._own -= 1
            before = key
        job._held = max(job._held, pages)

    def _finish(self, job: Job, now: float) -> Job:
        self._share(job, (job.prompt_tokens + job.output_tokens) // PAGE_TOKENS)
        self.cache.free += job._own
        self.cache.unpin(list(job.pages(0, job._held)))
        job.finished = now
        return job


class Worker:
    """Ranks in lock-step: a step takes as long as that of the slowest rank."""

    def __init__(self, engine: Engine, ranks: int = 1) -> None:
        self.engine = engine
        self.ranks = [Rank(engine) for _ in range(ranks)]
        self.steps = 0
        self.event = math.inf
        """When the planned steps end; inf: nothing to do."""
        self._begin = 0.0
        self._step = 0.0
        self._planned = 0

    def submit(self, job: Job, rank: int, now: float) -> None:
        self.ranks[rank].waiting.append(job)
        if self._planned == 0:
            self._plan(now)
        elif self._planned > 1:
            # Many equal steps were planned at once: the job is admitted where the current one ends.
            self._planned = min(self._planned, max(math.ceil((now - self._begin) / self._step), 1))
            self.event = self._begin + self._planned * self._step

    def complete(self) -> list[Job]:
        """To be called at `event`."""
        now = self.event
        self.steps += self._planned
        answered = [job for rank in self.ranks for job in rank.complete(now, self.steps)]
        self._plan(now)
        return answered

    def kill(self) -> list[Job]:
        """It dies: everything it had is lost. The jobs that were on it."""
        lost = [job for rank in self.ranks for job in rank.jobs()]
        self.__init__(self.engine, len(self.ranks))  # type: ignore[misc]
        return lost

    def _plan(self, now: float) -> None:
        busy = [rank for rank in self.ranks if rank.busy]
        if not busy:
            self._planned, self.event = 0, math.inf
            return
        self._begin = now
        self._step = max(rank.plan() for rank in busy)
        self._planned = min(rank.steps_alike(self.steps) for rank in busy)
        self.event = now + self._planned * self._step
