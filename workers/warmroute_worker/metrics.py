"""What GET /metrics says: SGLang's names (`sglang:`), so that its dashboards and routers can read this worker.

Token and load numbers are the driver's (`Load`, one per step) and are copied at scrape; the HTTP process adds what only
it knows: requests, times, aborts. `Metrics` is written on the event loop only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client.metrics_core import Metric

    from warmroute_worker.messages import Load, Times
    from warmroute_worker.rank_statuses import RankStatuses
    from warmroute_worker.topology import Layout, Place

_FIRST_TOKEN_BUCKETS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.4,
    0.6,
    0.8,
    1,
    2,
    4,
    8,
    16,
    32,
    64,
)
"""SGLang's begin at 0.1 s, above what a cached prompt takes here."""
_TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 4)
_REQUEST_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1, 2, 5, 10, 20, 40, 60, 100, 200, 400)


# SGLang's: 1 ms to 20 minutes.
_STAGE_BUCKETS = tuple(0.001 * 1.62**power for power in range(30))
_QUEUE_BUCKETS = (0.0001, *_FIRST_TOKEN_BUCKETS)


_COORDINATES = ("tp_rank", "pp_rank", "dp_rank", "moe_ep_rank")


class Throughput:
    """Generated tokens per second over the last whole window; 0 when the engine is idle. Pure."""

    WINDOW_SECONDS = 1.0

    def __init__(self) -> None:
        self._since = 0.0
        self._tokens_then = 0
        self._rate = 0.0

    def observe(self, generation_tokens_total: int, now: float) -> None:
        """Called for each step."""
        elapsed = now - self._since
        if elapsed < self.WINDOW_SECONDS:
            return
        idle = elapsed > 2 * self.WINDOW_SECONDS  # nothing came for a while: this step starts a new window
        self._rate = 0.0 if idle else (generation_tokens_total - self._tokens_then) / elapsed
        self._since, self._tokens_then = now, generation_tokens_total

    def tokens_per_second(self, now: float) -> float:
        return self._rate if now - self._since <= 2 * self.WINDOW_SECONDS else 0.0


class Buckets(NamedTuple):
    """Upper ends of histograms' buckets, in seconds; None: our own."""

    first_token: tuple[float, ...] | None = None
    inter_token: tuple[float, ...] | None = None
    request: tuple[float, ...] | None = None


DEFAULT_BUCKETS = Buckets()


class RankMetrics:
    """What the HTTP process counts of one data-parallel rank."""

    def __init__(self, metrics: Metrics, labels: dict[str, str]) -> None:
        self._metrics, self.labels = metrics, labels
        self.throughput = Throughput()
        self.requests = metrics.requests.labels(**labels)
        self.aborted = metrics.aborted.labels(**labels)
        self.time_to_first_token = metrics.time_to_first_token.labels(**labels)
        self.inter_token_latency = metrics.inter_token_latency.labels(**labels)
        self.request_latency = metrics.request_latency.labels(**labels)
        self._queue_time = metrics.queue_time.labels(**labels)
        self._waiting, self._prefill = (
            metrics.stage_latency.labels(**labels, stage=stage) for stage in ("prefill_waiting", "prefill_forward")
        )

    def observe_times(self, times: Times) -> None:
        """Of a request, with its first token."""
        self._queue_time.observe(times.queue)
        self._waiting.observe(times.queue)
        self._prefill.observe(times.prefill)

    def started(self, startup_seconds: float, load_seconds: float) -> None:
        """Once, when the engine is ready."""
        self._metrics.startup.labels(**self.labels).set(startup_seconds)
        self._metrics.load_weights.labels(**self.labels).set(load_seconds)


class Metrics:
    """One registry per worker: nothing global, so that tests can hold several."""

    def __init__(self, model_name: str, layout: Layout, buckets: Buckets = DEFAULT_BUCKETS) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine_type": "unified"}
        self._layout = layout
        names = [*self._labels, *_COORDINATES]

        def histogram(name: str, text: str, buckets: tuple[float, ...], *more: str) -> Histogram:
            return Histogram(name, text, [*names, *more], registry=self._registry, buckets=buckets)

        self.requests = Counter("sglang:num_requests", "Requests that ended", names, registry=self._registry)
        text = "Requests whose client left or that were aborted"
        self.aborted = Counter("sglang:num_aborted_requests", text, names, registry=self._registry)
        self.time_to_first_token = histogram(
            "sglang:time_to_first_token_seconds", "Arrival to first token", buckets.first_token or _FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = histogram(
            "sglang:inter_token_latency_seconds",
            "Between two tokens of an answer",
            buckets.inter_token or _TOKEN_BUCKETS,
        )
        self.request_latency = histogram(
            "sglang:e2e_request_latency_seconds", "Arrival to last token", buckets.request or _REQUEST_BUCKETS
        )
        text = "Arrival at the scheduler to admission, of requests that got a token"
        self.queue_time = histogram("sglang:queue_time_seconds", text, _QUEUE_BUCKETS)
        text = "The same (prefill_waiting), and from then until the first token (prefill_forward)"
        self.stage_latency = histogram("sglang:per_stage_req_latency_seconds", text, _STAGE_BUCKETS, "stage")
        text = "Seconds from the start of the process until it was ready"
        self.startup = Gauge("sglang:engine_startup_time", text, names, registry=self._registry)
        text = "Seconds that loading the weights took"
        self.load_weights = Gauge("sglang:engine_load_weights_time", text, names, registry=self._registry)
        self._of_ranks = [RankMetrics(self, self.labels_of(layout.place(driver))) for driver in layout.drivers()]

    def labels_of(self, place: Place) -> dict[str, str]:
        coordinates = (place.tp_rank, place.pp_rank, place.dp_rank, place.ep_rank)
        return self._labels | dict(zip(_COORDINATES, map(str, coordinates), strict=True))

    def of_rank(self, dp_rank: int) -> RankMetrics:
        return self._of_ranks[dp_rank]

    def follow(self, load: Callable[[], list[tuple[Load, int] | None]], clock: Callable[[], float]) -> None:
        """Where to read, by data-parallel rank, the driver's last `Load` and the size of the batch, None before it is
        ready."""
        self._registry.register(_LoadCollector(load, self._of_ranks, clock))

    def follow_ranks(self, ranks: RankStatuses) -> None:
        """Where to read what each rank says of itself."""
        labels = [self.labels_of(place) for place in self._layout.places()]
        self._registry.register(_RankCollector(ranks, labels))

    def exposition(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self._registry)


class _LoadCollector:
    def __init__(
        self,
        loads: Callable[[], list[tuple[Load, int] | None]],
        ranks: list[RankMetrics],
        clock: Callable[[], float],
    ) -> None:
        self._loads, self._ranks, self._clock = loads, ranks, clock

    def describe(self) -> Iterable[Metric]:
        """Nothing: otherwise registering would collect, before there is a load."""
        return ()

    def collect(self) -> Iterable[Metric]:
        known = [(rank, *load) for rank, load in zip(self._ranks, self._loads(), strict=True) if load is not None]
        if not known:
            return
        names = list(known[0][0].labels)
        now = self._clock()
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=names)
            for rank, load, most in known:
                gauge.add_metric(list(rank.labels.values()), value(load, rank, most, now))
            yield gauge
        for name, text, field in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=names)
            for rank, load, _ in known:
                counter.add_metric(list(rank.labels.values()), getattr(load, field))
            yield counter
        for name, text, by_mode in _COUNTERS_BY_MODE:
            counter = CounterMetricFamily(name, text, labels=[*names, "mode"])
            for rank, load, _ in known:
                for mode, source in by_mode.items():
                    counter.add_metric([*rank.labels.values(), mode], getattr(load, source) if source else 0)
            yield counter


_GAUGES: tuple[tuple[str, str, Callable[[Load, RankMetrics, int, float], float]], ...] = (
    ("sglang:num_running_reqs", "Requests in the batch", lambda load, *_: load.running),
    ("sglang:num_queue_reqs", "Requests that wait", lambda load, *_: load.waiting),
    ("sglang:num_used_tokens", "KV pool tokens in use by requests", lambda load, *_: load.used_tokens),
    ("sglang:max_total_num_tokens", "KV pool tokens", lambda load, *_: load.total_tokens),
    (
        "sglang:token_usage",
        "Share of the KV pool in use",
        lambda load, *_: load.used_tokens / max(load.total_tokens, 1),
    ),
    ("sglang:cache_hit_rate", "Cached share of all prompt tokens", lambda load, *_: cache_hit_rate(load)),
    ("sglang:gen_throughput", "Generated tokens/s", lambda _, rank, __, now: rank.throughput.tokens_per_second(now)),
    ("sglang:new_token_ratio", "Share of future tokens that is kept free", lambda load, *_: load.new_token_ratio),
    (
        "sglang:num_retracted_reqs",
        "Requests that gave up their pages and wait to be computed again",
        lambda load, *_: load.retracted,
    ),
    ("sglang:is_cuda_graph", "Always 0: there are no CUDA graphs yet", lambda *_: 0),
    ("sglang:utilization", "Share of the batch in use", lambda load, _, most, __: load.running / most),
)

_COUNTERS = (
    ("sglang:prompt_tokens", "Prompt tokens admitted", "prompt_tokens_total"),
    ("sglang:cached_tokens", "Prompt tokens found in the prefix cache", "cached_tokens_total"),
    ("sglang:generation_tokens", "Tokens generated", "generation_tokens_total"),
    ("sglang:num_retracted_requests", "Requests that had to give up their pages", "retractions_total"),
    ("sglang:evicted_tokens", "Tokens evicted from the prefix cache", "evicted_tokens_total"),
)


_COUNTERS_BY_MODE: tuple[tuple[str, str, dict[str, str | None]], ...] = (
    (
        "sglang:cuda_graph_passes",
        "Steps computed, with CUDA graphs (never yet) and without",
        {
            "prefill_cuda_graph": None,
            "prefill_none": "prefill_passes_total",
            "decode_cuda_graph": None,
            "decode_none": "decode_passes_total",
        },
    ),
    (
        "sglang:realtime_tokens",
        "Tokens as they are computed or found in the prefix cache, those of retracted requests each time",
        {
            "prefill_compute": "prefilled_tokens_total",
            "prefill_cache": "reused_tokens_total",
            "decode": "decoded_tokens_total",
        },
    ),
)
"""Fields of `Load` by mode; None: that never happens here."""


class _RankCollector:
    """One series per rank and, of collectives, per operation."""

    _GAUGES = (("weight_bytes", "Bytes of weights"), ("pool_bytes", "Bytes of the KV pool"))
    _COUNTERS = (
        ("steps", "steps", 1, "Steps computed"),
        ("busy_ns", "busy_seconds", 1e-9, "Seconds computing, collectives in the background taken off"),
        ("comm_ns", "comm_seconds", 1e-9, "Seconds in collectives, waiting for others included"),
        ("slot_bytes", "comm_written_bytes", 1, "Bytes written for others to read"),
        ("idle_steps", "idle_steps", 1, "Steps in which the rank only kept in step with others"),
        ("stored_bytes", "kv_stored_bytes", 1, "Bytes of keys and values stored"),
        ("sent_rows", "moe_sent_rows", 1, "Rows sent to experts, those of the same rank included"),
        ("expert_rows", "moe_rows", 1, "Rows computed by the rank's experts"),
        ("overlap_ns", "tbo_overlap_seconds", 1e-9, "Seconds in which rows were on their way and others computed"),
        ("moved_experts", "eplb_moved_experts", 1, "Experts whose weights the rank took over"),
    )

    def __init__(self, ranks: RankStatuses, labels: list[dict[str, str]]) -> None:
        self._ranks, self._labels = ranks, labels

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        ranks = self._ranks.read()
        names = list(self._labels[0])
        values = [list(labels.values()) for labels in self._labels]
        for key, text in self._GAUGES:
            gauge = GaugeMetricFamily(f"warmroute_worker_{key}", text, labels=names)
            for rank, own in zip(ranks, values, strict=True):
                gauge.add_metric(own, rank[key])
            yield gauge
        for key, name, factor, text in self._COUNTERS:
            counter = CounterMetricFamily(f"warmroute_worker_{name}", text, labels=names)
            for rank, own in zip(ranks, values, strict=True):
                counter.add_metric(own, rank[key] * factor)
            yield counter
        if any(rank["balancedness_ppm"] for rank in ranks):
            text = "Mean over maximum of the rows that ranks' experts computed, between the last two looks"
            gauge = GaugeMetricFamily("sglang:eplb_balancedness", text, labels=names)
            for rank, own in zip(ranks, values, strict=True):
                gauge.add_metric(own, rank["balancedness_ppm"] / 1e6)
            yield gauge
        if (bubble := bubble_ratio(ranks)) is not None:
            gauge = GaugeMetricFamily("warmroute_worker_pp_bubble_ratio", "Idle share of pipeline stages", labels=names)
            gauge.add_metric(values[0], bubble)
            yield gauge
        moved = CounterMetricFamily("warmroute_worker_comm_bytes", "Bytes given to collectives", labels=[*names, "op"])
        for rank, own in zip(ranks, values, strict=True):
            for op, count in rank["collectives"].items():
                moved.add_metric([*own, op], count["bytes"])
        yield moved


def bubble_ratio(ranks: list[dict[str, Any]]) -> float | None:
    """1 - computing / (stages x time with something to compute), since the start, over all replicas; None with one
    stage or no work."""
    replicas: dict[int, list[dict[str, Any]]] = {}
    for rank in ranks:
        if rank["tp_rank"] == 0:
            replicas.setdefault(rank.get("dp_rank", 0), []).append(rank)
    stages = len(next(iter(replicas.values())))
    active: int = sum(of_replica[0]["active_ns"] for of_replica in replicas.values())
    if stages < 2 or not active:
        return None
    busy: int = sum(rank["busy_ns"] for of_replica in replicas.values() for rank in of_replica)
    return max(0.0, 1 - busy / (stages * active))


def cache_hit_rate(load: Load) -> float:
    """Cached over all prompt tokens admitted since the start."""
    return load.cached_tokens_total / load.prompt_tokens_total if load.prompt_tokens_total else 0.0
