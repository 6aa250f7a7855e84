"""The executor that computes in the scheduler's own process: one rank, CPU or CUDA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from warmroute_worker.executor import memory, sampler
from warmroute_worker.executor.executor import ExecutorFacts
from warmroute_worker.kv.pool import KvPool, page_bytes
from warmroute_worker.layers.attention import PagedAttention
from warmroute_worker.model_config import ModelError
from warmroute_worker.models import registry
from warmroute_worker.weights.dummy import DummyWeights
from warmroute_worker.weights.safetensors_reader import SafetensorsReader
from warmroute_worker.weights.source import MeasuredWeights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.messages import TokenLogprobs
    from warmroute_worker.model_config import ModelConfig
    from warmroute_worker.models.decoder import Decoder
    from warmroute_worker.step_plan import StepPlan


SINGLE_THREAD_BYTES = 64 << 20
"""Weights that do not fit a core's share of cache are read faster by several threads, whatever the batch."""

SINGLE_THREAD_PRODUCTS = 1 << 28
"""Multiplications of a step below which waking threads for some ten operations per layer costs more than they save.
Demo model on 2 busy cores: decode of 8 sequences 2.8 ms with one thread and 6.3 with two, prefill of 1,024 tokens 319
and 267 ms."""


class InProcessExecutor:
    """Owns the weights, the pool and torch's settings."""

    def __init__(self, folder: Path, config: ModelConfig, args: WorkerArgs) -> None:
        """Raises StartupError, before anything large is allocated where that is possible."""
        device, context_length = _device(args.device), _context_length(config, args)
        dtype = _dtype(args.dtype, config, device)
        available = memory.available_bytes(device)
        weight_bytes = _weight_bytes(config, dtype)
        size_of_page = page_bytes(config.num_layers, args.page_size, config.kv_shape, dtype)
        num_pages = memory.pool_pages(
            available=available,
            weight_bytes=weight_bytes,
            page_bytes=size_of_page,
            page_size=args.page_size,
            context_length=context_length,
            device_type=device.type,
            mem_fraction_static=args.mem_fraction_static,
            max_total_tokens=args.max_total_tokens,
        )
        with torch.inference_mode():
            self.model = _load(folder, config, args, dtype, device, context_length)
            self.pool = KvPool(config.num_layers, num_pages, args.page_size, config.kv_shape, dtype, device)
        self.attention = PagedAttention(self.pool, args.max_running_requests, context_length)
        self._device = device
        self._threads = args.threads or usable_cores()
        self._single_thread_tokens = _single_thread_tokens(weight_bytes, weight_bytes // dtype.itemsize)
        self.facts = ExecutorFacts(
            context_length=context_length,
            num_pages=num_pages,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            weight_bytes=weight_bytes,
            kv_pool_bytes=num_pages * size_of_page,
        )

    def execute(self, plan: StepPlan) -> tuple[Sequence[int], Mapping[int, TokenLogprobs]]:
        """See `Executor`."""
        if len(plan) == 0:
            return [], {}
        logits = self.logits(plan)
        if not len(logits):
            return [], {}
        tokens = sampler.sample(logits, plan.sampling)
        return tokens.tolist(), sampler.logprobs(logits, plan.sampling, tokens)

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> torch.Tensor:
        """[sampled, vocab] float32: the computing half of `execute`."""
        wanted_threads = self._threads if len(plan.token_ids) > self._single_thread_tokens else 1
        if wanted_threads != torch.get_num_threads():
            torch.set_num_threads(wanted_threads)
        batch = self.attention.begin(plan)
        token_ids = torch.from_numpy(plan.token_ids).to(self._device)
        wanted = torch.from_numpy(np.cumsum(plan.lengths, dtype=np.int64)[plan.sampled] - 1).to(self._device)
        return self.model.forward(token_ids, wanted, self.attention, batch)


def _single_thread_tokens(weight_bytes: int, num_weights: int) -> int:
    """The largest step, in tokens, that one thread does at least as fast as several; 0 if there is none."""
    return 0 if weight_bytes > SINGLE_THREAD_BYTES else SINGLE_THREAD_PRODUCTS // num_weights


def usable_cores() -> int:
    """Cores this process may use, by affinity and by the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def _load(
    folder: Path, config: ModelConfig, args: WorkerArgs, dtype: torch.dtype, device: torch.device, context_length: int
) -> Decoder:
    if args.load_format == "dummy":
        source = DummyWeights(args.random_seed, config.initializer_range, dtype, device)
        return registry.build(config, source, context_length)
    return registry.build(config, SafetensorsReader(folder, dtype, device, config.weight_block), context_length)


def _weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    source = MeasuredWeights(dtype)
    registry.build(config, source, context_length=1)
    return source.num_bytes


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: float32 on CPU, where 16-bit kernels are often slower; on CUDA what the checkpoint has of 16 bits."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16" if config.dtype == "float16" else "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _context_length(config: ModelConfig, args: WorkerArgs) -> int:
    limit = config.max_position_embeddings
    if args.context_length is not None and args.context_length > limit:
        raise ModelError(f"--context-length {args.context_length} is more than the model's {limit}")
    return args.context_length or limit
