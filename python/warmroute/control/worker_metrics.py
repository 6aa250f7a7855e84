"""Metrics of workers. A worker that drains and its successor on the same URL share their series."""

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from warmroute._core import TargetInfo
from warmroute.control.workers import Registry, Worker

# sglang-router's encoding.
_BREAKER_STATES = {"closed": 0, "open": 1, "half_open": 2}

_GAUGES = {
    "smg_worker_requests_active": "Requests in flight",
    "smg_worker_health": "1: its probes succeed",
    "smg_worker_cb_state": "Circuit breaker: 0 closed, 1 open, 2 half-open",
    "smg_worker_cb_consecutive_failures": "Failures in a row, as the breaker counts them",
    "smg_worker_cb_consecutive_successes": "Successes in a row, as the breaker counts them",
    "warmroute_worker_available": "1: it may get requests now",
    "warmroute_worker_outstanding_tokens": "Predicted uncached prompt tokens of the requests in flight",
    "warmroute_index_characters": "Characters of prompt that the prefix index credits it with",
}
_COUNTERS = {
    "warmroute_worker_selections": "Requests sent or tried to send to it",
    "warmroute_worker_failures": "Attempts that count against it",
    "warmroute_prompt_tokens": "Prompt tokens of answers that reported them",
    "warmroute_reported_cached_tokens": "Of these, how many the worker found in its cache",
    "warmroute_predicted_cached_tokens": "Of these, how many the router expected there",
    "warmroute_completion_tokens": "Tokens generated",
    "warmroute_worker_connects": "Requests sent on a new connection",
    "warmroute_worker_connection_reuses": "Requests sent on a connection that had been used before",
    "warmroute_worker_request_bytes": "Bytes of bodies sent to it",
    "warmroute_worker_response_bytes": "Bytes of bodies that it answered",
}


def worker_metrics(registry: Registry) -> Iterator[Metric]:
    by_url: dict[str, list[Worker]] = {}
    for worker in registry:
        by_url.setdefault(worker.spec.url, []).append(worker)
    gauges = {name: GaugeMetricFamily(name, text, labels=("worker",)) for name, text in _GAUGES.items()}
    counters = {name: CounterMetricFamily(name, text, labels=("worker",)) for name, text in _COUNTERS.items()}
    # The seeds label it with `source`, sglang-router's own pass-through with `worker_addr`: dashboards of both work.
    hit_rate = GaugeMetricFamily(
        "sglang_cache_hit_rate",
        "Share of its prompt tokens that the worker found in its cache, since it was registered",
        labels=("source", "worker_addr"),
    )
    for url, workers in by_url.items():
        values = _values(registry, workers)
        for name, gauge in gauges.items():
            gauge.add_metric((url,), values[name])
        for name, counter in counters.items():
            counter.add_metric((url,), values[name])
        prompt = values["warmroute_prompt_tokens"]
        hit_rate.add_metric((url, url), values["warmroute_reported_cached_tokens"] / prompt if prompt else 0.0)
    yield from gauges.values()
    yield from counters.values()
    yield hit_rate
    yield from _fleet(registry)


def _values(registry: Registry, workers: list[Worker]) -> dict[str, float]:
    """Of the workers of one URL, all ranks together: sums, and of states the worst."""
    targets = [target for worker in workers for target in registry.targets(worker)]
    healthy = any(registry.health(worker) == "ready" for worker in workers)
    return {
        "smg_worker_requests_active": sum(t.load for t in targets),
        "smg_worker_health": int(healthy),
        "smg_worker_cb_state": _worst_breaker(targets),
        "smg_worker_cb_consecutive_failures": max((t.consecutive_failures for t in targets), default=0),
        "smg_worker_cb_consecutive_successes": max((t.consecutive_successes for t in targets), default=0),
        "warmroute_worker_available": int(any(t.available for t in targets)),
        "warmroute_worker_outstanding_tokens": sum(t.outstanding_tokens for t in targets),
        "warmroute_index_characters": sum(t.index_characters for t in targets),
        "warmroute_worker_selections": sum(t.selections for t in targets),
        "warmroute_worker_failures": sum(t.failures for t in targets),
        "warmroute_prompt_tokens": sum(t.prompt_tokens for t in targets),
        "warmroute_reported_cached_tokens": sum(t.reported_cached_tokens for t in targets),
        "warmroute_predicted_cached_tokens": sum(t.predicted_cached_tokens for t in targets),
        "warmroute_completion_tokens": sum(t.completion_tokens for t in targets),
        "warmroute_worker_connects": sum(t.connects for t in targets),
        "warmroute_worker_connection_reuses": sum(t.reuses for t in targets),
        "warmroute_worker_request_bytes": sum(t.request_bytes for t in targets),
        "warmroute_worker_response_bytes": sum(t.response_bytes for t in targets),
    }


def _worst_breaker(targets: list[TargetInfo]) -> int:
    states = {target.breaker for target in targets}
    return _BREAKER_STATES[next((state for state in ("open", "half_open") if state in states), "closed")]


def _fleet(registry: Registry) -> Iterator[Metric]:
    labels = ("worker_type", "connection_mode", "model")
    pool = GaugeMetricFamily("smg_worker_pool_size", "Registered workers", labels=labels)
    selections = CounterMetricFamily("smg_worker_selection", "Choices of a worker", labels=(*labels, "policy"))
    sticky_keys = 0
    sizes: defaultdict[str, int] = defaultdict(int)
    chosen: defaultdict[tuple[str, str], int] = defaultdict(int, registry.retired_selections)
    for worker in registry:
        # A worker that has not told its model yet counts under the empty name.
        model = worker.facts.models[0] if worker.facts else ""
        sizes[model] += 1
        targets = registry.targets(worker)
        sticky_keys += sum(target.sticky_keys for target in targets)
        if policy := registry.policy(worker):
            chosen[model, policy] += sum(target.selections for target in targets)
    for model, size in sizes.items():
        pool.add_metric(("regular", "http", model), size)
    for (model, policy), count in chosen.items():
        selections.add_metric(("regular", "http", model, policy), count)
    keys = GaugeMetricFamily("smg_manual_policy_cache_entries", "Assignments of routing keys that policy manual keeps")
    keys.add_metric((), sticky_keys)
    yield from (pool, selections, keys)
