"""The decision engine (Rust). Nothing here reads a clock or does IO; every `now_ns` is CLOCK_MONOTONIC in ns.

Nothing has a default: `warmroute.config` alone has defaults. Words: a *target* is one dp rank of a worker and lives in
a *slot* (0..4095). The slots of one worker are contiguous; the first is its *head*, which worker-level calls take.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, final

class BadRequest(ValueError):  # noqa: N818
    """The client's body cannot be routed: an answer of 400. `args == (message, param_or_None)`."""

class BadHead(ValueError):  # noqa: N818
    """A head or framing that must be refused. `args == (status, message)`; the connection is closed afterwards."""

class UnknownModel(LookupError):  # noqa: N818
    """No worker serves that model: an answer of 404. `args == (model,)`."""

class RegionBusy(TimeoutError):  # noqa: N818
    """The region's lock was not had in time: an answer of 503."""

# ---------------------------------------------------------------------------------------------------------------- core

@final
class Endpoint:
    CHAT: ClassVar[Endpoint]
    COMPLETIONS: ClassVar[Endpoint]
    GENERATE: ClassVar[Endpoint]
    def __int__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class OutcomeKind:
    """How one attempt at a target ended; decides what the breaker learns and what the lease's claim is worth."""

    ANSWERED: ClassVar[OutcomeKind]
    """The worker's response arrived whole; `status` says what it was (5xx but 501 counts against the worker)."""
    CONNECT_FAILED: ClassVar[OutcomeKind]
    """Refused, unreachable or timed out before the request was sent. The claim is taken back."""
    NO_ANSWER: ClassVar[OutcomeKind]
    """Sent, then reset, closed, garbage or timed out before any byte of the answer. The claim is taken back."""
    BROKEN_STREAM: ClassVar[OutcomeKind]
    """The answer broke off after it had begun."""
    CANCELLED: ClassVar[OutcomeKind]
    """The client went away. Says nothing about the worker."""
    def __int__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Transition:
    """A fact for the log: a machine of the worker at `head` changed its state."""

    @property
    def head(self) -> int: ...
    @property
    def machine(self) -> str: ...  # "health" | "breaker"
    @property
    def previous(self) -> str: ...
    @property
    def current(self) -> str: ...  # pending ready unhealthy | closed open half_open

@final
class RoutedRequest:
    """What one scan of a body found. Remembers which workers failed it."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def model(self) -> str | None: ...
    @property
    def stream(self) -> bool: ...
    @property
    def prompt_bytes(self) -> int:
        """Length of the routed text (all prompts of a batch), in bytes of decoded text."""
    @property
    def rid(self) -> str | None:
        """The client's name for the request; of a batch, the first."""
    @property
    def priority(self) -> int | None: ...
    def blocks(self) -> list[tuple[int, int]]:
        """(key, end in bytes of the text) of each block: equal keys stand for equal text from the beginning."""
    @property
    def attempts(self) -> int:
        """Leases so far."""
    def finish(self, status: int, first_byte_ns: int, now_ns: int) -> None:
        """Count the client's request as answered, once (later calls do nothing).

        `status` is what the client got (499: it went away); `first_byte_ns` is -1 when no byte was sent to it.
        Durations are measured from the `now_ns` given to `Core.read`.
        """

@final
class Lease:
    """One attempt's claim on one target. Dropped without `release`, it counts as CANCELLED."""

    @property
    def slot(self) -> int: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def selected_ns(self) -> int:
        """When it was taken."""
    @property
    def match_bytes(self) -> int: ...
    @property
    def predicted_cached_tokens(self) -> int: ...
    @property
    def splice(self) -> tuple[int, bytes] | None:
        """(offset into the body, bytes to insert there) for a worker with dp ranks, else None."""
    def to_worker(
        self, head: RequestHead, host: bytes, authorization: bytes | None, data: bytes, /
    ) -> tuple[bytes, bytes | None]:
        """The request `data`, which begins with `head`, as it goes to the target: request line, host, content-length,
        x-request-id, of the client's headers only content-type, accept, user-agent, x-correlation-id, traceparent,
        tracestate, the routing keys, x-data-parallel-rank (replaced when a rank was chosen), and authorization
        (replaced by `authorization` when that is given; b"" drops it); then the body with `splice` in it. The second
        part, of a long body, is to be sent behind the first.

        The arguments are written as they are: they must hold no line ends."""
    def complete(self, response: Response, reused: bool, now_ns: int, /) -> tuple[Transition, ...] | None:
        """The answer has arrived whole, and the client has it: `release` with what it says, and the request's `finish`.
        None: no machine moved. Raises RegionBusy: all but the release is done."""
    def answer(
        self,
        parser: HeadParser,
        head: RequestHead,
        keep_alive: bool,
        reused: bool,
        data: bytes,
        now_ns: int,
        /,
    ) -> tuple[bytes, bool, tuple[Transition, ...] | None, Response | None] | None:
        """Of an answer to `head` that is whole in `data`, below 400, and may go on as it is: what the client gets,
        whether the worker's connection can be used again, and what `complete` says, which is done. The Response, if the
        release could not be done: to be released later with it. None: it is no such answer; nothing was done."""
    def release(
        self,
        kind: OutcomeKind,
        status: int,
        first_byte_ns: int,
        response: Response | None,
        reused: bool | None,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int,
        now_ns: int,
        /,
    ) -> tuple[Transition, ...]:
        """Give the claim back; idempotent (a second call returns ()). -1 stands for unknown.

        `response`: the answer, which is looked through for tokens that are not given. `reused`: whether the connection
        had been used before; None: there was none.

        `first_byte_ns` is when the answer's first byte came, on the clock of `now_ns`; with `completion_tokens` it
        tells how fast the target is. `cached_tokens` corrects what the index credits the target with.

        CONNECT_FAILED, NO_ANSWER, and ANSWERED with a retryable status (408, 429, 500, 502, 503, 504) exclude the
        worker from later selects of the same request. CONNECT_FAILED, NO_ANSWER and BROKEN_STREAM ask for a probe of
        the worker at once.
        """

@final
class Explanation:
    """What would be decided, and why."""

    @property
    def policy(self) -> str: ...
    @property
    def chosen(self) -> int | None:
        """The slot; None: nobody is available."""
    @property
    def reason(self) -> str:
        """Which rule of the policy chose it."""
    @property
    def prompt_bytes(self) -> int: ...
    @property
    def candidates(self) -> list[tuple[int, int, int, int, float | None]]:
        """By slot: (slot, bytes of the prompt that it holds, requests in flight, outstanding tokens, seconds that the
        request would cost there, of policies that weigh costs)."""

@final
class TargetInfo:
    """One target as it stands now; for the admin API and the metrics."""

    @property
    def slot(self) -> int: ...
    @property
    def head(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def health(self) -> str: ...  # pending | ready | unhealthy
    @property
    def breaker(self) -> str: ...  # closed | open | half_open
    @property
    def draining(self) -> bool: ...
    @property
    def available(self) -> bool: ...
    @property
    def load(self) -> int:
        """Requests in flight."""
    @property
    def outstanding_tokens(self) -> int:
        """Predicted uncached prompt tokens of the requests in flight."""
    @property
    def consecutive_failures(self) -> int: ...
    @property
    def consecutive_successes(self) -> int: ...
    @property
    def selections(self) -> int: ...
    @property
    def failures(self) -> int: ...
    @property
    def prompt_tokens(self) -> int:
        """Sum over answers that reported it; the two below are over the same answers."""
    @property
    def reported_cached_tokens(self) -> int: ...
    @property
    def predicted_cached_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def connects(self) -> int:
        """Attempts on a new connection; below: on one that had been used."""
    @property
    def reuses(self) -> int: ...
    @property
    def request_bytes(self) -> int:
        """Of bodies that were sent to it."""
    @property
    def response_bytes(self) -> int: ...
    @property
    def kv_capacity_tokens(self) -> int:
        """Of its cache; 0: unknown."""
    @property
    def sticky_keys(self) -> int:
        """Routing keys that were given to it by the policy `manual`."""
    @property
    def index_characters(self) -> int:
        """Characters (bytes) of prompt text that the index credits this target with."""

@final
class RequestSeries:
    """Counters of one (model, endpoint, streaming)."""

    @property
    def model(self) -> str: ...
    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def streaming(self) -> bool: ...
    @property
    def accepted(self) -> int: ...
    @property
    def answered(self) -> dict[int, int]:
        """Status to count; only statuses that occurred."""
    @property
    def attempts(self) -> int: ...
    @property
    def retries(self) -> int:
        """Attempts beyond the first of a request."""
    @property
    def duration_buckets(self) -> list[int]:
        """Counts per bucket of `duration_buckets_ns`, not cumulative; one more for +Inf."""
    @property
    def duration_sum_ns(self) -> int: ...
    @property
    def first_byte_buckets(self) -> list[int]: ...
    @property
    def first_byte_sum_ns(self) -> int: ...
    @property
    def chunks(self) -> int:
        """Pieces in which answers came."""
    @property
    def gap_buckets(self) -> list[int]:
        """Times between two pieces of an answer, by `pause_bounds_ns`; not cumulative; one more for +Inf."""
    @property
    def gap_sum_ns(self) -> int: ...

@final
class Counters:
    """Counters over all processes and models."""

    @property
    def http_requests(self) -> list[tuple[str, str, int]]:
        """(method, path, count) of what `count_http` was told."""
    @property
    def http_responses(self) -> list[tuple[int, str, int]]:
        """(status, path, count)"""
    @property
    def retries(self) -> list[tuple[str, int]]:
        """(why the attempt before had failed, count)"""
    @property
    def loop_lag(self) -> tuple[list[int], int]:
        """Counts by `pause_bounds_ns` and one for +Inf, and the sum in ns."""
    @property
    def lock_waits(self) -> tuple[int, int]:
        """How often the region's lock was somebody else's at first, and for how many ns in all."""
    @property
    def lost(self) -> int:
        """Requests that were in flight when their process died."""

@final
class Upstreams:
    """What requests are sent to workers with, by slot: kept here for `Core.begin`."""

    def __new__(cls) -> Upstreams: ...
    def put(self, slot: int, incarnation: int, host: bytes, authorization: bytes | None, pool: object, /) -> None:
        """Of the worker in that slot; `host`, `authorization`: see `Lease.to_worker`; `pool`: what `begin` returns. Of
        one incarnation none of that changes."""
    def forget(self, pool: object, /) -> None:
        """It is not used any more."""

@final
class Core:
    def __new__(
        cls,
        *,
        region_file: str | None,
        region_fd: int | None,
        slab_fd: int | None,
        processes: int,
        process: int,
        policy: str,
        shadow_policy: str | None,
        cache_threshold: float,
        balance_abs_threshold: int,
        balance_rel_threshold: float,
        assignment_mode: str,
        max_idle_ns: int,
        max_tree_size: int,
        eviction_interval_ns: int,
        index_memory_bytes: int,
        hash_seed: int,
        any_hash_seed: bool,
        seed: int,
        strict_model: bool,
        health_failure_threshold: int,
        health_success_threshold: int,
        breaker_enabled: bool,
        breaker_failure_threshold: int,
        breaker_success_threshold: int,
        breaker_timeout_ns: int,
        breaker_window_ns: int,
        max_concurrent_requests: int,
        queue_size: int,
        requests_per_second: float,
        duration_buckets_ns: Sequence[int],
    ) -> Core:
        """Process `process` of `processes` on one region.

        `region_fd`, `slab_fd`: descriptors that another process left open; without them both are made, in `region_file`
        if that is given. 0 stands for no limit. Raises OSError.
        """

    # -- other processes
    @property
    def region_fd(self) -> int | None:
        """For the other processes. None: the region is this process's alone."""
    @property
    def slab_fd(self) -> int | None:
        """Of this process's own slab, likewise."""
    def make_slab(self, process: int, /) -> int:
        """A slab for a process that is about to be started: its descriptor. Its numbers count here, too."""
    def watch_slab(self, process: int, fd: int, /) -> None:
        """As `make_slab`, with one that exists. Raises OSError when it is of another version."""
    def retire_process(self, process: int, fd: int, /) -> None:
        """That process is dead: what it had in flight is forgotten, what it counted is counted here. `fd` is closed if
        it is of `make_slab`. Raises RegionBusy."""
    def turned_ns(self, process: int, /) -> int | None:
        """When that process's event loop turned last; 0: not yet. None: it is not watched."""
    def turned(self, lag_ns: int, now_ns: int, /) -> None:
        """This process's event loop turned, `lag_ns` later than it should have."""
    def learn_models(self, models: Sequence[str], /) -> None:
        """Names that counters of other processes may be of."""

    # -- limits over all processes
    def enter(self, now_ns: int, /) -> bool | None:
        """A request comes: True: it runs, False: it waits, None: too many wait. Raises RegionBusy; likewise below."""
    def next_turn(self, now_ns: int, /) -> int:
        """Whether one that waits in this process may run: 0: it runs now; ns to wait; -1: not before another ends."""
    def leave(self) -> bool:
        """One that ran in this process has ended; whether any wait, in whatever process."""
    def withdraw(self, refused: bool, /) -> None:
        """One that waited in this process does not any more; `refused`: it waited for too long."""
    def admission(self) -> tuple[int, int, int, int]:
        """(running, waiting, let in, rejected)"""

    # -- a region in a file
    @property
    def region_found(self) -> str | None:
        """What the file was: "new", "kept", or why what was in it could not go on. None: there is no file."""
    def take_over(self) -> list[int]:
        """Heads of the workers in a region that goes on; all are pending now, with nothing in flight."""
    def publish_registry(self, text: bytes, /) -> None:
        """Leave what the region does not say of the workers. Raises MemoryError when it is longer than 2 MiB."""
    def registry(self) -> tuple[int, bytes]:
        """(version, text) that was left last; version 0: none was."""

    # -- a request
    def read(self, path: bytes, routing_headers: bytes, body: bytes, now_ns: int, /) -> RoutedRequest:
        """Scan a body once. `path` is one of the routed paths; `routing_headers` is `RequestHead.routing_headers`.

        Raises BadRequest. Counts the request as accepted (its model's series is settled by the first select). One that
        it refuses is counted as accepted and answered with 400, in the series of the model "other".
        """
    def begin(
        self, parser: HeadParser, upstreams: Upstreams, data: bytes, routes: bool, now_ns: int, /
    ) -> (
        tuple[
            RequestHead,
            bool,
            bytes,
            bool,
            bool,
            RoutedRequest | BadRequest | None,
            Lease | None,
            Any,
            bytes | None,
            bytes | None,
        ]
        | None
    ):
        """The request at the start of `data`: head, whether the body is all there (and not too long), what comes behind
        it (if it is not: behind the head), whether the client wants to use the connection again, whether it is for a
        worker and its client may ask one. If both, and with `routes`: the request and the lease as `route` gives them,
        or in place of the request what it raises; and if `upstreams` knows the target, the pool that it has for it and
        what `to_worker` makes of the request. None for all: more bytes are needed for the head. Raises BadHead (400,
        431, 505)."""
    def read_request(self, head: RequestHead, data: bytes, now_ns: int, /) -> RoutedRequest:
        """As `read`, of bytes that begin with a head that was parsed here."""
    def route(self, head: RequestHead, data: bytes, now_ns: int, /) -> tuple[RoutedRequest, Lease | None, int, int]:
        """`read_request`, and `select` if that gives a lease at once, with its slot and incarnation; if not, ask it
        again what the matter is."""
    def select(self, request: RoutedRequest, now_ns: int, allow_failed: bool, /) -> Lease | None:
        """Choose a target, raise its load, stamp the prefix. None: nobody is available.

        Workers that failed this request are left out unless `allow_failed`. Raises UnknownModel, RegionBusy.
        """

    def explain(self, path: bytes, routing_headers: bytes, body: bytes, now_ns: int, /) -> Explanation:
        """What would be decided for such a request now. Has no effect, and counts nothing.

        Raises ValueError, UnknownModel, RegionBusy.
        """
    def explain_request(self, request: RoutedRequest, now_ns: int, /) -> Explanation:
        """What `select` would decide now. Has no effect. Raises UnknownModel, RegionBusy."""

    # -- workers
    def add_worker(
        self, models: Sequence[str], dp_size: int, kv_capacity_tokens: int, policy: str | None, now_ns: int, /
    ) -> list[int]:
        """Claim `dp_size` slots, pending until probes succeed. `models[0]` is the name, the rest are aliases.

        `kv_capacity_tokens` is per rank; 0: unknown. `policy` becomes that of the models that nobody served before.
        Raises MemoryError when no slot or no place for another model's name is left, ValueError on bad arguments. The
        calls below raise ValueError when no worker has its head there.
        """
    def update_worker(
        self, head: int, models: Sequence[str], kv_capacity_tokens: int, policy: str | None, now_ns: int, /
    ) -> None:
        """The worker was asked again. Its slots stay."""
    def set_kv_capacity(self, slot: int, kv_capacity_tokens: int, /) -> None:
        """The worker told the size of one rank's cache. Raises ValueError when no worker has the slot."""
    # -- what caches tell: hashes are of 64 bits
    def kv_begin(self, slot: int, models: tuple[str, ...], is_new: bool, is_whole: bool, /) -> None:
        """From now on events tell what the rank in `slot` holds; what they told before does not count any more.

        `is_new`: its cache is not the one that was known until now. `is_whole`: it is empty, or a snapshot follows;
        else some of it is not known. Raises ValueError when no worker has the slot."""
    def kv_end(self, slot: int, /) -> None:
        """Nothing tells any more what it holds: what is known of it ages as that of any other."""
    def kv_stored(
        self,
        slot: int,
        hashes: list[int],
        parent: int | None,
        tokens: list[int],
        block_size: int,
        medium: int,
        plain: bool,
        /,
    ) -> bool:
        """Blocks were stored behind `parent` (None: at the beginning of a prompt) in a medium (one bit of 7).

        `plain`: any request with these tokens finds them. False: the event contradicts itself, and was left out.
        Raises ValueError when the rank is not fed, or gone; so do the others."""
    def kv_removed(self, slot: int, hashes: list[int], medium: int | None, /) -> None:
        """Blocks were given up in a medium; None: wherever they were."""
    def kv_resync(self, slot: int, blocks: list[tuple[int, int | None, list[int]]], /) -> None:
        """The cache holds just these blocks: (hash, that of the block before it, tokens), each behind that one."""
    def kv_view(self, slot: int, /) -> tuple[int, int, int] | None:
        """(blocks, tokens, blocks that the index cannot use) of a rank that is fed."""
    def restart_worker(self, head: int, now_ns: int, /) -> None:
        """The worker is known to have lost its cache (restart, flush, new weights): forget what it held. O(1)."""
    def drain_worker(self, head: int, /) -> None:
        """No new leases from now on."""
    def remove_worker(self, head: int, /) -> None:
        """Free its slots; leases still out release without effect. O(1) in the index."""
    def observe_probe(self, head: int, ok: bool, now_ns: int, /) -> tuple[Transition, ...]: ...
    def take_probe_requests(self) -> list[int]:
        """Heads of workers whose failed attempts ask for a probe now; each is named once."""
    def evict(self, now_ns: int, max_buckets: int, /) -> int:
        """Reclaim index entries past their horizon in at most `max_buckets` buckets; how many were freed.

        Once per `eviction_interval_ns` it also cuts every target's credit back to `max_tree_size`.
        """

    # -- views
    def load(self, slot: int, /) -> int: ...
    def target(self, slot: int, /) -> TargetInfo: ...
    def targets(self) -> list[TargetInfo]: ...
    def index_entries(self) -> list[int]:
        """Blocks of the prefix index that each target holds, by slot. Walks the whole index without the GIL."""
    def policy_of_model(self, model: str, /) -> str:
        """By which its requests are routed."""
    def readiness(self) -> tuple[int, int]:
        """(workers available, workers registered)"""
    def series(self) -> list[RequestSeries]: ...
    def shadow_decisions(self) -> tuple[int, int]:
        """Selects in which the shadow policy chose (the same target, another one)."""
    def counters(self) -> Counters: ...
    def ledgers(self) -> list[tuple[int, int, int, int]]:
        """(accepted, answered, in flight, lost) of each process, this one's first. Read between two calls of that
        process, so that accepted == answered + in flight. Lost ones, whose process died, count as answered."""
    def count_http(self, method: str, path: str, status: int, /) -> None:
        """This process answered a request that is not routed, or refused one unread. Unknown names count as other."""
    def check_integrity(self) -> None:
        """Raises AssertionError naming the first broken invariant."""

def policy_names() -> list[str]: ...
def pause_bounds_ns() -> list[int]:
    """Upper bounds of the histograms of pauses."""

# ---------------------------------------------------------------------------------------------------------------- http

@final
class Route:
    """What a request line asks for, as far as the data plane cares."""

    CHAT: ClassVar[Route]
    COMPLETIONS: ClassVar[Route]
    GENERATE: ClassVar[Route]
    HEALTH: ClassVar[Route]
    LIVENESS: ClassVar[Route]
    READINESS: ClassVar[Route]
    CONTROL: ClassVar[Route]
    """Everything else, also a routed path with another method than POST."""
    def __int__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class RequestHead:
    @property
    def method(self) -> str: ...
    @property
    def path(self) -> bytes:
        """Without the query."""
    @property
    def route(self) -> Route: ...
    @property
    def is_routed(self) -> bool:
        """CHAT, COMPLETIONS or GENERATE."""
    @property
    def size(self) -> int:
        """Bytes of the head, the empty line included."""
    @property
    def content_length(self) -> int:
        """-1: none given."""
    @property
    def chunked(self) -> bool: ...
    @property
    def keep_alive(self) -> bool: ...
    @property
    def http_1_0(self) -> bool: ...
    @property
    def expect_continue(self) -> bool: ...
    @property
    def request_id(self) -> bytes:
        """What the request is called, here and at the worker: the first of the configured headers that the client sent
        with visible ASCII of at most 128 bytes, else a name made here."""
    @property
    def authorization(self) -> bytes | None: ...
    @property
    def is_authorized(self) -> bool:
        """Whether it bears the key that the router wants, if it wants one."""
    @property
    def routing_headers(self) -> bytes:
        """The header lines that policies read, as `name: value\\r\\n` with lower-case names; b"" as a rule."""
    def body_in(self, data: bytes, /) -> bytes:
        """Its body, in the bytes that begin with it; of a chunked one the coding has been taken off, and nothing
        follows it."""
    def to_control(self, content_length: int, /) -> bytes:
        """The head to send to the control app: everything end-to-end, with a content-length (-1: none)."""

@final
class Response:
    """What a worker, or the control app, answers: its head, and where its body ends. The bytes of the body are not
    kept."""

    @property
    def status(self) -> int: ...
    @property
    def content_length(self) -> int:
        """-1: none given."""
    @property
    def chunked(self) -> bool: ...
    @property
    def keep_alive(self) -> bool:
        """Whether the worker's connection can be used again after this response."""
    @property
    def began_ns(self) -> int:
        """When its head was complete, or what `held_until` said."""
    @property
    def retry_after_seconds(self) -> int:
        """-1 when absent or a date."""
    @property
    def tokens(self) -> tuple[int, int, int]:
        """(prompt, completion, cached) as its headers (x-prompt-tokens, x-cached-tokens), or else the last bytes of its
        body (a JSON body or an SSE stream) say; -1: unknown."""
    def held_until(self, now_ns: int, /) -> None:
        """It was kept back until now: nobody got its first byte before."""
    def body_in(self, data: bytes, /) -> bytes:
        """What of `data`, in which it began, belongs to its body."""
    def as_it_is(self, request: RequestHead, keep_alive: bool, data: bytes, /) -> bytes | None:
        """Head, with the request's name, and what of the body came with it in `data`, as they go to the client of
        `request` that gets the body in the framing it has; None: that cannot be, since the client speaks HTTP/1.0 or
        the body ends with the connection."""
    def to_client(self, extra: bytes, keep_alive: bool, chunked: bool, /) -> bytes:
        """The head to send to the client: status line and end-to-end headers as the worker sent them, framing headers
        (content-length kept, or transfer-encoding when `chunked`), `connection: close` unless `keep_alive`, then
        `extra` (whole lines, each with CRLF).

        The worker's own x-request-id is dropped: `extra` brings the router's. It must also bring `connection:
        keep-alive` for an HTTP/1.0 client that is to use its connection again."""
    def feed(self, data: bytes, now_ns: int, /) -> int:
        """More of the body. -1: all of `data` belongs to it and it goes on; else how many bytes of `data` end it.

        Raises BadHead(400, ...) on framing that cannot be right.
        """
    @property
    def last_ns(self) -> int:
        """When the last piece came."""
    @property
    def done(self) -> bool: ...
    @property
    def open_chunk_bytes(self) -> int:
        """Of a chunked body that goes on: bytes missing until the current chunk and its CRLF are complete (0: at a
        chunk boundary); -1 inside a chunk's size line or a trailer, or for another framing."""
    def end_of_file(self) -> bool:
        """The connection ended here. True if that ends the body (one without a length, or it was done already)."""

@final
class HeadParser:
    """Understands the heads of both sides."""

    def __new__(
        cls,
        *,
        request_id_headers: Sequence[str],
        max_head_bytes: int,
        max_body_bytes: int,
        authorization: bytes | None,
        id_prefix: bytes,
    ) -> HeadParser:
        """`authorization`: what requests must bear. Names that are made here begin with `id_prefix`."""
    def new_request_id(self) -> bytes:
        """A name for what no head was understood of."""
    def request(self, data: bytes, /) -> RequestHead | None:
        """Parse the head at the start of `data`; None: more bytes are needed. Raises BadHead (400, 431, 505)."""
    def begin_response(
        self, data: bytes, request: RequestHead, now_ns: int, /
    ) -> tuple[Response, int, bool | None] | None:
        """The response to `request` at the start of `data`, behind interim ones: itself, its status, and if its body
        ends here (None: it does not) whether the connection can be used again. None: more bytes are needed for its
        head. Raises BadHead(502, ...)."""

@final
class ChunkDecoder:
    """Takes the chunked coding off."""

    def __new__(cls, max_body_bytes: int, /) -> ChunkDecoder: ...
    def feed(self, data: bytes, /) -> tuple[bytes, int]:
        """(decoded bytes, end): `end` is -1 while the body goes on, else the number of bytes of `data` that ended it.

        Raises BadHead(400 or 413, ...).
        """
