"""What a run showed, in one row; and what no router could have done better."""

import statistics
from dataclasses import dataclass
from itertools import chain, islice

from bench.simulator.engine import PAGE_TOKENS, PrefixCache
from bench.simulator.simulation import Outcome
from bench.simulator.workload import Request, Workload


@dataclass(frozen=True)
class Row:
    router: str
    hit_rate: float
    first_token_p50: float
    first_token_p99: float
    token_p50: float
    token_p99: float
    tokens_per_second: float
    """Prompt and answer tokens of all workers."""
    load_spread: float
    """Standard deviation of requests per worker over their mean."""
    prediction_p50: float
    """|predicted - reported| cached tokens / prompt tokens; nan for a router that predicts nothing."""
    prediction_p95: float
    prediction_sum: float
    """Sum of predictions / sum of reports - 1."""
    requests: int
    resent: int


def row(router: str, workload: Workload, outcome: Outcome) -> Row:
    answers = outcome.answers
    prompt = sum(answer.prompt_tokens for answer in answers)
    cached = sum(answer.cached_tokens for answer in answers)
    first = sorted(answer.first_token_seconds for answer in answers)
    per_token = sorted(answer.seconds_per_token for answer in answers if answer.output_tokens > 1)
    per_worker = [sum(answer.worker == worker for answer in answers) for worker in range(workload.workers)]
    # The steady state: what the core has not yet learned at the start says nothing about what it knows.
    steady = [answer for answer in answers[len(answers) // 4 :] if answer.predicted_tokens >= 0]
    errors = sorted(abs(answer.predicted_tokens - answer.cached_tokens) / answer.prompt_tokens for answer in steady)
    reported = sum(answer.cached_tokens for answer in steady)
    nan = float("nan")
    return Row(
        router,
        cached / prompt,
        quantile(first, 0.5),
        quantile(first, 0.99),
        quantile(per_token, 0.5),
        quantile(per_token, 0.99),
        (prompt + sum(answer.output_tokens for answer in answers)) / outcome.seconds,
        statistics.pstdev(per_worker) / statistics.mean(per_worker),
        quantile(errors, 0.5) if errors else nan,
        quantile(errors, 0.95) if errors else nan,
        sum(answer.predicted_tokens for answer in steady) / reported - 1 if reported else nan,
        len(answers),
        outcome.resent,
    )


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def reachable(workload: Workload, requests: list[Request]) -> tuple[float, float]:
    """(hit rate with a cache without end, with one cache as large as all together) in the order of `requests`."""
    engine = workload.engine
    pooled = engine.kv_tokens * workload.workers * workload.ranks // PAGE_TOKENS
    return _replay(requests, 1 << 62), _replay(requests, pooled)


def _replay(requests: list[Request], pages: int) -> float:
    cache = PrefixCache(pages, fifo=False)
    hits = total = 0
    for request in requests:
        keys = list(chain.from_iterable(request.keys))
        matched = cache.match(islice(keys, (request.prompt_tokens - 1) // PAGE_TOKENS))
        hits += matched * PAGE_TOKENS
        total += request.prompt_tokens
        cache.pin(keys[:matched])
        if cache.take(len(keys) - matched):
            for key in keys[matched:]:
                if not cache.add(key):
                    cache.free += 1
            cache.unpin(keys)
        else:
            cache.unpin(keys[:matched])
    return hits / total if total else 0.0


def table(workload: Workload, rows: list[Row], limits: tuple[float, float]) -> str:
    lines = [
        f"\n### {workload.name}: {workload.what}",
        f"\nKV {workload.engine.kv_tokens:,} tokens x {workload.workers * workload.ranks}; "
        f"hit rate with an endless cache {limits[0]:.1%}, with one cache as large as all together {limits[1]:.1%}\n",
        "| router | hit rate | TTFT p50 | p99 ms | per token p50 | p99 ms | tokens/s | spread "
        "| predicted p50 / p95 / sum |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        prediction = "-"
        if each.prediction_p50 == each.prediction_p50:
            prediction = f"{each.prediction_p50:.1%} / {each.prediction_p95:.1%} / {each.prediction_sum:+.1%}"
        lines.append(
            f"| {each.router} | {each.hit_rate:.1%} "
            f"| {each.first_token_p50 * 1e3:.0f} | {each.first_token_p99 * 1e3:.0f} "
            f"| {each.token_p50 * 1e3:.1f} | {each.token_p99 * 1e3:.1f} | {each.tokens_per_second:,.0f} "
            f"| {each.load_spread:.2f} | {prediction} |"
        )
    return "\n".join(lines)
