"""One rank's part of the computation: its weights, its pool, and a step plan turned into logits or vectors."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from warmroute_worker import model_folder, topology
from warmroute_worker.args import GROUPED_RUNNERS
from warmroute_worker.comm.background import Background
from warmroute_worker.comm.step_rows import StepRows
from warmroute_worker.executor import memory
from warmroute_worker.executor.expert_balancing import ExpertBalancer
from warmroute_worker.kv.pool import KvPool, page_bytes
from warmroute_worker.layers import compiled_mlp, native
from warmroute_worker.layers.attention import PagedAttention, rounded_up
from warmroute_worker.layers.expert_exchange import Statistics
from warmroute_worker.layers.expert_map import ExpertLayout
from warmroute_worker.layers.moe import ExpertParallel, MixtureOfExperts
from warmroute_worker.model_config import ModelError
from warmroute_worker.models import registry
from warmroute_worker.models.decoder import Stage
from warmroute_worker.models.whole_decoder import is_whole
from warmroute_worker.weights.dummy import DummyWeights
from warmroute_worker.weights.safetensors_reader import SafetensorsReader
from warmroute_worker.weights.source import DEFAULT_PACKING, MeasuredWeights, Packing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.comm.rank_links import RankLinks
    from warmroute_worker.layers.attention import AttentionBatch
    from warmroute_worker.model_config import ModelConfig
    from warmroute_worker.step_plan import StepPlan
    from warmroute_worker.weights.source import WeightSource


log = logging.getLogger("warmroute_worker.model_runner")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PRODUCTS_PER_LAYER = 4
"""Queries, keys and values; output; gate and up; down."""

CACHED_BYTES = 16 << 20
"""Weights of so many bytes stay in the cache from step to step, so that a product takes as long as its call."""

SINGLE_THREAD_BYTES, SINGLE_THREAD_MULTIPLICATIONS = 16 << 20, 1 << 24
"""Of one matrix product, on average: below both, waking a thread that sleeps costs more than it saves. Two cores, time
of a step with two threads over that with one: demo model, 32 sequences 1.6, prefill of 128 tokens 1.05, of 1,024 0.57;
hidden 512 x 8 layers, 1, 8 and 32 sequences 1.5, 1.08 and 0.9, prefill of 128 tokens 0.68; hidden 1024 x 8, 1 and 8
sequences 1.04 and 0.86."""

ROWS_TOGETHER = 16
"""In deterministic mode every product has a multiple of so many rows. MKL takes other paths for 1 to 3, vector
instructions others for what is left over at the end; with 16 no row's bits depended on the number of rows, over 714
cases."""


@dataclass(frozen=True)
class Sizes:
    """What fits on a rank, found before anything large is allocated."""

    context_length: int
    num_pages: int
    page_bytes: int
    weight_bytes: int
    num_weights: int
    dtype: torch.dtype
    device: torch.device


class ModelRunner:
    """Owns the weights, the pool and torch's settings of a rank."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        args: WorkerArgs,
        links: RankLinks,
        parallel: ExpertParallel,
        sizes: Sizes,
    ) -> None:
        """`sizes.num_pages` is the same on all ranks. Raises StartupError."""
        place = links.place
        self.place, self._groups = place, links.groups
        self.stage = stage_of(config, args, links, parallel)
        self._device, self._dtype = sizes.device, sizes.dtype
        kv_shape = config.kv_shape(place.attention_tp_rank, place.layout.attention_tp_size)
        layers = len(self.stage.layers)
        with torch.inference_mode():
            weights = _weights(
                folder,
                config,
                args,
                sizes.dtype,
                sizes.device,
                plain_for_one_row=sizes.weight_bytes <= CACHED_BYTES,
            )
            self.model = registry.build(config, weights, sizes.context_length, self.stage)
            memory.give_back()
            self.pool = KvPool(layers, sizes.num_pages, args.page_size, kv_shape, sizes.dtype, sizes.device)
        self._has_experts = config.moe is not None
        self._recorders: list[torch.Tensor] | None = None
        """Of each layer with experts, if somebody counts."""
        self._moe = [layer.mlp for layer in self.model.layers if isinstance(layer.mlp, MixtureOfExperts)]
        balances = args.enable_eplb and bool(self._moe)
        self._balancer = ExpertBalancer(self._moe, links.groups.stage, args) if balances else None
        for layer in self._moe:
            layer.in_halves = args.cuts_steps
        self._token_bytes = sizes.page_bytes // args.page_size
        self._stored_tokens = 0
        rounded = ROWS_TOGETHER if args.enable_deterministic_inference else 1
        self._rounded = rounded
        own_kernel = native.usable(sizes.dtype, sizes.device) and (
            args.attention_backend == "auto" or args.enable_deterministic_inference
        )
        self.attention_backend = "native" if own_kernel else "torch_native"
        if args.attention_backend not in ("auto", self.attention_backend) and place.rank == 0:
            log.warning("--attention-backend %s: %s is used", args.attention_backend, self.attention_backend)
        self.attention = PagedAttention(
            self.pool, args.of_rank()[0], sizes.context_length, rounded, own_kernel=own_kernel
        )
        self._whole = self.model.whole(self.attention) if own_kernel else None
        if rounded > 1 and self._whole is not None:
            # Other stages may have to expect rounded numbers of rows, and of a head of torch's they change the bits.
            alone = place.layout.pp_size == 1 and self._whole.makes_logits
            self._whole = self._whole if alone else None
        """For most steps."""
        self._hidden = config.hidden_size
        self._threads = args.threads or max(1, usable_cores() // links.ranks_on_host)
        self._single_thread_tokens = single_thread_tokens(
            sizes.weight_bytes, sizes.num_weights, PRODUCTS_PER_LAYER * layers
        )

        if args.enable_torch_compile:
            self._compile()

    def forward(self, plan: StepPlan, before: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor | None:
        """One step. `before` fills in what the stage before has made of the tokens, where this is not the first.

        Returns [tokens, hidden] where this is not the last stage; else [wanted, vocab] float32 at the group's first
        rank and None at the others: rows of the sampled sequences, then of what is told.
        """
        if self._whole is not None and is_whole(plan):
            # Without torch's mode, which costs 40 us when weights have driven torch's code out of the caches.
            result = self._whole(plan, before, self._wanted_threads(len(plan)), samples=self.place.samples)
            self._stored_tokens += len(plan)
            if not plan.sampling.is_greedy:
                self._use_threads(len(plan))  # that draw
            if self._whole.makes_logits or not self.stage.ends:
                return result
            assert result is not None
            return self._logits(plan, result)
        return self._forward(plan, before)

    @property
    def goes_on(self) -> bool:
        """Whether steps can follow each other here: on all ranks or on none."""
        return self._whole is not None and self._whole.is_all

    def decode_on(self, plan: StepPlan, seconds: float, messages: int | None) -> list[int]:
        """A plan with `more` steps, of which those are done that fit in so many seconds, until there is something to
        read at `messages`: the tokens of all."""
        assert self._whole is not None
        threads = self._wanted_threads(len(plan))
        tokens = self._whole.decode_on(plan, seconds, messages, threads, samples=self.place.samples)
        self._stored_tokens += len(tokens)
        return tokens

    @torch.inference_mode()
    def _logits(self, plan: StepPlan, x: torch.Tensor) -> torch.Tensor | None:
        """Where one call makes only what they are made of."""
        self._use_threads(len(plan))
        return self.model.logits(x, self._rows([len(plan)]), samples=self.place.samples)

    @torch.inference_mode()
    def _forward(self, plan: StepPlan, before: Callable[[torch.Tensor], None] | None) -> torch.Tensor | None:
        records, halves = plan.records, plan.halves
        # With DP attention a rank without tokens has its share of everybody's MLPs.
        self._use_threads(sum(record.tokens for record in records))
        parts = [plan] if halves is None else plan.cut()
        batches = [self.attention.begin(part) for part in parts]
        token_ids = np.concatenate([rounded_up(part.token_ids, self._rounded) for part in parts])
        if before is None:
            x = self.model.embed(torch.from_numpy(token_ids).to(self._device))
        else:
            x = torch.empty((len(token_ids), self._hidden), dtype=self._dtype, device=self._device)
            before(x)
        if halves is None:
            x = self.model.forward(x, self.attention, batches[0], self._rows([record.tokens for record in records]))
        else:
            counts = ([first for first, _ in halves], [second for _, second in halves])
            both = [(batch, self._rows(of_half)) for batch, of_half in zip(batches, counts, strict=True)]
            x = self.model.forward_halves(x, self.attention, both)
        self._stored_tokens += len(plan.token_ids)
        if not self.stage.ends:
            return x
        logit_rows = [record.logit_rows for record in records]
        if not any(logit_rows):
            return None
        if plan.logit_rows is not None or halves is not None:
            x = x[self._logit_rows(plan, batches)]
        logits = self.model.logits(x, self._rows(logit_rows), samples=self.place.samples)
        return None if logits is None else logits[: plan.record.logit_rows]

    def _wanted_threads(self, tokens: int) -> int:
        return self._threads if tokens > self._single_thread_tokens else 1

    def _use_threads(self, tokens: int) -> None:
        """In torch's operations."""
        wanted = self._wanted_threads(tokens)
        if wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)

    def _logit_rows(self, plan: StepPlan, batches: Sequence[AttentionBatch]) -> torch.Tensor:
        """Where in the step's vectors those are that become logits."""
        rows = np.arange(len(plan.token_ids)) if plan.logit_rows is None else plan.logit_rows
        if len(batches) > 1:
            # The first half is filled up, too.
            rows = rows + (rows >= plan.first_half) * (len(batches[0].positions) - plan.first_half)
        return torch.from_numpy(rounded_up(rows, self._rounded)).to(self._device)

    def _compile(self) -> None:
        """Before the first request, which would wait for it. Raises StartupError."""
        seconds = compiled_mlp.warm_up(self.model.compiled_mlps(), sorted({1, self._threads}))
        if self.place.rank == 0 and self._device.type == "cpu":
            log.warning(
                "--enable-torch-compile: compiling took %.1f s; on a CPU steps are usually slower than without it",
                seconds,
            )

    def stepped(self) -> None:
        """After every step; moves experts if it is time."""
        if self._balancer is not None:
            self._balancer.stepped()

    def expert_counts(self, order: str) -> list[dict[str, object]]:
        """`start experts`, `stop experts`, or what was counted since, by layer; of those of this stage.

        Raises ValueError if nothing is counted.
        """
        if not self._has_experts:
            raise ValueError("the model has no experts")
        if order == "start experts":
            self._recorders = [layer.new_counter() for layer in self._moe]
        if self._recorders is None:
            raise ValueError("nothing is counted: POST /start_expert_distribution_record comes first")
        found: list[dict[str, object]] = [
            {"layer": layer.number, "rows_by_expert": rows.tolist(), "expert_of_slot": layer.map.expert_of}
            for layer, rows in zip(self._moe, self._recorders, strict=True)
        ]
        if order != "dump experts":
            for layer, rows in zip(self._moe, self._recorders, strict=True):
                layer.counters = [counter for counter in layer.counters if counter is not rows]
        if order == "start experts":
            for layer, rows in zip(self._moe, self._recorders, strict=True):
                layer.counters.append(rows)
        elif order == "stop experts":
            self._recorders = None
        return found

    def counts(self) -> dict[str, int]:
        """What this rank did since the start, for `/debug/ranks`."""
        stored = {"stored_bytes": self._stored_tokens * self._token_bytes}
        if not self._has_experts:
            return stored
        statistics = self.stage.experts.statistics
        return {
            **stored,
            "sent_rows": statistics.sent_rows,
            "expert_rows": statistics.expert_rows,
            "overlap_ns": statistics.overlap_ns,
            **({} if self._balancer is None else self._balancer.counts()),
        }

    def _rows(self, counts: list[int]) -> StepRows:
        rounded = [-(-count // self._rounded) * self._rounded for count in counts]
        return StepRows(self._groups.stage, self._groups.attention, rounded)


def expert_parallel(args: WorkerArgs, links: RankLinks) -> ExpertParallel:
    """This rank's part of the experts."""
    place = links.place
    layout = ExpertLayout(
        ep_rank=place.ep_rank,
        ep_size=place.layout.ep_size,
        tp_rank=place.expert_tp_rank,
        tp_size=place.layout.expert_tp_size,
        sent=args.sends_rows,
        row_per_expert=args.ep_rows == "expert",
        redundant=args.ep_num_redundant_experts,
        movable=args.enable_eplb,
        by_token=args.ep_dispatch_algorithm == "dynamic",
        grouped=args.moe_runner_backend in GROUPED_RUNNERS,
    )
    return ExpertParallel(layout, links.groups.experts, Background(), Statistics())


def stage_of(config: ModelConfig, args: WorkerArgs, links: RankLinks, parallel: ExpertParallel) -> Stage:
    place = links.place
    layers = topology.share(config.num_layers, place.pp_rank, place.layout.pp_size)
    split_head = place.layout.dp_attention and not args.enable_dp_lm_head
    return Stage(
        layers, place.is_first_stage, place.is_last_stage, links.groups, parallel, place.layout.dp_attention, split_head
    )


def measure(folder: Path, config: ModelConfig, args: WorkerArgs, links: RankLinks, parallel: ExpertParallel) -> Sizes:
    """What this rank can hold. Raises StartupError."""
    place, layout = links.place, links.place.layout
    device, context_length = _device(args.device, links.local_rank), _context_length(config, args)
    dtype = _dtype(args.dtype, config, device)
    if args.enable_deterministic_inference and not native.usable(dtype, device):
        raise ModelError("--enable-deterministic-inference is for float32 on CPU: add --device cpu --dtype float32")
    stage = stage_of(config, args, links, parallel)
    source = MeasuredWeights(_weights(folder, config, args, dtype, device))
    registry.build(config, source, 1, stage)
    kv_shape = config.kv_shape(place.attention_tp_rank, layout.attention_tp_size)
    size_of_page = page_bytes(len(stage.layers), args.page_size, kv_shape, dtype)
    num_pages = memory.pool_pages(
        available=memory.available_bytes(device) // memory.sharers(device, links.ranks_on_host),
        weight_bytes=source.num_bytes,
        page_bytes=size_of_page,
        page_size=args.page_size,
        context_length=context_length,
        device_type=device.type,
        mem_fraction_static=args.mem_fraction_static,
        max_total_tokens=args.max_total_tokens,
    )
    return Sizes(context_length, num_pages, size_of_page, source.num_bytes, source.num_weights, dtype, device)


def single_thread_tokens(weight_bytes: int, num_weights: int, num_products: int) -> int:
    """The largest step, in tokens, that one thread does at least as fast as several; 0 if there is none."""
    if weight_bytes > SINGLE_THREAD_BYTES * num_products:
        return 0
    return SINGLE_THREAD_MULTIPLICATIONS * num_products // num_weights


def usable_cores() -> int:
    """Cores this process may use, by affinity and by the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, -(-int(quota) // int(period))))


def _weights(
    folder: Path,
    config: ModelConfig,
    args: WorkerArgs,
    dtype: torch.dtype,
    device: torch.device,
    *,
    plain_for_one_row: bool = False,
) -> WeightSource:
    """Where the weights come from; nothing is read yet. Raises ModelError."""
    packing = Packing(
        smallest=0 if args.enable_deterministic_inference else DEFAULT_PACKING.smallest,
        plain_for_one_row=plain_for_one_row and not args.enable_deterministic_inference,
        compiled_mlps=args.enable_torch_compile,
        keeps_bfloat16=native.usable(dtype, device) and native.Matrix.usable,
    )
    if args.load_format == "dummy" or args.model_path in model_folder.WITHOUT_WEIGHTS:
        checkpoint = DTYPES.get(config.dtype, torch.float32)
        return DummyWeights(args.random_seed, config.initializer_range, dtype, device, packing, checkpoint)
    return SafetensorsReader(folder, dtype, device, config.weight_block, packing)


def _device(name: str, rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no CUDA device; use --device cpu")
    if name in ("xpu", "npu"):
        found = getattr(torch, name, None)
        if found is None or not found.is_available():
            raise ModelError(f"--device {name}: torch.{name} is not available in this build; use cpu or cuda")
        raise ModelError(f"--device {name}: this worker runs on cpu and cuda")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # More ranks than devices share them.
    return torch.device("cuda", rank % torch.cuda.device_count())


def _dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: float32 on CPU, where 16-bit kernels are often slower; on CUDA what the checkpoint has of 16 bits."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "float16" if config.dtype == "float16" else "bfloat16"
    return DTYPES[name]


def _context_length(config: ModelConfig, args: WorkerArgs) -> int:
    limit = config.max_position_embeddings
    if args.context_length is not None and args.context_length > limit:
        raise ModelError(f"--context-length {args.context_length} is more than the model's {limit}")
    return args.context_length or limit
