"""Continuous batching over a paged pool: every step decodes all running requests and prefills a bounded number.

* Order is first come, first served. A request that does not fit blocks those behind it, so none starves.
* Admission is optimistic (admission.py). When the pool runs out, the newest request is retracted: its pages go to the
  prefix cache, it waits at the head of the queue and is recomputed. The oldest is never retracted for a newer one and a
  lone one always fits, because its length was cut to the pool; so there is no deadlock and nothing is dropped.
* The pages of the whole prompt are taken at admission; only decoding allocates later.
* Several plans may be under way (pipeline stages). They run in order, so what a plan computes counts as computed once
  it is scheduled: whatever uses it comes later. Of a request that left in the meantime, the token is dropped.
* With one at a time, greedy decode steps may follow each other in a plan. An executor may do fewer of them than there
  are pages for, so they count once it has; the pages that were not needed are for the next ones.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from warmroute_worker.messages import Load, Reply, Row, StepOutput, Times
from warmroute_worker.scheduler.admission import NewTokenRatio, refusal
from warmroute_worker.scheduler.batch import Chunk, SamplingMemo, step_plan
from warmroute_worker.scheduler.request import Request
from warmroute_worker.step_plan import NO_IDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from warmroute_worker.kv.cache import KvCache, PageLease
    from warmroute_worker.kv.radix import Node, PageKey
    from warmroute_worker.messages import Generate, TokenLogprobs
    from warmroute_worker.step_plan import StepPlan

UNCHUNKED_PREFILL_TOKENS = 16384
"""With chunking off, prompts are computed whole and no further one is begun in a step that has so many tokens."""

NO_LOGPROBS: Final[Mapping[int, TokenLogprobs]] = MappingProxyType({})

MOST_TOLD = 256
"""Prompt tokens whose logprobs are computed in one step: each needs a row of logits, as long as the vocabulary, in
float32 (152,000 ids: 156 MB). A prompt that is told is computed in chunks for that, also where others are not."""

ORDERED_REQUESTS = 128
"""With more of them waiting, lpm is fcfs: to match all in each step would cost more than it saves (as in SGLang)."""

DEFERRALS_PER_STEP = 64
"""How many waiting requests one admission may step over because their prefix is being computed: bounds its time."""


@dataclass(frozen=True)
class Limits:
    """What the scheduler must know about model, pool and arguments."""

    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    max_running_requests: int
    chunked_prefill_size: int
    """-1: whole prompts."""
    schedule_policy: str
    """fcfs or lpm."""
    schedule_conservativeness: float
    random_seed: int
    priorities: bool = False
    """Whether requests with a higher priority are admitted first."""
    depth: int = 1
    """Plans that may be under way at once."""


class Scheduler:
    """Owns all requests. `schedule` says what to compute, `apply` takes the tokens of the oldest plan under way."""

    def __init__(self, limits: Limits, cache: KvCache) -> None:
        self._limits = limits
        self._cache = cache
        self._pool_tokens = cache.num_pages * limits.page_size
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        """Oldest admission first."""
        self._free_rows = list(range(limits.max_running_requests - 1, -1, -1))
        self._ratio = NewTokenRatio(limits.schedule_conservativeness)
        self._sampling = deque(SamplingMemo() for _ in range(limits.depth))
        """Plans that are under way at the same time are of different requests; the first is next."""
        self._under_way: deque[list[Chunk]] = deque()
        """What the plans compute whose tokens have not come, the oldest first."""
        self._page_updates: list[tuple[int, int, int]] = []
        self._rows: list[Row] = []
        """Answers that did not need a step: refusals and aborts."""
        self._num_added = 0
        self.retractions_total = 0
        self._waiting_uncached_tokens = 0
        self._cached_tokens_total = 0
        self._prompt_tokens_total = 0
        self._generation_tokens_total = 0
        self._reused_tokens_total = 0
        self._retracted = 0
        """Waiting requests that have run before."""
        # Of prefills (True) and decodes.
        self._passes_total = {True: 0, False: 0}
        self._computed_tokens_total = {True: 0, False: 0}

    def __repr__(self) -> str:
        counts = f"{len(self._running)} running, {len(self._waiting)} waiting, {self._cache.num_available} pages"
        return f"<Scheduler [{counts}]>"

    @property
    def is_idle(self) -> bool:
        """Nothing to compute and nothing to say."""
        return not self._requests and not self._rows

    # `now`, in seconds: the times that requests are told (`Times`) are differences of it, and nothing is decided by it.

    def add(self, message: Generate, now: float = 0.0) -> None:
        """Queue a request, or refuse it with an error row if it could never run. Its rid must not be in use."""
        if message.rid in self._requests:
            raise ValueError(f"a request with rid {message.rid!r} is running")
        limits = self._limits
        reason = refusal(message, limits.context_length, self._pool_tokens, limits.vocab_size)
        if reason is not None:
            self._rows.append(Row(message.rid, [], "error", 0, reason))
            return
        self._num_added += 1
        room = min(limits.context_length, self._pool_tokens) - len(message.token_ids)
        stop_token_ids = (
            message.stop_token_ids if message.ignore_eos else [*message.stop_token_ids, *limits.eos_token_ids]
        )
        seed = message.sampling.seed
        if seed is None:
            seed = (limits.random_seed << 32) + self._num_added
        request = Request(
            message.rid,
            message.token_ids,
            min(message.max_new_tokens, room),
            frozenset(stop_token_ids),
            message.sampling,
            seed % (1 << 64),
            limits.page_size,
            message.priority if limits.priorities else 0,
            now,
        )
        cached = self._cache.match_length(self._matchable(request)) * limits.page_size
        request.expected_uncached = request.prompt_length - cached
        self._requests[request.rid] = request
        self._enqueue(request, first=False)

    def abort(self, rid: str) -> None:
        """End a request now: its pages are available when this returns. One that is not there is no error."""
        request = self._requests.get(rid)
        if request is None:
            return
        if request.lease is None:
            self._waiting.remove(request)
            self._waiting_uncached_tokens -= request.expected_uncached
            self._retracted -= request.epoch > 0
        self._finish(request)
        self._rows.append(Row(rid, [], "abort", request.cached_tokens or 0, None))

    def abort_all(self) -> None:
        """End all requests now."""
        for rid in list(self._requests):
            self.abort(rid)

    def flush(self, flush_id: int) -> Reply:
        """Empty the prefix cache, unless requests run or wait."""
        if self._requests:
            count = len(self._requests)
            return Reply(flush_id, False, f"the cache was not flushed: {count} requests are running or waiting")
        self._cache.flush()
        return Reply(flush_id, True, "the cache was flushed")

    @property
    def has_work_under_way(self) -> bool:
        """Some plan under way computes something."""
        return any(self._under_way)

    def schedule(self, *, hold: bool = False, now: float = 0.0, steps: int = 1) -> StepPlan:
        """The next step; an empty plan if nothing can run, or with `hold`. If it has only decodes, of requests that get
        the likeliest token, up to `steps` of them go in one plan."""
        self._ratio.stepped()
        chunks: list[Chunk] = []
        if not hold:
            self._grow()
            self._admit(now)
            chunks = self._next_chunks()
        memo = self._sampling[0]
        sampling, more, stop_ids = memo.of(chunks), 0, NO_IDS
        if chunks and steps > 1 and memo.is_likeliest and (more := self._reserve_steps(chunks, steps - 1)):
            stop_ids = memo.stop_ids
        plan = step_plan(chunks, self._page_updates if chunks else [], sampling, more, stop_ids)
        self._sampling.rotate(-1)
        for request, start, length, *_ in chunks:
            request.num_computed = start + length
        if chunks:
            self._page_updates.clear()
        self._under_way.append(chunks)
        return plan

    def withdraw(self) -> None:
        """Forget the newest plan, which was empty and will not run."""
        chunks = self._under_way.pop()
        assert not chunks

    def fail(self, refusal: str | None = None) -> None:
        """The newest plan did not run, for lack of memory: those it computed wait and are computed again, or are
        refused for that reason."""
        for request, start, *_, epoch in reversed(self._under_way.pop()):
            if request.epoch != epoch:
                continue
            request.num_computed = start
            if refusal is None:
                self._retract(request)
            else:
                self._finish(request)
                self._rows.append(Row(request.rid, [], "error", request.cached_tokens or 0, refusal))

    def retract_all(self) -> None:
        """Nobody runs any more; all wait, the oldest first. Nothing may be under way."""
        for request in reversed(self._running[:]):
            self._retract(request)

    def halve_chunks(self) -> int:
        """From now on half as many prompt tokens per step, but one page at least; how many."""
        size = max(self._prefill_budget() // 2, self._limits.page_size)
        self._limits = dataclasses.replace(self._limits, chunked_prefill_size=size)
        return size

    def report(self) -> StepOutput:
        """What is new without a step."""
        rows, self._rows = self._rows, []
        return StepOutput(rows, self.load())

    def apply(
        self, token_ids: list[int], logprobs: Mapping[int, TokenLogprobs] = NO_LOGPROBS, now: float = 0.0
    ) -> StepOutput:
        """Take the tokens of the oldest plan under way, one per sampled sequence in its order, and say what is new. If
        several steps went in it, theirs stand one behind the other.

        `logprobs`: by place in that order; those of prompt tokens come after it, in the order of the plan.
        """
        rows, self._rows = self._rows, []
        chunks = self._under_way.popleft()
        num_sampled, told = sum(chunk.samples for chunk in chunks), len(token_ids)
        steps, rest = divmod(len(token_ids), num_sampled) if num_sampled else (1, 0)
        assert not rest, "each step brings a token to each"
        self._count(chunks, steps)
        place = -1
        for request, _, length, samples, tells, epoch in chunks:
            place += samples
            told_here = range(told, told + len(tells))
            told = told_here.stop
            if request.epoch != epoch:
                continue
            if tells and request.told is not None:
                request.told += [logprobs[of_prompt] for of_prompt in told_here]
                request.untold += len(tells)
            if length > 1:
                # Siblings that wait with the same prompt find these pages in the next step.
                self._publish(request)
            if not samples:
                continue
            # Who wants none came for its prompt's logprobs, or to warm the cache.
            new = token_ids[place::num_sampled] if request.max_new_tokens else []
            reason = request.take(new)
            self._generation_tokens_total += len(new)
            row = Row(request.rid, new, reason, request.cached_tokens or 0, None, logprobs.get(place) if new else None)
            if request.num_new <= 1:
                times = Times(request.admitted_at - request.arrived_at, now - request.admitted_at)
                row = row._replace(prompt_logprobs=request.told, times=times)
                request.told = None
            rows.append(row)
            if reason is not None:
                self._finish(request)
        return StepOutput(rows, self.load())

    def _count(self, chunks: Sequence[Chunk], steps: int) -> None:
        """What a plan computed, whether it was of use or not."""
        prefilled = sum(chunk.length for chunk in chunks if chunk.is_prefill)
        self._computed_tokens_total[True] += prefilled
        self._computed_tokens_total[False] += steps * (sum(chunk.length for chunk in chunks) - prefilled)
        if chunks:
            self._passes_total[prefilled > 0] += steps
        if steps > 1:
            self._ratio.stepped(steps - 1)

    def load(self) -> Load:
        size = self._limits.page_size
        return Load(
            running=len(self._running),
            waiting=len(self._waiting),
            used_tokens=(self._cache.num_pages - self._cache.num_available) * size,
            total_tokens=self._pool_tokens,
            cached_tokens_total=self._cached_tokens_total,
            prompt_tokens_total=self._prompt_tokens_total,
            generation_tokens_total=self._generation_tokens_total,
            evicted_tokens_total=self._cache.evicted_pages_total * size,
            retractions_total=self.retractions_total,
            new_token_ratio=self._ratio.value,
            waiting_uncached_tokens=self._waiting_uncached_tokens,
            retracted=self._retracted,
            prefill_passes_total=self._passes_total[True],
            decode_passes_total=self._passes_total[False],
            prefilled_tokens_total=self._computed_tokens_total[True],
            reused_tokens_total=self._reused_tokens_total,
            decoded_tokens_total=self._computed_tokens_total[False],
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if requests, rows and pages disagree. Walks everything; for tests."""
        self._cache.check_integrity()
        assert len(self._requests) == len(self._waiting) + len(self._running)
        rows = [request.row for request in self._running]
        assert sorted(rows + self._free_rows) == list(range(self._limits.max_running_requests))
        assert self._waiting_uncached_tokens == sum(request.expected_uncached for request in self._waiting)
        assert self._retracted == sum(request.epoch > 0 for request in self._waiting)
        for request in self._running:
            lease = request.lease
            assert lease is not None
            assert 0 <= request.num_computed <= len(request.tokens)
            assert self._under_way or request.num_computed < len(request.tokens)
            assert len(lease.pages) * self._limits.page_size >= request.num_computed
        for request in self._waiting:
            assert request.lease is None
            assert request.num_computed == 0

    def _grow(self) -> None:
        """Give every running request the page its next token needs, retracting the newest if there are none left."""
        size = self._limits.page_size
        for request in list(self._running):
            while (lease := request.lease) is not None and len(lease.pages) * size < len(request.tokens):
                if not self._extend(request) and not self._return_reserved():
                    self._retract(self._running[-1])

    def _reserve_steps(self, chunks: Sequence[Chunk], most: int) -> int:
        """Take the pages for steps that follow one of these chunks: as many, up to `most`, as there can be before
        something must be decided. Returns how many."""
        running, size = self._running, self._limits.page_size
        if len(chunks) < len(running) or any(chunk.is_prefill or not chunk.samples for chunk in chunks):
            return 0
        most = min(most, *(request.num_remaining - 1 for request in running))
        # Nobody's next page is taken for steps that may never be.
        spare = max(self._cache.num_available - len(running), 0)
        while most > 0 and sum(_missing_pages(request, most, size) for request in running) > spare:
            most -= 1
        for request in running if most > 0 else ():
            for _ in range(_missing_pages(request, most, size)):
                self._extend(request)
        return max(most, 0)

    def _extend(self, request: Request) -> bool:
        """One more page for a running request, if there is any."""
        lease = request.lease
        assert lease is not None
        page = self._cache.extend(lease)
        if page is not None:
            self._page_updates.append((request.row, len(lease.pages) - 1, page))
        return page is not None

    def _return_reserved(self) -> bool:
        """Take back pages for steps that have not been; whether there were any."""
        before, size = self._cache.num_available, self._limits.page_size
        for request in self._running:
            lease = request.lease
            assert lease is not None
            self._cache.shrink(lease, -(-len(request.tokens) // size))
        return self._cache.num_available > before

    def _retract(self, request: Request) -> None:
        self._leave(request)
        request.num_computed = 0
        self._enqueue(request, first=True)
        self._ratio.retracted()
        self._retracted += 1
        self.retractions_total += 1

    def _admit(self, now: float) -> None:
        """Move waiting requests to running, in order, as long as rows, pages and this step's token budget last."""
        if not self._waiting:
            return
        budget = self._prefill_budget() - sum(
            request.next_length(MOST_TOLD) for request in self._running if request.num_pending > 1
        )
        being_computed: set[tuple[Node, PageKey]] = set()
        for request in self._running:
            if request.num_pending > 1:
                lease = request.lease
                assert lease is not None
                being_computed |= self._next_published(request, lease)
        self._order()
        deferred: list[Request] = []
        while self._waiting and self._free_rows and budget > 0 and len(deferred) < DEFERRALS_PER_STEP:
            request = self._waiting[0]
            keys = self._matchable(request)
            match = self._cache.match(keys)
            next_page = _next_page(match.node, len(match.pages), keys)
            if next_page and next_page <= being_computed:
                # A running request computes the page that this one needs next: in a step or two it will be cached.
                deferred.append(self._waiting.popleft())
                continue
            wanted = self._wanted_pages(request)
            lease = self._cache.acquire(match, *wanted)
            if lease is None and self._return_reserved():
                lease = self._cache.acquire(match, *wanted)
            if lease is None:
                break
            self._waiting.popleft()
            self._start(request, lease, now)
            being_computed |= self._next_published(request, lease)
            budget -= request.next_length(MOST_TOLD)
        self._waiting.extendleft(reversed(deferred))

    def _order(self) -> None:
        """With lpm: those that were retracted, then by the pages of their prompts that are cached, then by arrival.
        Priorities come before all that."""
        if self._limits.priorities and len(self._waiting) > 1:
            self._waiting = deque(sorted(self._waiting, key=lambda request: -request.priority))
        if self._limits.schedule_policy != "lpm" or not 1 < len(self._waiting) <= ORDERED_REQUESTS:
            return
        if self._free_rows:
            key = {
                r.rid: (-r.priority, r.num_new == 0, -self._cache.match_length(self._matchable(r)))
                for r in self._waiting
            }
            self._waiting = deque(sorted(self._waiting, key=lambda request: key[request.rid]))

    def _wanted_pages(self, request: Request) -> tuple[int, int]:
        """Pages for all the request's tokens, and how many must be left then for it and the others to grow."""
        size = self._limits.page_size
        num_pages = -(-len(request.tokens) // size)
        if not self._running:
            return num_pages, 0
        return num_pages, self._ratio.reserve_pages([*self._running, request], size)

    def _start(self, request: Request, lease: PageLease, now: float) -> None:
        request.lease = lease
        request.row = self._free_rows.pop()
        request.num_computed = lease.num_shared * self._limits.page_size
        self._page_updates += [(request.row, index, page) for index, page in enumerate(lease.pages)]
        self._running.append(request)
        self._waiting_uncached_tokens -= request.expected_uncached
        self._retracted -= request.epoch > 0
        self._reused_tokens_total += request.num_computed
        if request.cached_tokens is None:
            request.admitted_at = now
            request.cached_tokens = request.num_computed
            self._cached_tokens_total += request.num_computed
            self._prompt_tokens_total += request.prompt_length

    def _next_chunks(self) -> list[Chunk]:
        """Decodes first, then prefills, the oldest first, within the budget."""
        # With several plans under way each decodes its share, or one would decode all and the others nothing.
        most = -(-len(self._running) // self._limits.depth)
        pendings = [(request, request.num_pending) for request in self._running]
        chunks = [Chunk.next_of(request, 1) for request, pending in pendings if pending == 1][:most]
        budget, told_budget = self._prefill_budget(), MOST_TOLD
        chunked = self._limits.chunked_prefill_size > 0
        for request, pending in pendings:
            if pending > 1 and budget > 0:
                length = min(request.next_length(told_budget), budget if chunked else pending)
                # Of a prompt that is told perhaps nothing can be computed in this step.
                if length > 0:
                    chunks.append(Chunk.next_of(request, length))
                    budget -= length
                    told_budget -= len(chunks[-1].tells)
        return chunks

    def _prefill_budget(self) -> int:
        size = self._limits.chunked_prefill_size
        return size if size > 0 else UNCHUNKED_PREFILL_TOKENS

    def _matchable(self, request: Request) -> list[PageKey]:
        """Keys of the pages that may come from the cache."""
        return request.keys(request.num_matchable)

    def _next_published(self, request: Request, lease: PageLease) -> set[tuple[Node, PageKey]]:
        """What a running request computes next and others may wait for; nothing if it has much to tell first."""
        if request.next_length(MOST_TOLD) < request.num_pending:
            return set()
        return _next_page(lease.node, lease.num_shared, request.keys(len(request.tokens) - 1))

    def _publish(self, request: Request) -> None:
        lease = request.lease
        assert lease is not None
        if request.num_computed // self._limits.page_size <= lease.num_shared:
            return
        for index in self._cache.publish(lease, request.keys(request.num_computed)):
            self._page_updates.append((request.row, index, lease.pages[index]))

    def _enqueue(self, request: Request, *, first: bool) -> None:
        if first:
            self._waiting.appendleft(request)
        else:
            self._waiting.append(request)
        self._waiting_uncached_tokens += request.expected_uncached

    def _finish(self, request: Request) -> None:
        if request.lease is not None:
            self._leave(request)
        del self._requests[request.rid]

    def _leave(self, request: Request) -> None:
        """Stop running: what was computed stays cached as long as nobody needs the pages."""
        lease = request.lease
        assert lease is not None
        self._cache.release(lease, request.keys(request.num_computed))
        request.lease = None
        request.epoch += 1
        self._running.remove(request)
        self._free_rows.append(request.row)
        request.row = -1


def _missing_pages(request: Request, steps: int, page_size: int) -> int:
    """What it needs for so many tokens beyond the one that is computed next."""
    lease = request.lease
    assert lease is not None
    return max(-(-(len(request.tokens) + steps) // page_size) - len(lease.pages), 0)


def _next_page(node: Node, num_cached: int, keys: list[PageKey]) -> set[tuple[Node, PageKey]]:
    """Where in the tree the first uncached one of `keys` will be published; empty if all are cached."""
    return {(node, keys[num_cached])} if num_cached < len(keys) else set()
