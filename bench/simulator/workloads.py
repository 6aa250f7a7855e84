"""The workloads by name. Each is a function of a seed; rates are chosen to load eight workers to about two thirds."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

from bench.simulator.engine import Engine
from bench.simulator.workload import Outage, Segment, Session, Turn, Workload


def generated_shared_prefix(seed: int, kv_tokens: int = 524_288, groups: int = 64, prompts: int = 16) -> Workload:
    """W1: SGLang's generated-shared-prefix, 2048 + 128 tokens in, 256 out, everything at once."""
    dice = random.Random(seed)
    order = [group for group in range(groups) for _ in range(prompts)]
    dice.shuffle(order)
    ids = _ids(seed)
    systems = [Segment("system", next(ids), 2048) for _ in range(groups)]
    sessions = [_single(n / 200, systems[group], Segment("user", next(ids), 128), 256) for n, group in enumerate(order)]
    name = "W1" if kv_tokens == 524_288 else f"W1-{kv_tokens // 1024}k"
    return Workload(name, f"shared prefixes {groups} x {prompts}, 2048/128/256", sessions, engine=Engine(kv_tokens))


def rate_ladder(seed: int) -> Workload:
    """W2: llm-d's 150 groups x 5 prompts, 6000 + 1200 in, 1000 out, rising rate, KV 307,328."""
    dice = random.Random(seed)
    ids = _ids(seed)
    systems = [Segment("system", next(ids), 6000) for _ in range(150)]
    order = [system for system in systems for _ in range(5)]
    dice.shuffle(order)
    sessions, now = [], 0.0
    for number, system in enumerate(order):
        now += dice.expovariate((3, 5, 7, 9, 11)[number * 5 // len(order)])
        sessions.append(_single(now, system, Segment("user", next(ids), 1200), 1000))
    return Workload("W2", "150 x 5, 6000/1200/1000, 3 to 11 requests/s", sessions, engine=Engine(307_328))


def prefix_repetition(seed: int) -> Workload:
    """W3: vLLM's prefix repetition, 512 + 128 in, 128 out, 32 concurrent requests per worker."""
    dice = random.Random(seed)
    ids = _ids(seed)
    prefixes = [Segment("user", next(ids), 512) for _ in range(256)]
    sessions = [_single(0.0, dice.choice(prefixes), Segment("user", next(ids), 128), 128) for _ in range(6_000)]
    return Workload("W3", "256 prefixes, 512/128/128, 256 at a time", sessions, concurrency=256)


def chats(seed: int) -> Workload:
    """W4: conversations of 2 to 10 turns that think 10 s between turns; few share a system prompt."""
    return _chats(seed, "W4", "chats of 2 to 10 turns", count_=1_200, rate=9.0, engine=Engine())


def _chats(
    seed: int, name: str, what: str, count_: int, rate: float, engine: Engine, think_seconds: float = 10.0
) -> Workload:
    dice = random.Random(seed)
    ids = _ids(seed)
    systems = [Segment("system", next(ids), 600) for _ in range(20)]
    sessions, now = [], 0.0
    for _ in range(count_):
        now += dice.expovariate(rate)
        turns = []
        for turn in range(dice.randint(2, 10)):
            question = Segment("user", next(ids), dice.choice((60, 120, 250, 900)))
            new = (dice.choice(systems), question) if turn == 0 else (question,)
            turns.append(Turn(new, dice.choice((100, 200, 400, 600))))
        sessions.append(Session(now, tuple(turns), think_seconds))
    return Workload(name, what, sessions, engine=engine)


def tool_agents(seed: int) -> Workload:
    """W5: three tool prompts carry .46, .39 and .15 of the requests; 59 % of all prompt tokens are shared."""
    dice = random.Random(seed)
    ids = _ids(seed)
    heads = [Segment("system", next(ids), 4_800) for _ in range(3)]
    sessions, now = [], 0.0
    for _ in range(2_500):
        now += dice.expovariate(11.0)
        head = dice.choices(heads, (0.46, 0.39, 0.15))[0]
        rest = max(int(dice.lognormvariate(8.0, 0.6)), 64)
        sessions.append(_single(now, head, Segment("user", next(ids), rest), 180))
    return Workload("W5", "tool agents: heads .46/.39/.15", sessions)


def zipf_groups(seed: int) -> Workload:
    """W6: groups whose popularity falls off as Zipf's law with exponent 1.2."""
    dice = random.Random(seed)
    ids = _ids(seed)
    systems = [Segment("system", next(ids), 2048) for _ in range(256)]
    weights = [1 / (rank + 1) ** 1.2 for rank in range(len(systems))]
    sessions, now = [], 0.0
    for _ in range(3_000):
        now += dice.expovariate(34.0)
        system = dice.choices(systems, weights)[0]
        sessions.append(_single(now, system, Segment("user", next(ids), 128), 256))
    return Workload("W6", "256 groups, Zipf 1.2", sessions, engine=Engine(98_304))


def sibling_bursts(seed: int) -> Workload:
    """W7: sixteen siblings of a new prompt arrive within 50 ms, four bursts at a time."""
    dice = random.Random(seed)
    ids = _ids(seed)
    sessions: list[Session] = []
    now = 0.0
    for _ in range(60):
        now += dice.expovariate(0.8)
        for _ in range(4):
            prompt = Segment("system", next(ids), 3_000)
            sessions.extend(
                _single(now + dice.random() * 0.05, prompt, Segment("user", next(ids), 64), 200) for _ in range(16)
            )
    return Workload("W7", "bursts of 4 x 16 siblings", sessions)


def hot_prefix(seed: int) -> Workload:
    """W8: one prefix is in 60 % of the requests."""
    dice = random.Random(seed)
    ids = _ids(seed)
    hot = Segment("system", next(ids), 4_000)
    sessions, now = [], 0.0
    for _ in range(3_000):
        now += dice.expovariate(28.0)
        first = hot if dice.random() < 0.6 else Segment("system", next(ids), 1_000)
        sessions.append(_single(now, first, Segment("user", next(ids), 200), 250))
    return Workload("W8", "one prefix in 60 % of requests", sessions)


def capacity_churn(seed: int, fifo: bool = False) -> Workload:
    """W9: chats whose working set is about twice the caches; W9-fifo: whose workers evict what came first."""
    name, order = ("W9-fifo", "first in, first out") if fifo else ("W9", "least recently used")
    engine = Engine(65_536, fifo=fifo)
    return _chats(seed, name, f"chats, caches half as large as needed, {order}", 900, 1.5, engine, 40.0)


def overload(seed: int) -> Workload:
    """W9-full: the same, and requests that wait for room: those in flight leave next to nothing for prefixes."""
    return _chats(seed, "W9-full", "chats, caches full of requests in flight", 900, 4.5, Engine(65_536))


def lockstep_ranks(seed: int) -> Workload:
    """W10: one worker of eight dp-attention ranks, heavy-tailed prompts, many shared."""
    return _lockstep(seed, "W10", requests=2_000, rate=9.0)


def full_ranks(seed: int, concurrency: int = 256) -> Workload:
    """W10-full: the same ranks with as much to do as they can: the next prompt comes when an answer ends."""
    return _lockstep(seed, "W10-full", requests=1_500, concurrency=concurrency)


def _lockstep(seed: int, name: str, requests: int, rate: float = 0.0, concurrency: int = 0) -> Workload:
    dice = random.Random(seed)
    ids = _ids(seed)
    systems = [Segment("system", next(ids), 1_500) for _ in range(64)]
    sessions, now = [], 0.0
    for _ in range(requests):
        now += dice.expovariate(rate) if rate else 0.0
        question = Segment("user", next(ids), min(int(dice.paretovariate(1.2) * 100), 20_000))
        sessions.append(_single(now, dice.choice(systems), question, 300))
    what = "8 lock-step ranks, heavy-tailed prompts" + (f", {concurrency} at a time" if concurrency else "")
    return Workload(name, what, sessions, concurrency, workers=1, ranks=8, engine=Engine(131_072))


def outages(seed: int) -> Workload:
    """W11: the chats of W4 while workers die and come back."""
    base = _chats(seed, "W11", "chats, workers die and come back", 900, 8.0, Engine())
    falls = (Outage(30.0, 0, 20.0), Outage(60.0, 3, 30.0), Outage(100.0, 5, 10.0), Outage(100.0, 6, 40.0))
    return Workload(base.name, base.what, base.sessions, engine=base.engine, outages=falls)


def _single(start: float, first: Segment, second: Segment, output_tokens: int) -> Session:
    return Session(start, (Turn((first, second), output_tokens),))


def _ids(seed: int) -> Iterator[int]:
    """Texts of one seed are not those of another."""
    return count(seed << 32)


WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "W1": generated_shared_prefix,
    **{f"W1-{k}k": partial(generated_shared_prefix, kv_tokens=k * 1024) for k in (32, 48, 96)},
    "W2": rate_ladder,
    "W3": prefix_repetition,
    "W4": chats,
    "W5": tool_agents,
    "W6": zipf_groups,
    "W7": sibling_bursts,
    "W8": hot_prefix,
    "W9": capacity_churn,
    "W9-fifo": partial(capacity_churn, fifo=True),
    "W9-full": overload,
    "W10": lockstep_ranks,
    "W10-full": full_ranks,
    "W11": outages,
}
