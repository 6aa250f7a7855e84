"""The worker's command line: every flag, every default and every check of a value, once. Imports no torch.

`parse` turns an argument vector into a `WorkerArgs`; nobody checks these values again. Names and meanings are those of
`sglang.srt.server_args`; an SGLang flag that this worker does not implement is refused with the reason, never ignored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from warmroute_worker.topology import Layout

DEVICES = ("auto", "cpu", "cuda", "xpu", "npu")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
SCHEDULE_POLICIES = ("fcfs", "lpm")
ATTENTION_BACKENDS = ("auto", "torch_native", "triton", "fa3", "flashinfer", "flex_attention")
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_RANKS = 64


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
    disable_custom_all_reduce: bool = False
    """Add up over gloo (CPU) or NCCL (CUDA) instead of through shared memory."""
    enable_deterministic_inference: bool = False
    """The same bits for a request whatever is computed beside it, cached or in chunks."""
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
    max_queued_requests: int | None = None
    """Requests that may wait beyond `max_running_requests` before new ones get 503; None: no limit."""
    drain_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    def __post_init__(self) -> None:
        """Raises ValueError with one line that names the flag."""
        _check(bool(self.model_path), "--model-path must not be empty")
        _check(bool(self.served_model_name), "--served-model-name must not be empty")
        _check(0 <= self.port <= 65535, f"--port must be between 0 and 65535, got {self.port}")
        _check(self.device in DEVICES, f"--device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        _check(self.dtype in DTYPES, f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _check(
            self.load_format in LOAD_FORMATS,
            f"--load-format must be one of {', '.join(LOAD_FORMATS)}, got {self.load_format!r}",
        )
        _check(
            self.schedule_policy in SCHEDULE_POLICIES,
            f"--schedule-policy must be one of {', '.join(SCHEDULE_POLICIES)}, got {self.schedule_policy!r}",
        )
        _check(
            0 < self.schedule_conservativeness < 100,
            f"--schedule-conservativeness must be between 0 and 100, got {self.schedule_conservativeness}",
        )
        _check(
            self.log_level in LOG_LEVELS, f"--log-level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level!r}"
        )
        _check_kv_events(self.kv_events_config)
        _check(self.watchdog_timeout > 0, f"--watchdog-timeout must be above 0, got {self.watchdog_timeout}")
        _check(
            self.tp_size * self.pp_size <= MAX_RANKS,
            f"--tp-size {self.tp_size} x --pp-size {self.pp_size} is more than {MAX_RANKS} ranks",
        )
        for flag in _AT_LEAST_ONE:
            value: int | None = getattr(self, flag)
            _check(value is None or value >= 1, f"{_dashed(flag)} must be at least 1, got {value}")
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
            self.max_queued_requests is None or self.max_queued_requests >= 0,
            f"--max-queued-requests must not be negative, got {self.max_queued_requests}",
        )
        _check(self.drain_timeout >= 0, f"--drain-timeout must not be negative, got {self.drain_timeout}")
        _check(0 <= self.random_seed < 1 << 63, f"--random-seed must be between 0 and 2^63 - 1, got {self.random_seed}")

    @property
    def layout(self) -> Layout:
        return Layout(self.tp_size, self.pp_size)

    def to_json(self) -> str:
        """How the supervisor hands the arguments to the processes it starts; `from_json` is the other end."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerArgs:
        return cls(**json.loads(text))


def parse(argv: list[str], program: str = "launch_worker") -> WorkerArgs:
    """The arguments of `argv` (without the program's name). Exits with 2 and one line on stderr for a bad one."""
    parser = _parser(program)
    values = vars(parser.parse_args(argv))
    values = {name: value for name, value in values.items() if name not in _SIZES_OF_ONE}
    if values["served_model_name"] is None:
        values["served_model_name"] = values["model_path"]
    try:
        return WorkerArgs(**values)
    except ValueError as error:
        parser.error(str(error))


_AT_LEAST_ONE = (
    "page_size",
    "max_total_tokens",
    "max_running_requests",
    "context_length",
    "threads",
    "tp_size",
    "pp_size",
)

ALIASES: dict[str, tuple[str, ...]] = {
    "--tp-size": ("--tp", "--tensor-parallel-size"),
    "--pp-size": ("--pipeline-parallel-size", "--pp"),
}

_SIZES_OF_ONE: dict[str, tuple[tuple[str, ...], str]] = {
    "dp_size": (
        ("--dp-size", "--dp", "--data-parallel-size"),
        "one worker is one replica; `launch_server --dp-size N` starts N workers and a router in front of them",
    ),
    "ep_size": (("--ep-size", "--ep", "--expert-parallel-size"), "expert parallelism comes with a later release"),
    "nnodes": (("--nnodes",), "a worker runs on one host for now"),
}
"""SGLang options of which only the value 1 means what this worker does."""

_REFUSED: dict[str, str] = {
    "--api-key": "it does not check keys; listen on a private address and let the router check them",
    "--chat-template": "the template of the model folder is used; put chat_template.jinja there",
    "--cuda-graph-max-bs": "there are no CUDA graphs yet",
    "--disable-radix-cache": "the prefix cache is always on",
    "--disaggregation-mode": "prefill and decode run in the same worker",
    "--dist-init-addr": "a worker runs on one host for now",
    "--enable-dp-attention": "DP attention comes with a later release",
    "--enable-ep-moe": "expert parallelism comes with a later release",
    "--enable-eplb": "expert parallelism comes with a later release",
    "--enable-lora": "LoRA adapters are not supported",
    "--enable-metrics": "metrics are always on at GET /metrics",
    "--enable-mixed-chunk": "it comes with a later release",
    "--enable-torch-compile": "it comes with a later release",
    "--enable-two-batch-overlap": "expert parallelism comes with a later release",
    "--is-embedding": "only text generation is supported",
    "--kv-cache-dtype": "the KV pool has the model's dtype",
    "--lora-paths": "LoRA adapters are not supported",
    "--moe-a2a-backend": "expert parallelism comes with a later release",
    "--moe-runner-backend": "there is one implementation of experts, torch's own",
    "--node-rank": "a worker runs on one host for now",
    "--quantization": "what config.json says about quantisation is used",
    "--reasoning-parser": "answers are returned as the model wrote them",
    "--skip-tokenizer-init": "the worker always tokenises",
    "--speculative-algorithm": "speculative decoding is not supported",
    "--stream-interval": "every step is sent",
    "--tokenizer-path": "the tokenizer of the model folder is used",
    "--tool-call-parser": "tools are not supported",
    "--trust-remote-code": "code from model folders is never run",
}
"""SGLang options that are refused whatever their value, with the reason."""


def _parser(program: str) -> argparse.ArgumentParser:
    defaults = {field.name: field.default for field in dataclasses.fields(WorkerArgs)}
    parser = _OneLineParser(
        prog=program,
        description="Serve one model over HTTP: OpenAI's and SGLang's endpoints on a torch engine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model-path",
        "--model",
        required=True,
        help="a folder in Hugging Face layout, or `demo` for the embedded demo model",
    )
    parser.add_argument("--served-model-name", default=None, help="name at /v1/models; None: the model path")
    for flag, kind, text in (
        ("--host", str, "address to listen on"),
        ("--port", int, "port to listen on; 0: any free one"),
        ("--page-size", int, "tokens per page of the KV pool"),
        ("--max-total-tokens", int, "tokens in the KV pool; None: from the memory there is"),
        ("--mem-fraction-static", float, "share of memory for weights and KV pool together"),
        ("--max-running-requests", int, "requests in one batch at most"),
        ("--max-queued-requests", int, "requests that may wait before new ones get 503; None: no limit"),
        ("--schedule-conservativeness", float, "more than 1: keep more of the pool free, retract less"),
        ("--chunked-prefill-size", int, "prompt tokens per step at most; -1: whole prompts"),
        ("--context-length", int, "tokens per request at most; None: the model's own limit"),
        ("--random-seed", int, "seed of sampling and of dummy weights"),
        ("--threads", int, "torch threads of a rank; None: the cores there are, divided among the ranks"),
        ("--tp-size", int, "ranks among which each layer is divided"),
        ("--pp-size", int, "stages into which the layers are divided"),
        ("--kv-events-config", str, "JSON: publish the events of the prefix cache over ZeroMQ"),
        ("--watchdog-timeout", float, "seconds after which a rank that shows no life ends the worker"),
        ("--drain-timeout", float, "seconds for running requests after SIGTERM"),
    ):
        name = flag[2:].replace("-", "_")
        parser.add_argument(flag, *ALIASES.get(flag, ()), dest=name, type=kind, default=defaults[name], help=text)
    for flag, choices, text in (
        ("--device", DEVICES, "auto: CUDA when there is one"),
        ("--dtype", DTYPES, "auto: what is fast on the device"),
        ("--schedule-policy", SCHEDULE_POLICIES, "fcfs: who came first; lpm: the longest cached prefix"),
        ("--attention-backend", ATTENTION_BACKENDS, "auto: our own kernel where it runs; any other: torch's"),
        ("--load-format", LOAD_FORMATS, "dummy: seeded random weights, only config.json and tokenizer are read"),
        ("--log-level", LOG_LEVELS, "what is logged to stderr"),
    ):
        parser.add_argument(flag, choices=choices, default=defaults[flag[2:].replace("-", "_")], help=text)
    for flag, text in (
        ("--disable-custom-all-reduce", "add up over gloo (CPU) or NCCL (CUDA), not through shared memory"),
        ("--enable-priority-scheduling", "requests with a higher `priority` are admitted first"),
        ("--enable-p2p-check", "measure at start whether and how fast ranks reach each other's memory"),
        ("--disable-cuda-graph", "accepted: there are no CUDA graphs yet"),
        ("--enable-deterministic-inference", "the same bits whatever is computed beside a request (float32 on CPU)"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    for name, (flags, reason) in _SIZES_OF_ONE.items():
        parser.add_argument(
            *flags, dest=name, action=_OnlyOne, reason=reason, type=int, default=1, help=argparse.SUPPRESS
        )
    for flag, reason in _REFUSED.items():
        parser.add_argument(
            flag, dest=argparse.SUPPRESS, action=_Refuse, reason=reason, nargs="?", help=argparse.SUPPRESS
        )
    return parser


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line: argparse prints the whole usage before the line that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Refuse(argparse.Action):
    def __init__(self, *, reason: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._reason = reason

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        del namespace, values
        parser.error(f"{option} is an SGLang option this worker does not implement: {self._reason}; remove it")


class _OnlyOne(argparse.Action):
    def __init__(self, *, reason: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._reason = reason

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        del namespace
        if values != 1:
            parser.error(
                f"{option} is an SGLang option this worker does not implement: {self._reason}; remove it or set it to 1"
            )


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


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")
