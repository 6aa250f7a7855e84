"""Metrics of dp ranks: what the router knows of each, and what its worker says of it.

Of a worker with one rank the first are those of the worker (`worker_metrics`), and are not written twice. What workers
say disappears when they have not said it for a while: an old number would look like a load that does not move.
"""

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from warmroute._core import TargetInfo
from warmroute.control.kv_feeds import KvFeeds
from warmroute.control.load_monitor import LoadMonitor
from warmroute.control.worker_facts import RankLoad
from warmroute.control.workers import Registry

_GAUGES: Final[dict[str, tuple[str, Callable[[TargetInfo], float]]]] = {
    "warmroute_rank_requests_active": ("Requests in flight at the dp rank", lambda t: t.load),
    "warmroute_rank_outstanding_tokens": (
        "Predicted uncached prompt tokens of the requests in flight at the dp rank",
        lambda t: t.outstanding_tokens,
    ),
    "warmroute_rank_index_characters": (
        "Characters of prompt that the prefix index credits the dp rank with",
        lambda t: t.index_characters,
    ),
    "warmroute_rank_kv_capacity_tokens": (
        "KV cache of the dp rank, as its worker tells; 0: unknown",
        lambda t: t.kv_capacity_tokens,
    ),
}
_COUNTERS: Final[dict[str, tuple[str, Callable[[TargetInfo], float]]]] = {
    "warmroute_rank_selections": ("Requests sent or tried to send to the dp rank", lambda t: t.selections),
    "warmroute_rank_prompt_tokens": ("Prompt tokens of answers that reported them", lambda t: t.prompt_tokens),
    "warmroute_rank_reported_cached_tokens": (
        "Of these, how many the dp rank found in its cache",
        lambda t: t.reported_cached_tokens,
    ),
    "warmroute_rank_predicted_cached_tokens": (
        "Of these, how many the router expected there",
        lambda t: t.predicted_cached_tokens,
    ),
}
# smg's names and labels.
_TOLD: Final[dict[str, tuple[str, Callable[[RankLoad], float | None]]]] = {
    "smg_engine_running_requests": ("Requests that run, as the worker says", lambda load: load.running_requests),
    "smg_engine_waiting_requests": ("Requests that wait, as the worker says", lambda load: load.waiting_requests),
    "smg_engine_token_usage": ("Share of the KV cache in use, as the worker says", lambda load: load.token_usage),
    "smg_engine_gen_throughput": (
        "Tokens generated per second, as the worker says",
        lambda load: load.generated_tokens_per_second,
    ),
    "smg_engine_cache_hit_rate": (
        "Share of prompt tokens found in the cache, as the worker says",
        lambda load: load.cache_hit_rate,
    ),
}


_EVENTS: Final = {
    "batches": "Batches of KV events that were applied",
    "gaps": "Gaps in KV events, which were replayed or made good by a snapshot",
    "resyncs": "Snapshots of KV caches that were read",
    "losses": "Gaps in KV events that could not be made good",
}
_CACHES: Final = {
    "blocks": "Blocks that the dp rank's KV cache holds, by its events",
    "tokens": "Tokens in them",
    "unmapped_blocks": "Of the blocks, those that the prefix index cannot use: what stands before them is not known",
}


def rank_metrics(registry: Registry, loads: LoadMonitor, feeds: KvFeeds) -> Iterator[Metric]:
    own, told = ("worker", "dp_rank"), ("worker", "model", "dp_rank")
    gauges = {name: GaugeMetricFamily(name, text, labels=own) for name, (text, _) in _GAUGES.items()}
    counters = {name: CounterMetricFamily(name, text, labels=own) for name, (text, _) in _COUNTERS.items()}
    engines = {name: GaugeMetricFamily(name, text, labels=told) for name, (text, _) in _TOLD.items()}
    polls = CounterMetricFamily("smg_engine_load_polls", "Questions to workers for their loads", labels=("result",))
    polls.add_metric(("success",), loads.polls[True])
    polls.add_metric(("failure",), loads.polls[False])
    events = {name: CounterMetricFamily(f"smg_kv_event_{name}", text, labels=own) for name, text in _EVENTS.items()}
    caches = {name: GaugeMetricFamily(f"warmroute_kv_cache_{name}", text, labels=own) for name, text in _CACHES.items()}
    shown: set[str] = set()
    # Of two workers on one URL the one that drains has no series any more: its successor's would be the same.
    for worker in sorted(registry, key=lambda worker: worker.is_draining):
        if worker.facts is None or worker.spec.url in shown:
            continue
        shown.add(worker.spec.url)
        targets = registry.targets(worker)
        for target in targets:
            rank = str(target.rank)
            if len(targets) > 1:
                for name, (_, value) in _GAUGES.items():
                    gauges[name].add_metric((worker.spec.url, rank), value(target))
                for name, (_, value) in _COUNTERS.items():
                    counters[name].add_metric((worker.spec.url, rank), value(target))
            followed = feeds.view(worker, target.rank) or {}
            for name in events.keys() & followed.keys():
                events[name].add_metric((worker.spec.url, rank), followed[name])
            for name in caches.keys() & followed.keys():
                caches[name].add_metric((worker.spec.url, rank), followed[name])
            load = loads.load(worker, target.rank)
            for name, (_, of) in _TOLD.items():
                number = None if load is None else of(load)
                if number is not None:
                    engines[name].add_metric((worker.spec.url, worker.facts.models[0], rank), number)
    yield from (*gauges.values(), *counters.values(), *engines.values(), *events.values(), *caches.values(), polls)
