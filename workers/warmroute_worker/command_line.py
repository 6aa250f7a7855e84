"""The worker's flags. Imports no torch.

`parse` turns an argument vector into a `WorkerArgs`, which checks the values. An SGLang flag that this worker does not
implement is refused with the reason, never ignored.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, NoReturn

from warmroute_worker import dry_run
from warmroute_worker.args import (
    A2A_BACKENDS,
    ATTENTION_BACKENDS,
    DEEPEP_MODES,
    DEVICES,
    DISPATCH_ALGORITHMS,
    DTYPES,
    EP_ROWS,
    LOAD_BALANCE_METHODS,
    LOAD_FORMATS,
    LOG_LEVELS,
    RUNNERS,
    SCHEDULE_POLICIES,
    WorkerArgs,
    with_tuples,
)


def parse(argv: list[str], program: str = "launch_worker") -> WorkerArgs:
    """The arguments of `argv` (without the program's name). Exits with 2 and one line on stderr for a bad one, with 0
    after `--dry-run`."""
    parser = _parser(program)
    values = with_tuples(vars(parser.parse_args(argv)))
    dry = values.pop("dry_run")
    if values["served_model_name"] is None:
        values["served_model_name"] = values["model_path"]
    try:
        args = WorkerArgs(**values)
    except ValueError as error:
        parser.error(str(error))
    if dry:
        print("\n".join(dry_run.describe(args)))
        parser.exit(0)
    return args


ALIASES: dict[str, tuple[str, ...]] = {
    "--tp-size": ("--tp", "--tensor-parallel-size"),
    "--pp-size": ("--pipeline-parallel-size", "--pp"),
    "--dp-size": ("--dp", "--data-parallel-size"),
    "--ep-size": ("--ep", "--expert-parallel-size"),
    "--dist-init-addr": ("--nccl-init-addr",),
}

_REFUSED: dict[str, str] = {
    "--api-key": "it does not check keys; listen on a private address and let the router check them",
    "--chat-template": "the template of the model folder is used; put chat_template.jinja there",
    "--cuda-graph-max-bs": "there are no CUDA graphs yet",
    "--disable-radix-cache": "the prefix cache is always on",
    "--disaggregation-mode": "prefill and decode run in the same worker",
    "--enable-ep-moe": "it is `--ep-size` now",
    "--enable-lora": "LoRA adapters are not supported",
    "--enable-metrics": "metrics are always on at GET /metrics",
    "--enable-mixed-chunk": "it comes with a later release",
    "--is-embedding": "only text generation is supported",
    "--kv-cache-dtype": "the KV pool has the model's dtype",
    "--lora-paths": "LoRA adapters are not supported",
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
        help="a folder in Hugging Face layout, or an embedded model: `demo`, or `demo-moe`, which has experts",
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
        ("--num-continuous-decode-steps", int, "greedy decode steps in one go; None: up to 8, within 10 ms"),
        ("--context-length", int, "tokens per request at most; None: the model's own limit"),
        ("--random-seed", int, "seed of sampling and of dummy weights"),
        ("--threads", int, "torch threads of a rank; None: the cores there are, divided among the ranks"),
        ("--tp-size", int, "ranks among which each layer is divided"),
        ("--pp-size", int, "stages into which the layers are divided"),
        ("--dp-size", int, "replicas, or with --enable-dp-attention parts of one replica's ranks"),
        ("--ep-size", int, "parts into which the experts are divided; must divide --tp-size"),
        ("--ep-num-redundant-experts", int, "slots for second copies of experts"),
        ("--eplb-rebalance-num-iterations", int, "steps between two looks at how experts' rows are distributed"),
        ("--eplb-rebalance-layers-per-chunk", int, "layers whose experts move between two steps; None: all"),
        ("--eplb-min-rebalancing-utilization-threshold", float, "move nothing if ranks are that evenly busy"),
        ("--tbo-token-distribution-threshold", float, "share of the smaller half below which a sequence is cut"),
        ("--nnodes", int, "launchers that make one worker together"),
        ("--node-rank", int, "which of them this one is; 0 serves HTTP"),
        ("--dist-init-addr", str, "HOST:PORT at which node 0 waits for the others"),
        ("--dist-timeout", float, "seconds that nodes wait for each other at start"),
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
        ("--load-balance-method", LOAD_BALANCE_METHODS, "who gets a request that names no data-parallel rank"),
        ("--moe-a2a-backend", A2A_BACKENDS, "none: all ranks have all rows; any other: our own all-to-all"),
        ("--deepep-mode", DEEPEP_MODES, "accepted: the built-in all-to-all has one mode"),
        ("--moe-runner-backend", RUNNERS, "loop: expert by expert; grouped_mm, and others: in one product"),
        ("--ep-rows", EP_ROWS, "send a row once to each rank of its experts, or once for each expert"),
        ("--ep-dispatch-algorithm", DISPATCH_ALGORITHMS, "which copy of an expert: the sender's own, or by token"),
        ("--log-level", LOG_LEVELS, "what is logged to stderr"),
    ):
        parser.add_argument(flag, choices=choices, default=defaults[flag[2:].replace("-", "_")], help=text)
    for flag, text in (
        ("--disable-custom-all-reduce", "add up over gloo (CPU) or NCCL (CUDA), not through shared memory"),
        ("--enable-priority-scheduling", "requests with a higher `priority` are admitted first"),
        ("--enable-p2p-check", "measure at start whether and how fast ranks reach each other's memory"),
        ("--enable-dp-attention", "data-parallel ranks share MLPs and experts, and have caches of their own"),
        ("--enable-dp-lm-head", "with DP attention: the head is divided within a data-parallel rank only"),
        ("--enable-single-batch-overlap", "accepted: shared experts are always computed while rows are away"),
        ("--enable-eplb", "move experts between ranks so that each has as much to do"),
        ("--enable-two-batch-overlap", "compute one half of a step while the other's rows are on their way"),
        ("--disable-cuda-graph", "accepted: there are no CUDA graphs yet"),
        ("--enable-torch-compile", "let torch compile ordinary MLPs at start; on a CPU usually slower"),
        ("--enable-deterministic-inference", "the same bits whatever is computed beside a request (float32 on CPU)"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    for flag, text in (
        ("--bucket-time-to-first-token", "the time to the first token"),
        ("--bucket-inter-token-latency", "the time between two tokens"),
        ("--bucket-e2e-request-latency", "the time to the last token"),
    ):
        text = f"upper ends of the buckets in which {text} is counted, in seconds; None: our own"
        parser.add_argument(flag, type=float, nargs="+", metavar="SECONDS", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
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
