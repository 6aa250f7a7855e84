"""Commands that guides to SGLang and its router tell people to type, and what each must become here.

`python -m sglang.launch_server` is an engine, so `launch_worker`; `python -m sglang_router.launch_server` starts
engines and a router, so `launch_server`; `python -m sglang_router.launch_router` is `launch_router`. The same guides
show commands of other engines, which are not ours, and whose flags are not taken:
`vllm serve M --tensor-parallel-size 8`, the same with `--pipeline-parallel-size 2`,
`vllm serve M --tensor-parallel-size 1 --data-parallel-size 8 --enable-expert-parallel`, and `trtllm-serve` with a YAML
file (`moe_tensor_parallel_size` x `moe_expert_parallel_size` = `tensor_parallel_size`).
"""

import shlex
from dataclasses import dataclass

MODULES = {
    "sglang.launch_server": "warmroute_worker.launch_worker",
    "sglang_router.launch_server": "warmroute.launch_server",
    "sglang_router.launch_router": "warmroute.launch_router",
}

LLAMA = "meta-llama/Meta-Llama-3.1-70B-Instruct"
V3 = "deepseek-ai/DeepSeek-V3"
ENGINE = "python -m sglang.launch_server --model-path"
ENGINES_AND_ROUTER = "python -m sglang_router.launch_server --model-path"
ROUTER = "python -m sglang_router.launch_router"

_NODES = "--nnodes 2 --dist-init-addr 10.0.0.1:29500"
_DPA_ON_NODES = f"--tp 16 --dp-size 8 --ep 16 --enable-dp-attention {_NODES} --moe-a2a-backend deepep"
A2A = "--moe-a2a-backend deepep: the built-in all-to-all is used"
GROUPED = "--moe-runner-backend deep_gemm: grouped_mm of torch is used"


@dataclass(frozen=True)
class Command:
    """`layout`, `last` and `remarks` are of each worker."""

    line: str
    layout: str
    """As the worker writes it."""
    last: str
    """The last rank's coordinates: pp, tp, dp, attention tp, ep, expert tp."""
    schedulers: int = 1
    workers: int = 1
    remarks: tuple[str, ...] = ()
    quick: bool = False
    """Served with a tiny model in `make test` already."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that stand before the command."""
        words = shlex.split(self.line)
        return dict(word.split("=", 1) for word in words[: words.index("python")])

    @property
    def module(self) -> str:
        return MODULES[self._words[2]]

    @property
    def arguments(self) -> list[str]:
        return self._words[3:]

    @property
    def model(self) -> str:
        return self.arguments[self.arguments.index("--model-path") + 1]

    @property
    def nodes(self) -> int:
        return int(self.arguments[self.arguments.index("--nnodes") + 1]) if "--nnodes" in self.arguments else 1

    @property
    def ranks(self) -> int:
        """Of each worker: one more than its last rank, counted replica by replica and stage by stage."""
        sizes = dict(part.rsplit(" ", 1) for part in self.layout.split(", ") if part)
        return int(sizes.get("tp", 1)) * int(sizes.get("pp", 1)) * int(sizes.get("dp", 1))

    @property
    def _words(self) -> list[str]:
        words = shlex.split(self.line)
        return words[words.index("python") :]


COMMANDS = [
    # Tensor parallelism.
    Command(f"{ENGINE} {LLAMA} --tp 4", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} meta-llama/Llama-3.1-70B --tp-size 8", "tp 8", "0 7 0 7 0 7"),
    Command(f"{ENGINE} meta-llama/Llama-3.1-70B --tensor-parallel-size 8", "tp 8", "0 7 0 7 0 7"),
    Command(f"{ENGINE} {LLAMA} --tp 8 {_NODES} --node-rank 0", "tp 8", "0 7 0 7 0 7"),
    Command(f"{ENGINE} {LLAMA} --tp 8 {_NODES} --node-rank 1", "tp 8", "0 7 0 7 0 7"),
    Command(f"{ENGINE} {LLAMA} --tp 8 {_NODES} --node-rank 0 --disable-cuda-graph", "tp 8", "0 7 0 7 0 7"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --enable-p2p-check", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --disable-custom-all-reduce", "tp 4", "0 3 0 3 0 3"),
    Command(f"SGLANG_USE_1STAGE_ALLREDUCE=0 {ENGINE} {LLAMA} --tp 8", "tp 8", "0 7 0 7 0 7"),
    Command(
        f"SGLANG_USE_1STAGE_ALLREDUCE=1 {ENGINE} {LLAMA} --tp 8 --enable-deterministic-inference",
        "tp 8",
        "0 7 0 7 0 7",
    ),
    Command(f"HCCL_BUFFSIZE=256 {ENGINE} {LLAMA} --tp 8", "tp 8", "0 7 0 7 0 7"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --device xpu", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --mem-fraction-static 0.85", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --mem-fraction-static 0.7", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --attention-backend fa3", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --attention-backend flashinfer", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --chunked-prefill-size 4096", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {LLAMA} --tp 4 --port 8000", "tp 4", "0 3 0 3 0 3"),
    Command(f"{ENGINE} {V3} --tp 8 --port 8000", "tp 8", "0 7 0 7 0 7"),
    Command(f"{ENGINE} {V3} --tp 8 --port 8001", "tp 8", "0 7 0 7 0 7"),
    # Pipeline stages.
    Command(f"{ENGINE} {LLAMA} --tp 4 --pp-size 2 --chunked-prefill-size 4096", "tp 4, pp 2", "1 3 0 3 0 3"),
    Command(
        f"{ENGINE} deepseek-ai/DeepSeek-V3.1 --tp 8 --pp-size 4 --chunked-prefill-size 4096",
        "tp 8, pp 4",
        "3 7 0 7 0 7",
    ),
    # Replicas: in one worker, or as workers behind the router.
    Command(f"{ENGINE} meta-llama/Llama-3.1-8B --tp 1 --dp-size 8", "dp 8", "0 0 7 0 0 0", schedulers=8),
    Command(
        f"{ENGINE} meta-llama/Llama-3.1-8B --tp 2 --data-parallel-size 4", "tp 2, dp 4", "0 1 3 1 0 1", schedulers=4
    ),
    Command(f"{ENGINES_AND_ROUTER} meta-llama/Llama-3.1-8B --dp 4 --tp 2", "tp 2", "0 1 0 1 0 1", workers=4),
    Command(f"{ENGINES_AND_ROUTER} meta-llama/Llama-3.1-8B --tp 1 --dp 8", "", "0 0 0 0 0 0", workers=8),
    Command(f"{ENGINES_AND_ROUTER} {LLAMA} --tp 4 --dp-size 2", "tp 4", "0 3 0 3 0 3", workers=2),
    Command(
        f"{ENGINES_AND_ROUTER} {LLAMA} --tp 4 --dp-size 2 --host 0.0.0.0 --port 30000",
        "tp 4",
        "0 3 0 3 0 3",
        workers=2,
    ),
    Command(
        f"{ENGINES_AND_ROUTER} {LLAMA} --tp 4 --dp-size 4 --router-policy cache_aware "
        "--router-health-check-interval-secs 30 --router-prometheus-port 10001 --host 0.0.0.0 --port 30000",
        "tp 4",
        "0 3 0 3 0 3",
        workers=4,
    ),
    # Experts.
    Command(
        f"{ENGINE} Qwen/Qwen3-235B-A22B-FP8 --tp-size 8 --ep-size 2",
        "tp 8, ep 2",
        "0 7 0 7 1 3",
    ),
    Command(f"{ENGINE} {V3} --tp 8 --expert-parallel-size 4", "tp 8, ep 4", "0 7 0 7 3 1"),
    Command(f"{ENGINE} {V3} --tp 8 --ep 8 --moe-a2a-backend deepep", "tp 8, ep 8", "0 7 0 7 7 0", remarks=(A2A,)),
    # DP attention.
    Command(
        f"{ENGINE} deepseek-ai/DeepSeek-R1 --tp 8 --dp 8 --enable-dp-attention --ep-size 8 --enable-torch-compile",
        "tp 8, dp attention 8, ep 8",
        "0 7 7 0 7 0",
        schedulers=8,
    ),
    Command(
        f"{ENGINE} {V3} --tp-size 8 --dp-size 8 --enable-dp-attention",
        "tp 8, dp attention 8",
        "0 7 7 0 0 7",
        schedulers=8,
        remarks=("each of 8 ranks takes 32 requests and 256 prompt tokens per step",),
    ),
    Command(
        f"{ENGINE} {V3} --tp 8 --dp-size 4 --enable-dp-attention", "tp 8, dp attention 4", "0 7 3 1 0 7", schedulers=4
    ),
    Command(
        f"{ENGINE} {V3} --tp 8 --enable-dp-attention",
        "tp 8",
        "0 7 0 7 0 7",
        remarks=("--enable-dp-attention has no effect with --dp-size 1: it is off",),
    ),
    Command(
        f"{ENGINE} {V3} --tp 8 --dp-size 8 --ep 8 --enable-dp-attention --moe-a2a-backend deepep "
        "--moe-runner-backend deep_gemm",
        "tp 8, dp attention 8, ep 8",
        "0 7 7 0 7 0",
        schedulers=8,
        remarks=(A2A, GROUPED),
        quick=True,
    ),
    Command(
        f"{ENGINE} {V3} --tp-size 8 --ep-size 8 --enable-dp-attention --dp-size 8 --enable-eplb",
        "tp 8, dp attention 8, ep 8",
        "0 7 7 0 7 0",
        schedulers=8,
    ),
    Command(
        f"{ENGINE} deepseek-ai/DeepSeek-R1 --tp 8 --dp 8 --enable-dp-attention --ep-size 8 --mem-fraction-static 0.9",
        "tp 8, dp attention 8, ep 8",
        "0 7 7 0 7 0",
        schedulers=8,
    ),
    Command(
        f"{ENGINE} {V3} {_DPA_ON_NODES} --node-rank 0 --mem-fraction-static 0.8",
        "tp 16, dp attention 8, ep 16",
        "0 15 7 1 15 0",
        schedulers=8,
        remarks=(A2A,),
    ),
    Command(
        f"{ENGINE} {V3} {_DPA_ON_NODES} --node-rank 1 --mem-fraction-static 0.8",
        "tp 16, dp attention 8, ep 16",
        "0 15 7 1 15 0",
        schedulers=8,
        remarks=(A2A,),
    ),
    Command(
        f"{ENGINES_AND_ROUTER} {V3} --tp 8 --dp-size 8 --ep 8 --enable-dp-attention --moe-a2a-backend deepep "
        "--router-policy cache_aware --router-health-check-interval-secs 30 --router-prometheus-port 10001 "
        "--enable-two-batch-overlap --enable-eplb",
        "tp 8, dp attention 8, ep 8",
        "0 7 7 0 7 0",
        schedulers=8,
        remarks=(A2A,),
    ),
]
"""Everything that starts ranks, each line once."""

ROUTERS = [
    f"{ROUTER} --worker-urls http://node1:8000 http://node2:8000 --policy cache_aware --host 0.0.0.0 --port 30000",
    f"{ROUTER} --policy cache_aware --host 0.0.0.0 --port 30000",
    f"{ROUTER} --worker-urls http://worker1:8000 http://worker2:8000 --policy cache_aware --cache-threshold 0.5 "
    "--balance-abs-threshold 32 --balance-rel-threshold 1.5 --eviction-interval-secs 120 --max-tree-size 67108864",
    f"{ROUTER} --worker-urls http://localhost:8000 http://localhost:8001 --policy cache_aware",
    f"{ROUTER} --worker-urls http://worker1:8000 http://worker2:8000 --policy cache_aware --cache-threshold 0.3 "
    "--balance-abs-threshold 64 --eviction-interval-secs 60",
]

REFUSED = [
    *(
        (
            f"{program} {V3} --tp 8 --dp-size {size} --enable-dp-attention",
            f"Constraint tp_size % dp_size == 0 not satisfied: --tp-size 8, --dp-size {size}; with "
            "--enable-dp-attention --dp-size can be 1, 2, 4, 8",
        )
        for program in (ENGINE, ENGINES_AND_ROUTER)
        for size in (3, 5, 6)
    ),
    (f"{ENGINE} {V3} --tp 8 --ep-size 3", "--ep-size 3 does not divide --tp-size 8; it can be 1, 2, 4, 8"),
    (
        f"{ENGINE} {LLAMA} --tp 2 --dp-size 2 {_NODES} --node-rank 0",
        "multi-node data parallel is not supported unless dp attention!",
    ),
    (f"{ENGINES_AND_ROUTER} {LLAMA} --tp 8 {_NODES} --node-rank 0", "start launch_worker on each node"),
]
"""What the guides warn of, or mention, and what is said here; all of it before anything is started."""
