"""What a worker can be asked for: every default and every check of a value, once. Imports no torch.

Names and meanings are those of `sglang.srt.server_args`; command_line.py has the flags.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from typing import Any

from warmroute_worker.topology import Layout, Nodes

DEVICES = ("auto", "cpu", "cuda", "xpu", "npu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
SCHEDULE_POLICIES = ("fcfs", "lpm")
ATTENTION_BACKENDS = ("auto", "torch_native", "triton", "fa3", "flashinfer", "flex_attention")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOAD_BALANCE_METHODS = ("auto", "round_robin", "total_requests", "total_tokens")
A2A_BACKENDS = ("none", "deepep", "mooncake", "nixl", "mori")
GROUPED_RUNNERS = ("grouped_mm", "triton", "deep_gemm")
RUNNERS = ("auto", "loop", *GROUPED_RUNNERS)
EP_ROWS = ("rank", "expert")
DEEPEP_MODES = ("auto", "normal", "low_latency")
DISPATCH_ALGORITHMS = ("static", "dynamic")
MAX_RANKS = 64
MOST_CONTINUOUS_STEPS = 64
"""Nobody sees a sign of life from a rank meanwhile."""

DP_CONSERVATIVENESS = 0.3
"""With DP attention `schedule_conservativeness` is multiplied by it, as in SGLang: ranks keep each other waiting, so a
fuller batch is worth more than a retraction costs."""


@dataclass(frozen=True)
class WorkerArgs:
    """What the worker was asked for. Effective values (device, pool size ...) come from the driver's `Ready`."""

    model_path: str
    """A folder in Hugging Face layout, a hub id whose snapshot is on disk, or `demo`; see `model_folder.py`."""
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 30000
    """0 lets the system choose; the line that says the worker is ready names the port."""
    device: str = "auto"
    dtype: str = "auto"
    page_size: int = 16
    """Tokens per page of the KV pool; the prefix cache matches whole pages."""
    max_total_tokens: int | None = None
    """Size of the KV pool in tokens; None: from `mem_fraction_static` and what memory there is."""
    mem_fraction_static: float | None = None
    """Share of the device's memory for weights and KV pool together (SGLang's meaning); None: chosen by the engine."""
    max_running_requests: int = 256
    schedule_policy: str = "fcfs"
    """Who is admitted first: fcfs: who came first; lpm: whose prompt has the longest cached prefix."""
    schedule_conservativeness: float = 1.0
    """Scales the share of future tokens that is kept free when a request is admitted; larger: fewer retractions."""
    chunked_prefill_size: int = 2048
    """Prompt tokens computed per step at most; -1: whole prompts."""
    num_continuous_decode_steps: int | None = None
    """Decode steps that may follow each other without the scheduler; None: up to 8, within 10 ms."""
    context_length: int | None = None
    """None: what the model's config.json says."""
    random_seed: int = 0
    load_format: str = "auto"
    threads: int | None = None
    """Torch threads of each rank; None: the cores this process may use, divided among the ranks."""
    tp_size: int = 1
    """Ranks among which each layer is divided."""
    pp_size: int = 1
    """Stages into which the layers are divided."""
    dp_size: int = 1
    """Schedulers with caches of their own: replicas, or with `enable_dp_attention` parts of one replica's ranks."""
    enable_dp_attention: bool = False
    """The data-parallel ranks share MLPs and experts; only attention, cache and scheduler are each one's own."""
    enable_dp_lm_head: bool = False
    """With DP attention: the head is divided among the ranks of a data-parallel rank only."""
    load_balance_method: str = "auto"
    """Which data-parallel rank a request goes to that names none. auto: round_robin."""
    ep_size: int = 1
    """Parts into which the experts are divided; of the ranks of a part each has a share of every expert."""
    moe_a2a_backend: str = "none"
    """none: every rank has all rows. Any other: rows are sent to the ranks of their experts, by our own all-to-all."""
    moe_runner_backend: str = "auto"
    """loop: one product after the other; grouped_mm: all experts of a rank in one. auto: loop; others: grouped_mm."""
    ep_rows: str = "rank"
    """With an all-to-all a row is sent once to each rank that has some of its experts, or once for each expert."""
    deepep_mode: str = "auto"
    """The built-in all-to-all has one mode for prompts and answers; the name is reported."""
    enable_single_batch_overlap: bool = False
    """Always so: a shared expert is computed while rows are on their way."""
    enable_eplb: bool = False
    """Experts are moved between ranks from time to time, so that each has as much to do."""
    ep_num_redundant_experts: int = 0
    """Slots for second copies of experts."""
    eplb_rebalance_num_iterations: int = 1000
    """Steps between two looks at how the rows are distributed."""
    eplb_rebalance_layers_per_chunk: int | None = None
    """Layers whose experts are moved between two steps; None: all."""
    eplb_min_rebalancing_utilization_threshold: float = 1.0
    """Nothing is moved when the mean rank has this share of the busiest one's rows, or more."""
    ep_dispatch_algorithm: str = "static"
    """Which copy of an expert is used. static: the sender's own if it has one; dynamic: by the token."""
    enable_two_batch_overlap: bool = False
    """Steps are computed in two halves: while the rows of one are on their way, the other is computed."""
    tbo_token_distribution_threshold: float = 0.48
    """If the smaller half has less than this share of the tokens, a long sequence is cut in two."""
    nnodes: int = 1
    """Launchers that make one worker together, each with as many ranks."""
    node_rank: int = 0
    dist_init_addr: str | None = None
    """host:port at which node 0 waits for the others."""
    dist_timeout: float = 60.0
    """Seconds that nodes wait for each other at start."""
    disable_custom_all_reduce: bool = False
    """Add up over gloo (CPU) or NCCL (CUDA) instead of through shared memory."""
    enable_deterministic_inference: bool = False
    """The same bits for a request whatever is computed beside it, cached or in chunks."""
    enable_torch_compile: bool = False
    """Ordinary MLPs are compiled by torch at start."""
    enable_priority_scheduling: bool = False
    """Requests with a higher `priority` are admitted first; without it priorities are ignored."""
    enable_p2p_check: bool = False
    """Measure at start whether and how fast ranks reach each other's memory."""
    kv_events_config: str | None = None
    """JSON, as in SGLang and vLLM: publish the events of the prefix cache over ZeroMQ, too."""
    attention_backend: str = "auto"
    """auto: our own kernel where it runs (float32 on CPU), else torch's; every other name is torch's."""
    disable_cuda_graph: bool = False
    """Accepted: there are no CUDA graphs yet."""
    watchdog_timeout: float = 300.0
    """Seconds after which a rank that shows no life ends the worker."""
    log_level: str = "info"
    bucket_time_to_first_token: tuple[float, ...] | None = None
    """Upper ends of the histogram's buckets, in seconds; None: our own. So the next two."""
    bucket_inter_token_latency: tuple[float, ...] | None = None
    bucket_e2e_request_latency: tuple[float, ...] | None = None
    max_queued_requests: int | None = None
    """Requests that may wait beyond `max_running_requests` before new ones get 503; None: no limit."""
    drain_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    def __post_init__(self) -> None:
        """Raises ValueError with one line that names the flag."""
        _check(bool(self.model_path), "--model-path must not be empty")
        _check(bool(self.served_model_name), "--served-model-name must not be empty")
        _check(0 <= self.port <= 65535, f"--port must be between 0 and 65535, got {self.port}")
        _check(
            0 < self.schedule_conservativeness < 100,
            f"--schedule-conservativeness must be between 0 and 100, got {self.schedule_conservativeness}",
        )
        _check_kv_events(self.kv_events_config)
        _check(self.watchdog_timeout > 0, f"--watchdog-timeout must be above 0, got {self.watchdog_timeout}")
        for name, choices in _CHOICES.items():
            _check(
                getattr(self, name) in choices,
                f"{_dashed(name)} must be one of {', '.join(choices)}, got {getattr(self, name)!r}",
            )
        for flag in _AT_LEAST_ONE:
            value: int | None = getattr(self, flag)
            _check(value is None or value >= 1, f"{_dashed(flag)} must be at least 1, got {value}")
        for flag in _BUCKETS:
            _check_buckets(_dashed(flag), getattr(self, flag))
        self._check_parallel()
        _check(
            self.layout.world_size <= MAX_RANKS,
            f"{self.layout} makes {self.layout.world_size} ranks, the most is {MAX_RANKS}",
        )
        _check(
            self.max_total_tokens is None or self.max_total_tokens >= self.page_size,
            f"--max-total-tokens must hold at least one page of {self.page_size} tokens, got {self.max_total_tokens}",
        )
        _check(
            self.mem_fraction_static is None or 0 < self.mem_fraction_static < 1,
            f"--mem-fraction-static must be between 0 and 1, got {self.mem_fraction_static}",
        )
        _check(
            self.chunked_prefill_size == -1 or self.chunked_prefill_size >= 1,
            f"--chunked-prefill-size must be at least 1, or -1 for whole prompts, got {self.chunked_prefill_size}",
        )
        _check(
            (self.num_continuous_decode_steps or 1) <= MOST_CONTINUOUS_STEPS,
            f"--num-continuous-decode-steps must be at most {MOST_CONTINUOUS_STEPS}, got "
            f"{self.num_continuous_decode_steps}",
        )
        _check(
            self.max_queued_requests is None or self.max_queued_requests >= 0,
            f"--max-queued-requests must not be negative, got {self.max_queued_requests}",
        )
        _check(self.drain_timeout >= 0, f"--drain-timeout must not be negative, got {self.drain_timeout}")
        _check(0 <= self.random_seed < 1 << 63, f"--random-seed must be between 0 and 2^63 - 1, got {self.random_seed}")

    def _check_parallel(self) -> None:
        tp, dp, ep = self.tp_size, self.dp_size, self.ep_size
        _check(
            not self.enable_dp_attention or tp % dp == 0,
            f"Constraint tp_size % dp_size == 0 not satisfied: --tp-size {tp}, --dp-size {dp}; with "
            f"--enable-dp-attention --dp-size can be {_divisors(tp)}",
        )
        _check(tp % ep == 0, f"--ep-size {ep} does not divide --tp-size {tp}; it can be {_divisors(tp)}")
        _check(
            self.nnodes == 1 or dp == 1 or self.enable_dp_attention,
            "multi-node data parallel is not supported unless dp attention! (--nnodes with --dp-size wants "
            "--enable-dp-attention)",
        )
        _check(
            self.layout.world_size % self.nnodes == 0,
            f"--nnodes {self.nnodes} does not divide the {self.layout.world_size} ranks ({self.layout or 'one rank'})",
        )
        _check(0 <= self.node_rank < self.nnodes, f"--node-rank must be below --nnodes {self.nnodes}")
        _check(
            self.nnodes == 1 or self.dist_init_addr is not None,
            "--nnodes wants --dist-init-addr HOST:PORT, the same on all nodes",
        )
        if self.dist_init_addr is not None:
            self.dist_address()
        _check(
            not (self.enable_eplb or self.ep_num_redundant_experts) or self.layout.ep_size > 1,
            "--enable-eplb and --ep-num-redundant-experts are for --ep-size above 1",
        )
        _check(self.ep_num_redundant_experts >= 0, "--ep-num-redundant-experts must not be negative")
        _check(
            not self.enable_two_batch_overlap or self.moe_a2a_backend != "none",
            "--enable-two-batch-overlap wants --moe-a2a-backend other than none: without rows on their way there is "
            "nothing to overlap",
        )
        _check(
            not self.enable_deterministic_inference
            or not (self.enable_eplb or self.ep_num_redundant_experts or self.moe_runner_backend in GROUPED_RUNNERS),
            "--enable-deterministic-inference wants experts that stay where they are and are computed one by one: "
            "leave out --enable-eplb, --ep-num-redundant-experts and --moe-runner-backend",
        )
        _check(
            not (self.enable_deterministic_inference and self.enable_torch_compile),
            "--enable-deterministic-inference wants products whose rows do not depend on each other, and "
            "--enable-torch-compile has torch's; leave out one of them",
        )
        for flag in ("eplb_min_rebalancing_utilization_threshold", "tbo_token_distribution_threshold"):
            _check(0 <= getattr(self, flag) <= 1, f"{_dashed(flag)} must be between 0 and 1, got {getattr(self, flag)}")
        _check(self.dist_timeout > 0, f"--dist-timeout must be above 0, got {self.dist_timeout}")

    @property
    def layout(self) -> Layout:
        # With an all-to-all a rank has whole experts, as in SGLang.
        sends = self.moe_a2a_backend != "none"
        dp_attention = self.enable_dp_attention and self.dp_size > 1
        return Layout(self.tp_size, self.pp_size, self.dp_size, dp_attention, self.tp_size if sends else self.ep_size)

    @property
    def nodes(self) -> Nodes:
        return Nodes(self.layout, self.nnodes, self.node_rank)

    def dist_address(self) -> tuple[str, int]:
        """Host and port of `dist_init_addr`. Raises ValueError."""
        host, _, port = (self.dist_init_addr or "").rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        _check(
            bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16,
            f"--dist-init-addr must be HOST:PORT, got {self.dist_init_addr!r}",
        )
        return host, int(port)

    @property
    def sends_rows(self) -> bool:
        """Rows travel to the ranks of their experts."""
        return self.moe_a2a_backend != "none" and self.layout.ep_size > 1

    @property
    def cuts_steps(self) -> bool:
        """Steps are computed in two halves."""
        return self.enable_two_batch_overlap and self.sends_rows

    def of_rank(self) -> tuple[int, int, float]:
        """Of each data-parallel rank: requests in a batch, prompt tokens in a step, conservativeness."""
        dp = self.dp_size if self.layout.dp_attention else 1
        if dp == 1:
            return self.max_running_requests, self.chunked_prefill_size, self.schedule_conservativeness
        chunk = self.chunked_prefill_size if self.chunked_prefill_size < 0 else max(self.chunked_prefill_size // dp, 1)
        return (
            max(self.max_running_requests // dp, 1),
            chunk,
            self.schedule_conservativeness * DP_CONSERVATIVENESS,
        )

    def effective(self) -> dict[str, Any]:
        """What becomes of the flags of parallelism, by name: as `/server_info` tells it."""
        layout = self.layout
        running, chunk, conservativeness = self.of_rank()
        return {
            "enable_dp_attention": layout.dp_attention,
            "enable_dp_lm_head": layout.dp_attention and self.enable_dp_lm_head,
            "dp_size": layout.dp_size,
            "ep_size": layout.ep_size,
            "moe_a2a_backend": "built-in all-to-all" if self.sends_rows else "none",
            "enable_two_batch_overlap": self.cuts_steps,
            "enable_torch_compile": self.enable_torch_compile,
            "moe_runner_backend": "grouped_mm" if self.moe_runner_backend in GROUPED_RUNNERS else "loop",
            "load_balance_method": "round_robin" if self.load_balance_method == "auto" else self.load_balance_method,
            "max_running_requests_per_dp_rank": running,
            "chunked_prefill_size_per_dp_rank": chunk,
            "schedule_conservativeness": conservativeness,
        }

    def remarks(self) -> list[str]:
        """Lines for the operator: what a flag became, or what would be better."""
        layout, lines = self.layout, []
        if self.enable_dp_attention and not layout.dp_attention:
            lines.append("--enable-dp-attention has no effect with --dp-size 1: it is off")
        if self.enable_dp_lm_head and not layout.dp_attention:
            lines.append("--enable-dp-lm-head has no effect without DP attention")
        if layout.ep_size != self.ep_size:
            lines.append(f"--moe-a2a-backend {self.moe_a2a_backend}: --ep-size is {layout.ep_size}, as --tp-size")
        if self.moe_a2a_backend != "none":
            lines.append(f"--moe-a2a-backend {self.moe_a2a_backend}: the built-in all-to-all is used")
        if self.enable_two_batch_overlap and not self.cuts_steps:
            lines.append("--enable-two-batch-overlap has no effect with --tp-size 1: there is nobody to send rows to")
        if self.deepep_mode != "auto":
            lines.append(f"--deepep-mode {self.deepep_mode}: the built-in all-to-all has one mode for all steps")
        if self.enable_single_batch_overlap:
            done = "is always done" if self.moe_a2a_backend != "none" else "has no effect without an all-to-all"
            lines.append(f"--enable-single-batch-overlap: computing shared experts while rows are away {done}")
        if self.moe_runner_backend in GROUPED_RUNNERS[1:]:
            lines.append(f"--moe-runner-backend {self.moe_runner_backend}: grouped_mm of torch is used")
        if layout.dp_attention:
            running, chunk, conservativeness = self.of_rank()
            lines.append(
                f"DP attention: each of {layout.dp_size} ranks takes {running} requests and {chunk} prompt tokens per "
                f"step, conservativeness {conservativeness:g}"
            )
        elif layout.dp_size > 1:
            lines.append(
                f"{layout.dp_size} replicas behind this worker's own balancer, which does not look at caches: "
                "`launch_server --dp-size` starts as many workers behind a cache-aware router, which is better"
            )
        return lines

    def to_json(self) -> str:
        """How the supervisor hands the arguments to the processes it starts; `from_json` is the other end."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerArgs:
        return cls(**with_tuples(json.loads(text)))


_AT_LEAST_ONE = (
    "page_size",
    "max_total_tokens",
    "max_running_requests",
    "num_continuous_decode_steps",
    "context_length",
    "threads",
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "nnodes",
    "eplb_rebalance_num_iterations",
    "eplb_rebalance_layers_per_chunk",
)

_BUCKETS = ("bucket_time_to_first_token", "bucket_inter_token_latency", "bucket_e2e_request_latency")

_CHOICES = {
    "device": DEVICES,
    "dtype": DTYPES,
    "load_format": LOAD_FORMATS,
    "schedule_policy": SCHEDULE_POLICIES,
    "log_level": LOG_LEVELS,
    "load_balance_method": LOAD_BALANCE_METHODS,
    "moe_a2a_backend": A2A_BACKENDS,
    "moe_runner_backend": RUNNERS,
    "ep_rows": EP_ROWS,
    "ep_dispatch_algorithm": DISPATCH_ALGORITHMS,
    "deepep_mode": DEEPEP_MODES,
}

_KV_EVENTS = {"publisher", "endpoint", "replay_endpoint", "topic", "hwm", "enable_kv_cache_events"}


def _check_kv_events(config: str | None) -> None:
    if config is None:
        return
    try:
        value = json.loads(config)
    except ValueError as error:
        raise ValueError(f"--kv-events-config is not JSON: {error}") from error
    _check(isinstance(value, dict), f"--kv-events-config must be a JSON object, got {config}")
    unknown = sorted(set(value) - _KV_EVENTS)
    _check(
        not unknown, f"--kv-events-config: {', '.join(unknown)} is not known; known: {', '.join(sorted(_KV_EVENTS))}"
    )
    publisher = value.get("publisher", "null")
    _check(publisher in ("zmq", "null"), f"--kv-events-config: publisher must be zmq or null, got {publisher!r}")


def with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists, which JSON and the command line make, as the tuples that `WorkerArgs` holds."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _check_buckets(flag: str, ends: tuple[float, ...] | None) -> None:
    if ends is None:
        return
    ascending = all(one < other for one, other in itertools.pairwise(ends))
    _check(
        bool(ends) and ascending and ends[0] > 0 and ends[-1] < math.inf,
        f"{flag} must be numbers above 0 in ascending order, got {' '.join(f'{end:g}' for end in ends)}",
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
