"""Metrics: read from the core and the registry at scrape, so that nothing can be out of date.

Names and labels are sglang-router's where it has the metric, `warmroute_` where it has none. A worker's series exist
from registration on and disappear with it; label values are its URL, models that workers serve, and fixed words.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from warmroute._core import Core, Counters, Endpoint, RequestSeries
from warmroute.config import RouterConfig
from warmroute.control.data_metrics import BOUNDS, data_metrics
from warmroute.control.http_counts import HttpCounts
from warmroute.control.kv_feeds import KvFeeds
from warmroute.control.load_monitor import LoadMonitor
from warmroute.control.prober import Prober
from warmroute.control.rank_metrics import rank_metrics
from warmroute.control.worker_metrics import worker_metrics
from warmroute.control.workers import Registry

_ENDPOINTS = {Endpoint.CHAT: "chat", Endpoint.COMPLETIONS: "completions", Endpoint.GENERATE: "generate"}
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "generate": "/generate"}

# Whom an operator asks about it.
_ERROR_TYPES = {
    400: "invalid_request",
    404: "model_not_found",
    408: "request_timeout",
    413: "payload_too_large",
    429: "rate_limited",
    499: "client_disconnected",
    500: "internal_error",
    502: "upstream_error",
    503: "no_available_workers",
    504: "upstream_timeout",
}

_ROUTER = ("router_type", "backend_type", "connection_mode")
_ROUTER_VALUES = ("http", "regular", "http")


class RouterCollector(Collector):
    """Everything the router exports but the process's own numbers."""

    def __init__(
        self,
        core: Core,
        registry: Registry,
        prober: Prober,
        loads: LoadMonitor,
        feeds: KvFeeds,
        counts: HttpCounts,
        config: RouterConfig,
    ) -> None:
        self._core = core
        self._registry = registry
        self._prober = prober
        self._loads = loads
        self._feeds = feeds
        self._counts = counts
        self._is_limited = config.is_limited
        self._bounds = [*map(_bound, config.prometheus_duration_buckets), "+Inf"]

    def collect(self) -> Iterator[Metric]:
        series = self._core.series()
        yield from self._requests(series)
        counters = self._core.counters()
        yield from self._http(series, counters)
        yield from data_metrics(self._core, counters)
        if self._is_limited:
            yield from self._admission()
        yield self._shadow()
        yield _histogram(
            "smg_router_request_duration_seconds",
            "From the request's arrival to the end of its response",
            _ROUTER,
            _ROUTER_VALUES,
            self._bounds,
            [(_key(s), s.duration_buckets, s.duration_sum_ns) for s in series],
        )
        yield _histogram(
            "smg_router_ttft_seconds",
            "From the request's arrival to the first byte of its response (with streaming: the first token)",
            _ROUTER[:2],
            _ROUTER_VALUES[:2],
            self._bounds,
            [(_key(s), s.first_byte_buckets, s.first_byte_sum_ns) for s in series],
        )
        yield from self._chunks(series)
        checks = CounterMetricFamily(
            "smg_worker_health_checks", "Probes of workers by result", labels=("worker_type", "result")
        )
        checks.add_metric(("regular", "success"), self._prober.checks[True])
        checks.add_metric(("regular", "failure"), self._prober.checks[False])
        yield checks
        yield from worker_metrics(self._registry)
        yield from rank_metrics(self._registry, self._loads, self._feeds)

    def _requests(self, series: Iterable[RequestSeries]) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "smg_router_requests",
            "Requests accepted for routing",
            labels=(*_ROUTER, "model", "endpoint", "streaming"),
        )
        errors = CounterMetricFamily(
            "smg_router_request_errors",
            "Requests that were not answered 2xx or 3xx",
            labels=(*_ROUTER, "model", "endpoint", "error_type"),
        )
        attempts = CounterMetricFamily(
            "warmroute_attempts", "Attempts at workers", labels=("model", "endpoint", "streaming")
        )
        retries = CounterMetricFamily(
            "smg_worker_retries", "Attempts beyond the first of a request", labels=("worker_type", "endpoint")
        )
        failed: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        retried: defaultdict[str, int] = defaultdict(int)
        for one in series:
            model, endpoint = _key(one)
            streaming = "true" if one.streaming else "false"
            requests.add_metric((*_ROUTER_VALUES, model, endpoint, streaming), one.accepted)
            attempts.add_metric((model, endpoint, streaming), one.attempts)
            retried[endpoint] += one.retries
            for status, count in one.answered.items():
                if status >= 400:
                    failed[model, endpoint, _error_type(status)] += count
        for key, count in failed.items():
            errors.add_metric((*_ROUTER_VALUES, *key), count)
        for endpoint, count in retried.items():
            retries.add_metric(("regular", endpoint), count)
        yield from (requests, errors, attempts, retries)

    def _shadow(self) -> Metric:
        agreed, differed = self._core.shadow_decisions()
        decisions = CounterMetricFamily(
            "warmroute_shadow_decisions",
            "Selects in which the shadow policy chose the same target, or another one",
            labels=("agrees",),
        )
        decisions.add_metric(("true",), agreed)
        decisions.add_metric(("false",), differed)
        return decisions

    def _http(self, series: Iterable[RequestSeries], counters: Counters) -> Iterator[Metric]:
        """Routed requests as the core counted them, the others as whoever answered them did."""
        asked: defaultdict[tuple[str, str], int] = defaultdict(int, self._counts.requests)
        answered: defaultdict[tuple[int, str], int] = defaultdict(int, self._counts.responses)
        for method, path, count in counters.http_requests:
            asked[method, path] += count
        for status, path, count in counters.http_responses:
            answered[status, path] += count
        for one in series:
            path = _PATHS[_ENDPOINTS[one.endpoint]]
            asked["POST", path] += one.accepted
            for status, count in one.answered.items():
                answered[status, path] += count
        requests = CounterMetricFamily("smg_http_requests", "Requests by path", labels=("method", "path"))
        for (method, path), count in asked.items():
            requests.add_metric((method, path), count)
        responses = CounterMetricFamily("smg_http_responses", "Answers by status", labels=("status_code", "path"))
        for (status, path), count in answered.items():
            responses.add_metric((str(status), path), count)
        yield from (requests, responses)

    def _admission(self) -> Iterator[Metric]:
        running, waiting, let_in, rejected = self._core.admission()
        limited = CounterMetricFamily(
            "smg_http_rate_limit", "Requests that the limits let in, or refused (429, 408)", labels=("result",)
        )
        limited.add_metric(("allowed",), let_in)
        limited.add_metric(("rejected",), rejected)
        yield limited
        yield GaugeMetricFamily("smg_admission_inflight", "Requests that count against the limit", value=running)
        yield GaugeMetricFamily("smg_admission_queue_depth", "Requests that wait for their turn", value=waiting)

    def _chunks(self, series: Sequence[RequestSeries]) -> Iterator[Metric]:
        chunks: defaultdict[tuple[str, str], int] = defaultdict(int)
        for one in series:
            chunks[_key(one)] += one.chunks
        family = CounterMetricFamily(
            "warmroute_response_chunks", "Pieces in which answers came", labels=("model", "endpoint")
        )
        for key, count in chunks.items():
            family.add_metric(key, count)
        yield family
        yield _histogram(
            "warmroute_chunk_gap_seconds",
            "Between two pieces of an answer",
            (),
            (),
            BOUNDS,
            [(_key(s), s.gap_buckets, s.gap_sum_ns) for s in series],
        )


def _histogram(
    name: str,
    text: str,
    labels: tuple[str, ...],
    values: tuple[str, ...],
    bounds: Sequence[str],
    parts: Iterable[tuple[tuple[str, str], Sequence[int], int]],
) -> Metric:
    """A histogram by model and endpoint; `parts`: key, counts per bucket, sum in ns."""
    counts: dict[tuple[str, str], list[int]] = {}
    sums: defaultdict[tuple[str, str], int] = defaultdict(int)
    for key, buckets, sum_ns in parts:
        known = counts.get(key)
        counts[key] = list(buckets) if known is None else [a + b for a, b in zip(known, buckets, strict=True)]
        sums[key] += sum_ns
    family = HistogramMetricFamily(name, text, labels=(*labels, "model", "endpoint"))
    for key, buckets in counts.items():
        cumulative = list(zip(bounds, map(float, accumulate(buckets)), strict=True))
        family.add_metric((*values, *key), cumulative, sums[key] / 1e9)
    return family


def _key(one: RequestSeries) -> tuple[str, str]:
    return one.model, _ENDPOINTS[one.endpoint]


def _error_type(status: int) -> str:
    return _ERROR_TYPES.get(status) or ("client_error" if status < 500 else "server_error")


def _bound(seconds: float) -> str:
    return f"{seconds:g}" if seconds != int(seconds) else f"{seconds:.1f}"
