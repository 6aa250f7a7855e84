"""The router's configuration: every field, its flag's help, and its default, each exactly once.

`--cache-threshold` is `RouterConfig.cache_threshold` and `WARMROUTE_CACHE_THRESHOLD`; `command_line` derives the flags
from the fields. Defaults are sglang-router 0.3.2's, or those of its documentation where the two differ.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from warmroute.directory import parse_worker_url

Policy = Literal[
    "cache_aware",
    "consistent_hashing",
    "least_cost",
    "least_load",
    "manual",
    "power_of_two",
    "round_robin",
    "random",
]
AssignmentMode = Literal["random", "min_load", "min_group"]
AccessLogFormat = Literal["json", "text"]
LogLevel = Literal["debug", "info", "warn", "error"]

MIB: Final = 1 << 20


MAX_PROCESSES: Final = 64

TEXT_PER_INDEX_BYTE: Final = 10


def indexed_text_bytes(index_memory: int) -> int:
    """How much distinct prompt text an index of that size knows, with prompts of 4 KB; about twice that at 32 KB."""
    return index_memory * TEXT_PER_INDEX_BYTE


class ConfigError(ValueError):
    """A value that cannot be meant. The message names the field and the value and says what would be right."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}: {value!r} {expected}")
        self.name = name


def _flag(default: Any, help_text: str, unit: str | None = None, secret: bool = False) -> Any:
    """A field with what its flag needs. `secret`: `GET /config` tells only whether it is set."""
    return field(default=default, metadata={"help": help_text, "unit": unit, "secret": secret})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Immutable, and valid once constructed: raises ConfigError otherwise."""

    # -- listening
    host: str = _flag("0.0.0.0", "address or host name to listen on", "HOST")
    port: int = _flag(30000, "port to listen on", "PORT")
    worker_urls: tuple[str, ...] = _flag((), "workers to start with; more join by POST /workers", "URL")
    api_key: str | None = _flag(None, "Bearer key clients must send; start-up workers inherit it", "KEY", secret=True)
    max_payload_size: int = _flag(512 * MIB, "largest request body, in bytes; a larger one is answered 413", "BYTES")
    max_concurrent_requests: int = _flag(-1, "most requests that run at once; -1: no limit", "REQUESTS")
    queue_size: int = _flag(100, "most requests that wait for a limit; more are answered 429", "REQUESTS")
    queue_timeout_secs: float = _flag(60.0, "seconds that a request may wait; after that it is answered 408", "SECONDS")
    rate_limit_tokens_per_second: float | None = _flag(
        None, "requests that may begin per second, and at once; unset: no limit", "REQUESTS"
    )
    processes: int = _flag(
        1, "processes that serve clients, beside the one that supervises them; 0: one process does everything", "COUNT"
    )
    max_connections: int = _flag(
        0, "most connections of clients per process; 0: what the limit of open files leaves room for", "CONNECTIONS"
    )
    max_buffered_bytes: int = _flag(
        1 << 30,
        "most bytes of request bodies that are kept at once, over all processes; more are answered 503",
        "BYTES",
    )
    client_header_timeout_secs: float = _flag(
        30.0, "longest time that a client may take to send the head of a request, in seconds", "SECONDS"
    )
    client_body_timeout_secs: float = _flag(
        30.0, "longest pause of a client within the body of a request, in seconds", "SECONDS"
    )
    client_idle_timeout_secs: float = _flag(
        300.0, "seconds after which a client's idle connection is closed", "SECONDS"
    )
    connect_timeout_secs: float = _flag(5.0, "longest time to connect to a worker, in seconds", "SECONDS")
    first_byte_timeout_secs: float = _flag(
        1800.0, "longest time from the choice of a worker to the first byte of its answer, in seconds", "SECONDS"
    )
    stream_idle_timeout_secs: float = _flag(
        300.0, "longest pause of a worker within an answer that has begun, in seconds", "SECONDS"
    )
    request_timeout_secs: float = _flag(1800.0, "longest time a request may take, in seconds", "SECONDS")
    shutdown_grace_period_secs: float = _flag(
        180.0,
        "how long running requests may go on after SIGTERM or after DELETE of their worker, in seconds",
        "SECONDS",
    )
    request_id_headers: tuple[str, ...] = _flag(
        ("x-request-id", "x-correlation-id", "x-trace-id", "request-id"),
        "headers that may carry the client's request id; the first one present counts",
        "HEADER",
    )
    expose_worker: bool = _flag(False, "name the worker (its id) in the response header x-warmroute-worker")

    # -- policy
    policy: Policy = _flag("cache_aware", "how a worker is chosen")  # noqa: RUF009 (field(), as its neighbours)
    shadow_policy: Policy | None = _flag(  # noqa: RUF009
        None, "a policy that decides every request once more, without effect; its agreement is a metric"
    )
    record_decisions: str | None = _flag(
        None, "append every decision and what came of it to this file, without text, for bench.simulator", "FILE"
    )
    log_decisions: float = _flag(0.0, "share of the decisions that are explained in the log, 0 to 1", "SHARE")
    cache_threshold: float = _flag(
        0.5, "cache_aware: follow a prefix match longer than this share of the prompt", "SHARE"
    )
    balance_abs_threshold: int = _flag(
        32, "cache_aware: loads are imbalanced when max - min exceeds this ...", "REQUESTS"
    )
    balance_rel_threshold: float = _flag(1.5, "... and max exceeds min times this", "FACTOR")
    assignment_mode: AssignmentMode = _flag(  # noqa: RUF009
        "random", "manual: who gets a new routing key: anybody, the fewest requests, the fewest keys"
    )
    max_idle_secs: float = _flag(
        4 * 3600.0, "manual: seconds without use after which a routing key is forgotten", "SECONDS"
    )
    eviction_interval_secs: float = _flag(120.0, "seconds in which the whole prefix index is swept once", "SECONDS")
    max_tree_size: int = _flag(1 << 26, "most characters of prompt the index credits one worker with", "CHARACTERS")
    # A million entries of 16 bytes, each for a block of 128..512 characters.
    index_memory: int = _flag(16 * MIB, "bytes of memory for the prefix index of all workers", "BYTES")
    region_file: str | None = _flag(
        None,
        "keep the prefix index and the workers in this file, so that a restarted router is warm; best in /dev/shm",
        "FILE",
    )
    dp_aware: bool = _flag(
        True, "each dp rank of a worker is a target of its own; with --no-dp-aware the worker divides requests itself"
    )
    kv_events: bool = _flag(
        False, "follow what the workers' KV caches tell of themselves, and credit them with what they hold"
    )
    strict_model: bool = _flag(False, "answer 404 to an unknown model even when only one model is served")
    seed: int | None = _flag(None, "seed of every random choice, for reproducible runs", "INTEGER")
    # Whoever knows it can make prompts that collide.
    hash_seed: int | None = _flag(None, "seed of the prefix hashes; random unless given", "INTEGER", secret=True)

    # -- retries
    retry_max_retries: int = _flag(5, "attempts per request, the first included", "ATTEMPTS")
    retry_initial_backoff_ms: int = _flag(50, "wait before the second attempt after a retryable status", "MS")
    retry_max_backoff_ms: int = _flag(30000, "longest wait between attempts", "MS")
    retry_backoff_multiplier: float = _flag(1.5, "growth of the wait per attempt", "FACTOR")
    retry_jitter_factor: float = _flag(0.2, "random part of the wait, 0 to 1", "SHARE")
    disable_retries: bool = _flag(False, "one attempt per request")

    # -- circuit breaker
    cb_failure_threshold: int = _flag(10, "failures within the window that open a worker's breaker", "COUNT")
    cb_success_threshold: int = _flag(3, "successes that close a half-open breaker", "COUNT")
    cb_timeout_duration_secs: float = _flag(60.0, "seconds until an open breaker is tried again", "SECONDS")
    cb_window_duration_secs: float = _flag(120.0, "seconds for which a failure counts", "SECONDS")
    disable_circuit_breaker: bool = _flag(False, "breakers never open")

    # -- health checks
    health_failure_threshold: int = _flag(3, "failed checks in a row that make a worker unhealthy", "COUNT")
    health_success_threshold: int = _flag(2, "good checks in a row that make a worker ready", "COUNT")
    health_check_timeout_secs: float = _flag(5.0, "longest time a check may take, in seconds", "SECONDS")
    health_check_interval_secs: float = _flag(
        60.0, "seconds between checks of a ready worker (others: at most 1 s)", "SECONDS"
    )
    health_check_endpoint: str = _flag("/health", "path that is asked", "PATH")
    disable_health_check: bool = _flag(False, "a worker is ready once it told its model, and is not checked afterwards")
    load_monitor_interval: float = _flag(
        10.0, "seconds after which a worker is asked again what each of its ranks has to do", "SECONDS"
    )
    disable_load_monitoring: bool = _flag(False, "workers are not asked what they have to do")
    worker_startup_timeout_secs: float = _flag(
        1800.0, "seconds after which a worker that never answered is reported as failed (it is still asked)", "SECONDS"
    )
    worker_startup_check_interval: float = _flag(
        30.0,
        "seconds between reminders in the log that a worker has not answered yet; below 1: also between checks",
        "SECONDS",
    )

    # -- observability
    prometheus_port: int = _flag(29000, "port that serves GET /metrics alone (the main port serves it too)", "PORT")
    prometheus_host: str = _flag("0.0.0.0", "address of that port", "HOST")
    prometheus_duration_buckets: tuple[float, ...] = _flag(
        # sglang-router's range: 1 ms to 240 s.
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 240.0),
        "upper bounds of the duration histograms, in seconds",
        "SECONDS",
    )
    access_log: str | None = _flag(
        None, "append a line per routed request to this file; - is the standard output", "FILE"
    )
    access_log_format: AccessLogFormat = _flag("json", "form of these lines")  # noqa: RUF009 (likewise)
    log_level: LogLevel = _flag("info", "least severe message that is logged")  # noqa: RUF009 (likewise)

    @property
    def is_limited(self) -> bool:
        """Whether requests may have to wait for their turn."""
        return self.max_concurrent_requests > 0 or self.rate_limit_tokens_per_second is not None

    def __post_init__(self) -> None:
        _check_listening(self)
        _check_policy(self)
        _check_resilience(self)
        _check_observability(self)


# An HTTP token (RFC 9110, 5.6.2).
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _check_listening(config: RouterConfig) -> None:
    _require(config, "host", bool(config.host.strip()), "must be an address or a host name")
    _require_port(config, "port")
    seen: set[str] = set()
    for text in config.worker_urls:
        try:
            url = parse_worker_url(text)
        except ValueError as error:
            raise ConfigError("worker_urls", text, f"cannot be used: {error}") from None
        if url in seen:
            raise ConfigError("worker_urls", text, "is given twice")
        seen.add(url)
    key = config.api_key
    # The value of a secret is not repeated in a message.
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise ConfigError("api_key", "***", "must be printable ASCII without spaces around it, and not empty")
    _require_positive(config, "max_payload_size", "max_buffered_bytes", "request_timeout_secs", "queue_timeout_secs")
    _require_positive(config, "client_header_timeout_secs", "client_body_timeout_secs", "client_idle_timeout_secs")
    _require_positive(config, "connect_timeout_secs", "first_byte_timeout_secs", "stream_idle_timeout_secs")
    _require(config, "processes", 0 <= config.processes <= MAX_PROCESSES, f"must be between 0 and {MAX_PROCESSES}")
    _require(config, "max_connections", config.max_connections >= 0, "must be 0 or more")
    _require(config, "max_concurrent_requests", config.max_concurrent_requests >= -1, "must be -1 (no limit) or more")
    _require(config, "queue_size", config.queue_size >= 0, "must be 0 or more")
    rate = config.rate_limit_tokens_per_second
    usable = rate is None or 0 < rate < float("inf")
    _require(config, "rate_limit_tokens_per_second", usable, "must be above 0")
    _require(config, "shutdown_grace_period_secs", config.shutdown_grace_period_secs >= 0, "must be 0 or more")
    names = config.request_id_headers
    _require(config, "request_id_headers", len(names) > 0, "must name at least one header")
    _require(config, "request_id_headers", all(map(_HEADER_NAME.fullmatch, names)), "must be names of HTTP headers")


def _check_policy(config: RouterConfig) -> None:
    _require_choice(config, "policy", Policy)
    if config.shadow_policy is not None:
        _require_choice(config, "shadow_policy", Policy)
        watchable = config.shadow_policy != "manual"
        _require(config, "shadow_policy", watchable, "follows what it gave before, which a shadow never gives")
    _require_choice(config, "assignment_mode", AssignmentMode)
    _require(config, "log_decisions", 0 <= config.log_decisions <= 1, "must be between 0 and 1")
    _require(config, "cache_threshold", 0 <= config.cache_threshold <= 1, "must be between 0 and 1")
    _require(config, "balance_abs_threshold", config.balance_abs_threshold >= 0, "must be 0 or more")
    finite = config.balance_rel_threshold < float("inf")
    _require(config, "balance_rel_threshold", config.balance_rel_threshold >= 1 and finite, "must be 1.0 or more")
    _require_positive(config, "eviction_interval_secs", "max_tree_size", "max_idle_secs")
    _require(config, "index_memory", config.index_memory >= MIB, "must be at least 1048576 (1 MiB)")
    if config.policy == "power_of_two" and len(config.worker_urls) == 1:
        raise ConfigError(
            "worker_urls", list(config.worker_urls), "is too few: policy power_of_two needs at least 2 workers"
        )
    for name in ("seed", "hash_seed"):
        value = getattr(config, name)
        _require(config, name, value is None or 0 <= value < 1 << 64, "must be between 0 and 2**64 - 1")


def _check_resilience(config: RouterConfig) -> None:
    _require_at_least_one(config, "retry_max_retries", "cb_failure_threshold", "cb_success_threshold")
    _require_at_least_one(config, "health_failure_threshold", "health_success_threshold")
    _require_positive(config, "retry_initial_backoff_ms", "cb_timeout_duration_secs", "cb_window_duration_secs")
    least = config.retry_initial_backoff_ms
    _require(
        config,
        "retry_max_backoff_ms",
        config.retry_max_backoff_ms >= least,
        "must not be below retry_initial_backoff_ms",
    )
    growth = config.retry_backoff_multiplier
    _require(config, "retry_backoff_multiplier", 1 <= growth < float("inf"), "must be 1.0 or more")
    _require(config, "retry_jitter_factor", 0 <= config.retry_jitter_factor <= 1, "must be between 0 and 1")
    _require_positive(config, "health_check_timeout_secs", "health_check_interval_secs")
    _require_positive(config, "worker_startup_timeout_secs", "worker_startup_check_interval")
    _require_positive(config, "load_monitor_interval")
    path = config.health_check_endpoint
    usable = path.startswith("/") and path.isascii() and path.isprintable() and " " not in path
    _require(config, "health_check_endpoint", usable, "must be a path that starts with /")


def _check_observability(config: RouterConfig) -> None:
    _require_port(config, "prometheus_port")
    _require(config, "prometheus_host", bool(config.prometheus_host.strip()), "must be an address or a host name")
    same = config.prometheus_port == config.port
    _require(config, "prometheus_port", not same, "is the router's own port (which serves /metrics too)")
    buckets = config.prometheus_duration_buckets
    rising = all(a < b for a, b in zip((0.0, *buckets), buckets, strict=False))
    usable = 1 <= len(buckets) <= 64 and rising and buckets[-1] < float("inf")
    _require(config, "prometheus_duration_buckets", usable, "must be 1 to 64 rising numbers above 0")
    _require_choice(config, "access_log_format", AccessLogFormat)
    _require_choice(config, "log_level", LogLevel)


def _require(config: RouterConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(name, getattr(config, name), expected)


def _require_positive(config: RouterConfig, *names: str) -> None:
    for name in names:
        _require(config, name, 0 < getattr(config, name) < float("inf"), "must be above 0")


def _require_at_least_one(config: RouterConfig, *names: str) -> None:
    for name in names:
        _require(config, name, getattr(config, name) >= 1, "must be 1 or more")


def _require_port(config: RouterConfig, name: str) -> None:
    _require(config, name, 1 <= getattr(config, name) <= 65535, "must be between 1 and 65535")


def _require_choice(config: RouterConfig, name: str, choices: Any) -> None:
    _require(config, name, getattr(config, name) in choices.__args__, f"must be one of {', '.join(choices.__args__)}")
