"""The engine of one worker: a scheduler and its executor."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING

from warmroute_worker import model_config, model_folder, two_batches
from warmroute_worker.comm import rank_links
from warmroute_worker.executor import ranks
from warmroute_worker.executor.executor import StepOutOfMemoryError
from warmroute_worker.kv.cache import KvCache
from warmroute_worker.kv.events import CacheEvents
from warmroute_worker.lock_step import LockStep
from warmroute_worker.messages import Ready
from warmroute_worker.scheduler.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.comm.rank_links import RankLinks
    from warmroute_worker.executor.executor import Executor
    from warmroute_worker.messages import Generate, StepOutput
    from warmroute_worker.model_config import ModelConfig


log = logging.getLogger("warmroute_worker.engine")

CONTINUOUS_STEPS = 8
"""Decode steps that may follow each other in a plan, if nobody has said how many. Between two plans is Python, 0.1 to
0.3 ms of it."""

MOST_FAILURES = 8
"""Steps that run out of memory one after the other before those in them are refused."""


class Engine:
    """Requests go to `scheduler`, answers come out of `step`."""

    def __init__(
        self,
        executor: Executor,
        config: ModelConfig,
        args: WorkerArgs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: in seconds, for the times that requests are told."""
        self._clock = clock
        facts = executor.facts
        self.executor = executor
        self.cache_events = CacheEvents(args.page_size, "CPU" if facts.device == "cpu" else "GPU")
        self.cache = KvCache(facts.num_pages, self.cache_events)
        running, chunk, conservativeness = args.of_rank()
        limits = Limits(
            context_length=facts.context_length,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            page_size=args.page_size,
            max_running_requests=running,
            chunked_prefill_size=chunk,
            schedule_policy=args.schedule_policy,
            schedule_conservativeness=conservativeness,
            priorities=args.enable_priority_scheduling,
            random_seed=args.random_seed,
            depth=facts.depth,
        )
        self._depth, self._under_way = facts.depth, 0
        wanted = args.num_continuous_decode_steps
        self._steps = (wanted or CONTINUOUS_STEPS) if facts.goes_on else 1
        if wanted is not None and wanted > self._steps:
            log.warning(
                "--num-continuous-decode-steps %d: steps go one by one, because with this model and these arguments a "
                "step is not one native call (docs/worker.md says when it is)",
                wanted,
            )
        self.lock_step = LockStep(executor) if args.layout.dp_attention else None
        self._cut_from = args.tbo_token_distribution_threshold if args.cuts_steps else None
        self._failures = 0
        """Steps in a row that ran out of memory."""
        self.is_paused = False
        self.scheduler = Scheduler(limits, self.cache)
        self.ready = Ready(
            context_length=facts.context_length,
            vocab_size=config.vocab_size,
            max_total_tokens=facts.num_pages * args.page_size,
            page_size=args.page_size,
            max_running_requests=running,
            eos_token_ids=list(config.eos_token_ids),
            model_type=config.model_type,
            architectures=list(config.architectures),
            dtype=facts.dtype,
            device=facts.device,
            weight_bytes=facts.weight_bytes,
            kv_pool_bytes=facts.kv_pool_bytes,
            load_seconds=facts.load_seconds,
            attention_backend=facts.attention_backend,
            layout=str(args.layout),
            collectives=facts.collectives,
        )

    @property
    def is_idle(self) -> bool:
        """Nothing to compute and nothing to say."""
        return self.scheduler.is_idle

    def add(self, request: Generate) -> None:
        """See `Scheduler.add`."""
        self.scheduler.add(request, self._clock())

    def step(self) -> StepOutput:
        """Compute one step for everything that can run, and say what it brought.

        With several stages, as many plans are under way as there are stages, and the oldest is waited for.
        """
        while self._under_way < self._depth:
            plan = self.scheduler.schedule(hold=self.is_paused, now=self._clock(), steps=self._steps)
            if self._cut_from is not None:
                plan = dataclasses.replace(plan, first_half=two_batches.first_half(plan, self._cut_from))
            if self.lock_step is not None:
                plan = self.lock_step.joined(plan, self._under_way)
            idle = plan.is_idle
            if idle and self._under_way:
                self.scheduler.withdraw()
                break
            try:
                self.executor.submit(plan)
            except StepOutOfMemoryError as error:
                return self._step_failed(error)
            self._under_way += 1
            self._failures = 0
            if idle:
                # Another round would find the same, and keep those awake who go in step.
                break
        drawn = self.executor.collect()
        self._under_way -= 1
        output = self.scheduler.apply(*drawn, now=self._clock())
        if self.is_idle:
            self.cache.check_balance()
        return output

    def heed(self, descriptor: int) -> None:
        """Steps that follow each other do so only until there is something to read there."""
        self.executor.heed(descriptor)

    @property
    def must_step(self) -> bool:
        """There is something to compute or to say, here or, with ranks that go in step, elsewhere."""
        if self.lock_step is not None and self.lock_step.is_awake:
            return True
        return not self.scheduler.is_idle and not self.is_paused

    @property
    def is_settled(self) -> bool:
        """Nothing of this engine's requests is being computed."""
        return not self.scheduler.has_work_under_way

    def profile(self, folder: str | None) -> tuple[bool, str]:
        """Begin a trace on every rank, or end it; whether that could be done, and a line for the user."""
        return self.executor.profile(folder)

    def count_experts(self, order: str) -> tuple[bool, str]:
        """`start experts`, `stop experts` or `dump experts:FOLDER`; as `profile`."""
        return self.executor.order(order)

    def _step_failed(self, error: StepOutOfMemoryError) -> StepOutput:
        """Those it computed wait again, and prefill chunks are halved; when that does not help, they are refused."""
        self._failures += 1
        self.scheduler.fail(f"the step ran out of memory: {error}" if self._failures >= MOST_FAILURES else None)
        size = self.scheduler.halve_chunks()
        log.warning(
            "a step ran out of memory (%s); prefill chunks have %d tokens now; start with a lower "
            "--mem-fraction-static, --chunked-prefill-size or --max-running-requests",
            error,
            size,
        )
        return self.scheduler.report()

    def close(self) -> None:
        """Nothing will follow."""
        self.executor.close()


def load(args: WorkerArgs, links: RankLinks | None = None) -> Engine:
    """The driver's engine, as `args` ask for it; `links` to the other ranks, if there are any.

    Raises LookupError or StartupError with one line for the user.
    """
    links = links or rank_links.alone(args.layout)
    folder, config = read_model(args)
    rank = ranks.start(folder, config, args, links)
    return Engine(ranks.RankExecutor(rank, links), config, args)


def read_model(args: WorkerArgs) -> tuple[Path, ModelConfig]:
    """The model's folder and configuration. Raises LookupError or StartupError."""
    folder = model_folder.resolve(args.model_path)
    config = model_config.read(folder)
    model_config.check_tokenizer(folder, config.vocab_size)
    model_config.check_layout(config, args.layout)
    model_config.check_compiled(config, args.enable_torch_compile)
    return folder, config
