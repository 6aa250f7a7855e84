"""The ranks of a worker at work: what the driver tells them, what they hand on, and where tokens are drawn.

The driver (rank 0) hands every plan to all ranks at once. Each takes its turn: the first stage embeds, each hands its
vectors to the next, the last draws the tokens and returns them to the driver. With one stage the driver draws them.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import msgpack

from warmroute_worker.executor import model_runner, sampler
from warmroute_worker.executor.executor import ExecutorFacts
from warmroute_worker.messages import TokenLogprobs
from warmroute_worker.startup_error import StartupError
from warmroute_worker.step_plan import StepPlan

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.comm.rank_links import RankLinks
    from warmroute_worker.executor.executor import Drawn
    from warmroute_worker.model_config import ModelConfig

NO_PLAN = b""
"""What ends the ranks' work."""


class Rank:
    """One rank: its runner, and its links to the others."""

    def __init__(self, folder: Path, config: ModelConfig, args: WorkerArgs, links: RankLinks) -> None:
        """Raises StartupError, on every rank when it is raised on one."""
        self.place, self._links = links.place, links
        sizes = model_runner.measure(config, args, links.place, links.group)
        # The least of all, so that a page number means the same everywhere.
        pages = [int(text) for text in links.exchange(str(sizes.num_pages))]
        sizes = model_runner.Sizes(**(vars(sizes) | {"num_pages": min(pages)}))
        self.runner = model_runner.ModelRunner(folder, config, args, links.place, links.group, sizes)
        pool_bytes = sizes.num_pages * sizes.page_bytes
        links.say(weight_bytes=sizes.weight_bytes, pool_bytes=pool_bytes)
        totals = [tuple(map(int, text.split())) for text in links.exchange(f"{sizes.weight_bytes} {pool_bytes}")]
        self.facts = ExecutorFacts(
            context_length=sizes.context_length,
            num_pages=sizes.num_pages,
            dtype=str(sizes.dtype).removeprefix("torch."),
            device=sizes.device.type,
            weight_bytes=sum(weights for weights, _ in totals),
            kv_pool_bytes=sum(pool for _, pool in totals),
            collectives=links.group.name,
            depth=links.place.layout.pp_size,
        )

    def run(self, plan: StepPlan) -> Drawn | None:
        """This rank's part of a step. What was drawn, where it is drawn."""
        begin = time.perf_counter_ns()
        links = self._links
        waited = links.comm_ns
        result = self.runner.forward(plan, None if self.place.is_first_stage else links.take)
        if not self.place.is_last_stage:
            assert result is not None
            links.hand_on(result)
        drawn = self._draw(plan, result) if self.place.samples else None
        links.stepped(time.perf_counter_ns() - begin - (links.comm_ns - waited))
        return drawn

    def _draw(self, plan: StepPlan, logits: torch.Tensor | None) -> Drawn:
        if logits is None:
            return [], {}
        tokens = sampler.sample(logits, plan.sampling)
        return tokens.tolist(), sampler.logprobs(logits, plan.sampling, tokens)


class RankExecutor:
    """The driver's executor: see `Executor`."""

    def __init__(self, rank: Rank, links: RankLinks) -> None:
        self.rank, self.links = rank, links
        self.facts = rank.facts
        self._drawn: deque[Drawn | None] = deque()
        """Of the plans under way; None: the last stage will say."""

    def submit(self, plan: StepPlan) -> None:
        if not len(plan):
            self._drawn.append(([], {}))
            return
        self.links.send_plan(plan.encode())
        self._drawn.append(self.rank.run(plan))

    def collect(self) -> Drawn:
        drawn = self._drawn.popleft()
        return _decoded(self.links.take_tokens()) if drawn is None else drawn

    def close(self) -> None:
        self.links.send_plan(NO_PLAN)


def follow(rank: Rank, links: RankLinks) -> None:
    """What every rank but the driver does until nothing more is to be done. Raises CollectiveError when one is gone."""
    while data := links.take_plan():
        drawn = rank.run(StepPlan.decode(data))
        if drawn is not None:
            links.send_tokens(_encoded(drawn))


def start(folder: Path, config: ModelConfig, args: WorkerArgs, links: RankLinks) -> Rank:
    """The rank with its weights. Raises StartupError, on every rank the words of the first that failed."""
    try:
        return Rank(folder, config, args, links)
    except StartupError as error:
        links.abort(str(error))
        raise


def _encoded(drawn: Drawn) -> bytes:
    tokens, logprobs = drawn
    packed: bytes = msgpack.packb([list(tokens), {place: list(value) for place, value in logprobs.items()}])
    return packed


def _decoded(data: bytes) -> Drawn:
    tokens, logprobs = msgpack.unpackb(data, strict_map_key=False)
    return tokens, {
        place: TokenLogprobs(own, [(token, logprob) for token, logprob in top])
        for place, (own, top) in logprobs.items()
    }
