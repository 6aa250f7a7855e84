"""A scheduler without torch: a toy executor keeps tokens in slots, so an error in bookkeeping changes answers."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from warmroute_worker.kv.cache import KvCache
from warmroute_worker.messages import Generate, Row, TokenLogprobs
from warmroute_worker.scheduler.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from warmroute_worker.step_plan import StepPlan

VOCAB = 50
EOS = 49
PAGE = 4


def next_token(tokens: Iterable[int]) -> int:
    """The toy model: depends on every token before, in order."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def expected_answer(message: Generate, room: int) -> tuple[list[int], str]:
    tokens = list(message.token_ids)
    stops = set(message.stop_token_ids) | (set() if message.ignore_eos else {EOS})
    for _ in range(min(message.max_new_tokens, room - len(tokens))):
        tokens.append(next_token(tokens))
        if tokens[-1] in stops:
            return tokens[len(message.token_ids) :], "stop"
    return tokens[len(message.token_ids) :], "length"


def toy_logprobs(before: Iterable[int], token: int) -> TokenLogprobs:
    """What the toy model says of a token: depends on every one before."""
    return TokenLogprobs(-float(next_token(before)), [(token, 0.0)])


class ToyExecutor:
    """What an executor must do with a plan, and nothing else: "keys and values" are the tokens themselves."""

    def __init__(self, num_pages: int, num_rows: int, context_length: int) -> None:
        self.slots = np.full((num_pages + 1) * PAGE, -1)
        self.page_table = np.zeros((num_rows, -(-context_length // PAGE)), int)
        self.computed = 0

    def execute(self, plan: StepPlan, most: int = 100) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """`most`: of the steps that may follow, so many are done."""
        for row, index, page in plan.page_updates:
            self.page_table[row, index] = page
        drawn, told = self._step(plan)
        new = drawn
        for place in range(1, 1 + min(plan.more, most)):
            if not set(plan.stop_ids.tolist()).isdisjoint(new):
                break
            starts = (plan.starts + place).astype(np.int32)
            new, _ = self._step(dataclasses.replace(plan, starts=starts, token_ids=np.array(new, np.int64)))
            drawn = drawn + new
        return drawn, told

    def _step(self, plan: StepPlan) -> tuple[list[int], dict[int, TokenLogprobs]]:
        sampled: list[int] = []
        offset = 0
        tokens_before: list[list[int]] = []
        for row, start, length, samples in zip(plan.rows, plan.starts, plan.lengths, plan.sampled, strict=True):
            places = np.arange(start + length)
            slots = self.page_table[row, places // PAGE] * PAGE + places % PAGE
            assert slots.min() >= PAGE, "page 0 is nobody's"
            self.slots[slots[start:]] = plan.token_ids[offset : offset + length]
            if samples:
                sampled.append(next_token(self.slots[slots].tolist()))
            if len(plan.told):
                tokens_before += [self.slots[slots[: end + 1]].tolist() for end in range(start, start + length)]
            offset += length
        assert offset == len(plan.token_ids)
        self.computed += offset
        told = zip(plan.told.rows.tolist(), plan.told.ids.tolist(), strict=True)
        of_prompts = [toy_logprobs(tokens_before[row], token) for row, token in told]
        return sampled, dict(enumerate(of_prompts, len(sampled)))


class Run:
    """A scheduler, its toy executor and everything they have answered."""

    def __init__(self, num_pages: int = 40, **changes: Any) -> None:
        settings: dict[str, Any] = {
            "context_length": 80,
            "vocab_size": VOCAB,
            "eos_token_ids": (EOS,),
            "page_size": PAGE,
            "max_running_requests": 6,
            "chunked_prefill_size": 16,
            "schedule_policy": "fcfs",
            "schedule_conservativeness": 1.0,
            "random_seed": 0,
        }
        self.limits = Limits(**(settings | changes))
        self.cache = KvCache(num_pages)
        self.scheduler = Scheduler(self.limits, self.cache)
        self.executor = ToyExecutor(num_pages, self.limits.max_running_requests, self.limits.context_length)
        self.rows: dict[str, list[Row]] = {}
        self.plans: list[StepPlan] = []
        self.under_way: deque[StepPlan] = deque()

    @property
    def room(self) -> int:
        return min(self.limits.context_length, self.cache.num_pages * PAGE)

    def step(self, steps: int = 1, most: int = 100) -> StepPlan:
        """As the engine does it; a plan runs as late as it may, which is when its tokens are wanted. `steps` may go in
        one plan, of which `most` and the first are done."""
        while len(self.under_way) < self.limits.depth:
            plan = self.scheduler.schedule(steps=steps if self.limits.depth == 1 else 1)
            if not len(plan) and self.under_way:
                self.scheduler.withdraw()
                break
            self.under_way.append(plan)
        plan = self.under_way.popleft()
        for row in self.scheduler.apply(*self.executor.execute(plan, most)).rows:
            self.rows.setdefault(row.rid, []).append(row)
        self.scheduler.check_integrity()
        self.plans.append(plan)
        return plan

    def finish(self, limit: int = 2000) -> None:
        while not self.scheduler.is_idle:
            self.step()
            limit -= 1
            assert limit > 0, "it does not come to an end"

    def answer(self, rid: str) -> tuple[list[int], str | None]:
        rows = self.rows[rid]
        assert all(row.finish_reason is None for row in rows[:-1])
        return [token for row in rows for token in row.token_ids], rows[-1].finish_reason


def generate(rid: str, length: int, new: int = 8, start: int = 0, **more: Any) -> Generate:
    return Generate(rid, [(start + n * n) % (VOCAB - 1) for n in range(length)], new, **more)


def check_told(run: Run, message: Generate) -> None:
    """The prompt's logprobs are complete, right, and in the first row of an answer only."""
    first, prompt = message.sampling.prompt_logprobs_from, message.token_ids
    expected = None if first is None else [toy_logprobs(prompt[:n], prompt[n]) for n in range(first, len(prompt))]
    ends = message.max_new_tokens == 0  # then the only row comes without a token
    bearing = [bool(row.token_ids) or (ends and row.finish_reason == "length") for row in run.rows[message.rid]]
    told = [row.prompt_logprobs for row, bears in zip(run.rows[message.rid], bearing, strict=True) if bears]
    assert told == [expected, *[None] * (len(told) - 1)][: len(told)]
    others = [row for row, bears in zip(run.rows[message.rid], bearing, strict=True) if not bears]
    assert all(row.prompt_logprobs is None for row in others)
