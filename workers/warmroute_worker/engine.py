"""The engine of one worker: a scheduler and its executor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmroute_worker import model_config, model_folder
from warmroute_worker.comm import rank_links
from warmroute_worker.executor import ranks
from warmroute_worker.kv.cache import KvCache
from warmroute_worker.kv.events import CacheEvents
from warmroute_worker.messages import Ready
from warmroute_worker.scheduler.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.comm.rank_links import RankLinks
    from warmroute_worker.executor.executor import Executor
    from warmroute_worker.messages import StepOutput
    from warmroute_worker.model_config import ModelConfig


class Engine:
    """Requests go to `scheduler`, answers come out of `step`."""

    def __init__(self, executor: Executor, config: ModelConfig, args: WorkerArgs) -> None:
        facts = executor.facts
        self.executor = executor
        self.cache_events = CacheEvents(args.page_size, "CPU" if facts.device == "cpu" else "GPU")
        self.cache = KvCache(facts.num_pages, self.cache_events)
        limits = Limits(
            context_length=facts.context_length,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            page_size=args.page_size,
            max_running_requests=args.max_running_requests,
            chunked_prefill_size=args.chunked_prefill_size,
            schedule_policy=args.schedule_policy,
            schedule_conservativeness=args.schedule_conservativeness,
            random_seed=args.random_seed,
            depth=facts.depth,
        )
        self._depth, self._under_way = facts.depth, 0
        self.scheduler = Scheduler(limits, self.cache)
        self.ready = Ready(
            context_length=facts.context_length,
            vocab_size=config.vocab_size,
            max_total_tokens=facts.num_pages * args.page_size,
            page_size=args.page_size,
            max_running_requests=args.max_running_requests,
            eos_token_ids=list(config.eos_token_ids),
            model_type=config.model_type,
            architectures=list(config.architectures),
            dtype=facts.dtype,
            device=facts.device,
            weight_bytes=facts.weight_bytes,
            kv_pool_bytes=facts.kv_pool_bytes,
            layout=str(args.layout),
            collectives=facts.collectives,
        )

    @property
    def is_idle(self) -> bool:
        """Nothing to compute and nothing to say."""
        return self.scheduler.is_idle

    def step(self) -> StepOutput:
        """Compute one step for everything that can run, and say what it brought.

        With several stages, as many plans are under way as there are stages, and the oldest is waited for.
        """
        while self._under_way < self._depth:
            plan = self.scheduler.schedule()
            if not len(plan) and self._under_way:
                self.scheduler.withdraw()
                break
            self.executor.submit(plan)
            self._under_way += 1
        drawn = self.executor.collect()
        self._under_way -= 1
        output = self.scheduler.apply(*drawn)
        if self.is_idle:
            self.cache.check_balance()
        return output

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
    return folder, config
