"""Metrics of the data plane that are not of one request: pauses, retries, what is in flight, the loops and the lock."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from warmroute._core import Core, Counters, pause_bounds_ns

BOUNDS = [*(f"{bound / 1e9:g}" for bound in pause_bounds_ns()), "+Inf"]


def cumulative(counts: list[int]) -> list[tuple[str, float]]:
    """Of a histogram of pauses, as an exposition wants it."""
    return list(zip(BOUNDS, map(float, accumulate(counts)), strict=True))


def data_metrics(core: Core, counters: Counters) -> Iterator[Metric]:
    ledgers = core.ledgers()
    yield GaugeMetricFamily(
        "warmroute_requests_in_flight", "Routed requests that are not answered yet", value=sum(x[2] for x in ledgers)
    )
    yield CounterMetricFamily(
        "warmroute_requests_lost", "Requests that were in flight when their process died", value=counters.lost
    )
    yield GaugeMetricFamily(
        "warmroute_processes", "Processes of the router that serve clients or have done so", value=len(ledgers)
    )
    retries = CounterMetricFamily(
        "warmroute_retries", "Attempts beyond the first, by why the one before had failed", labels=("reason",)
    )
    for reason, count in counters.retries:
        retries.add_metric((reason,), count)
    yield retries
    buckets, sum_ns = counters.loop_lag
    lag = HistogramMetricFamily("warmroute_event_loop_lag_seconds", "How late the loops of the data processes were")
    lag.add_metric((), cumulative(buckets), sum_ns / 1e9)
    yield lag
    waits, wait_ns = counters.lock_waits
    yield CounterMetricFamily(
        "warmroute_lock_waits", "How often another process had the lock of the routing state", value=waits
    )
    yield CounterMetricFamily("warmroute_lock_wait_seconds", "For how long they waited for it", value=wait_ns / 1e9)
