"""From a configuration to the core: the only place where the two are matched."""

from warmroute._core import Core
from warmroute.config import RouterConfig


def build_core(
    config: RouterConfig,
    any_hash_seed: bool = False,
    *,
    processes: int = 1,
    process: int = 0,
    region_fd: int | None = None,
    slab_fd: int | None = None,
) -> Core:
    """`config.seed` and `config.hash_seed` must be known. `any_hash_seed`: a region in a file keeps its own.

    `process` of `processes` on one region; the descriptors are those of a process that has made it. Raises OSError when
    the region cannot be used.
    """
    assert config.seed is not None
    assert config.hash_seed is not None
    return Core(
        region_file=config.region_file,
        region_fd=region_fd,
        slab_fd=slab_fd,
        processes=processes,
        process=process,
        policy=config.policy,
        shadow_policy=config.shadow_policy,
        cache_threshold=config.cache_threshold,
        balance_abs_threshold=config.balance_abs_threshold,
        balance_rel_threshold=config.balance_rel_threshold,
        assignment_mode=config.assignment_mode,
        max_idle_ns=int(config.max_idle_secs * 1e9),
        max_tree_size=config.max_tree_size,
        eviction_interval_ns=int(config.eviction_interval_secs * 1e9),
        index_memory_bytes=config.index_memory,
        hash_seed=config.hash_seed,
        any_hash_seed=any_hash_seed,
        seed=config.seed,
        strict_model=config.strict_model,
        health_failure_threshold=config.health_failure_threshold,
        health_success_threshold=config.health_success_threshold,
        breaker_enabled=not config.disable_circuit_breaker,
        breaker_failure_threshold=config.cb_failure_threshold,
        breaker_success_threshold=config.cb_success_threshold,
        breaker_timeout_ns=int(config.cb_timeout_duration_secs * 1e9),
        breaker_window_ns=int(config.cb_window_duration_secs * 1e9),
        max_concurrent_requests=max(config.max_concurrent_requests, 0),
        queue_size=config.queue_size,
        requests_per_second=config.rate_limit_tokens_per_second or 0.0,
        duration_buckets_ns=[int(seconds * 1e9) for seconds in config.prometheus_duration_buckets],
    )
