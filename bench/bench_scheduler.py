"""What the worker's scheduler costs in a decode step: `python -m bench.bench_scheduler [--running 1 8 64 256]`.

Making the plan and taking the tokens, all requests decoding, without torch, ranks or HTTP. Each figure is the median of
the steps of a round, of `--rounds` rounds the middle one.
"""

from __future__ import annotations

import argparse
import statistics
import time

from warmroute_worker.kv.cache import KvCache
from warmroute_worker.messages import Generate, Sampling
from warmroute_worker.scheduler.scheduler import Limits, Scheduler

PROMPT_TOKENS = 32
PAGE_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("us per step      plan    tokens  together")
    for running in options.running:
        rounds = sorted((run(running, options.steps) for _ in range(options.rounds)), key=sum)
        plan, tokens = rounds[len(rounds) // 2]
        print(f"{running:4d} running {plan:8.1f} {tokens:9.1f} {plan + tokens:9.1f}")


def run(running: int, steps: int) -> tuple[float, float]:
    """Microseconds of `Scheduler.schedule` and of `Scheduler.apply`."""
    pages = running * -(-(PROMPT_TOKENS + steps) // PAGE_SIZE)
    limits = Limits(
        context_length=PROMPT_TOKENS + steps + 1,
        vocab_size=1000,
        eos_token_ids=(),
        page_size=PAGE_SIZE,
        max_running_requests=running,
        chunked_prefill_size=-1,
        schedule_policy="fcfs",
        schedule_conservativeness=0.0,
        priorities=False,
        random_seed=0,
        depth=1,
    )
    scheduler = Scheduler(limits, KvCache(pages + 1))
    for number in range(running):
        prompt = [(number + place) % 1000 for place in range(PROMPT_TOKENS)]
        scheduler.add(Generate(str(number), prompt, steps, sampling=Sampling(temperature=0.0)))
    scheduler.apply([1] * len(scheduler.schedule()))
    plans, tokens = [], []
    for _ in range(steps - 2):
        began = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        scheduler.apply([1] * len(plan))
        tokens.append(time.perf_counter() - planned)
        plans.append(planned - began)
        assert len(plan) == running, "all decode in every step"
    return statistics.median(plans) * 1e6, statistics.median(tokens) * 1e6


if __name__ == "__main__":
    main()
