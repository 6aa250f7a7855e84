"""The ranks of a worker at work: what the driver tells them, what they hand on, and where tokens are drawn.

The driver (rank 0) hands every plan to all ranks at once. Each takes its turn: the first stage embeds, each hands its
vectors to the next, the last draws the tokens and returns them to the driver. With one stage the driver draws them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import torch

from warmroute_worker import step_plan_wire
from warmroute_worker.executor import model_runner, sampler
from warmroute_worker.executor.executor import ExecutorFacts, StepOutOfMemoryError
from warmroute_worker.executor.trace import Trace
from warmroute_worker.messages import TokenLogprobs
from warmroute_worker.startup_error import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from warmroute_worker.args import WorkerArgs
    from warmroute_worker.comm.rank_links import RankLinks
    from warmroute_worker.executor.executor import Drawn
    from warmroute_worker.model_config import ModelConfig
    from warmroute_worker.step_plan import StepPlan

NO_PLAN = b""
"""What ends the ranks' work."""

BURST_SECONDS = 0.01
"""Steps that follow each other bring their tokens together: within this, unless somebody has said how many steps."""

ORDER = b"order:"
"""What is no plan begins so. A plan begins with a number that is negative or far below these letters as one."""


_MODES = ("idle", "decode", "prefill")

_NO_TRACE = contextlib.nullcontext()


class Rank:
    """One rank: its runner, and its links to the others."""

    def __init__(self, folder: Path, config: ModelConfig, args: WorkerArgs, links: RankLinks) -> None:
        """Raises StartupError, on every rank when it is raised on one."""
        began = time.perf_counter()
        self.place, self._links = links.place, links
        self._steps = 0
        self._burst_seconds = BURST_SECONDS if args.num_continuous_decode_steps is None else math.inf
        self.messages: int | None = None
        """Of the driver: where something can be read when somebody new waits, or wants no more."""
        self.trace: Trace | None = None
        """While one is being made."""
        parallel = model_runner.expert_parallel(args, links)
        sizes = model_runner.measure(folder, config, args, links, parallel)
        # The least of all, so that a page number means the same everywhere.
        said = [
            text.split(maxsplit=1) for text in links.exchange(f"{sizes.num_pages} {sizes.dtype} on {sizes.device.type}")
        ]
        pages = [int(number) for number, _ in said]
        # `auto` may mean something else on another host.
        if len({kind for _, kind in said}) > 1:
            found = ", ".join(f"rank {rank}: {kind.removeprefix('torch.')}" for rank, (_, kind) in enumerate(said))
            raise StartupError(f"all ranks need the same --device and --dtype; found {found}")
        sizes = dataclasses.replace(sizes, num_pages=min(pages))
        self.runner = model_runner.ModelRunner(folder, config, args, links, parallel, sizes)
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
            load_seconds=time.perf_counter() - began,
            attention_backend=self.runner.attention_backend,
            collectives=links.groups.stage.name,
            depth=links.place.layout.pp_size,
            goes_on=self.runner.goes_on,
        )

    def run(self, plan: StepPlan) -> Drawn | None:
        """This rank's part of a step. What was drawn, where it is drawn."""
        begin = time.perf_counter_ns()
        links = self._links
        waited = links.comm_ns
        mode, steps = plan.record.mode, 1
        if plan.more:
            tokens = self.runner.decode_on(plan, self._burst_seconds, self.messages)
            steps = len(tokens) // len(plan)
            drawn: Drawn | None = (tokens, {})
        else:
            drawn = self._run(plan)
        self._steps += steps
        self.runner.stepped()
        # Collectives in the background may take longer than what they overlap with.
        busy = time.perf_counter_ns() - begin - (links.comm_ns - waited)
        links.stepped(max(busy, 0), _MODES[mode], steps)
        links.say(**self.runner.counts())
        return drawn if self.place.samples else None

    def _run(self, plan: StepPlan) -> Drawn | None:
        """A single step."""
        links = self._links
        with self._traced(plan) if self.trace else _NO_TRACE:
            result = self.runner.forward(plan, None if self.place.is_first_stage else links.take)
        if not self.place.is_last_stage:
            assert result is not None
            links.hand_on(result)
        # Of an idle plan nobody expects tokens.
        return self._draw(plan, result) if self.place.samples and plan.record.mode else None

    def _traced(self, plan: StepPlan) -> contextlib.AbstractContextManager[object]:
        mode = _MODES[plan.record.mode]
        return torch.profiler.record_function(f"step {self._steps}: {mode} of {len(plan.token_ids)} tokens")

    def obey(self, order: bytes) -> str:
        """What is no step: begin or end a trace, count experts. A line for the user. Raises OSError, ValueError."""
        verb, _, value = order.removeprefix(ORDER).decode().partition(":")
        name = f"rank{self.place.rank}-{os.getpid()}"
        if self.trace is not None and verb == "start trace":
            # Elsewhere it could not begin or was not written; there it is no more.
            self.trace.drop()
        if verb == "start trace":
            self.trace = Trace(Path(value), self.facts.device, self.runner.stage.experts.background)
            return f"tracing every rank into {value}"
        if verb == "stop trace":
            if self.trace is None:
                raise ValueError("it had not begun here")
            trace, self.trace = self.trace, None
            return f"written: {trace.write(name)}"
        counts = self.runner.expert_counts(verb)
        if verb == "dump experts":
            folder = Path(value)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"experts-{name}.json").write_text(json.dumps(counts))
            return f"written: {folder}/experts-rank*.json"
        return f"{verb}: done"

    def _draw(self, plan: StepPlan, logits: torch.Tensor | None) -> Drawn:
        if logits is None:
            return [], {}
        count = plan.record.logit_rows - len(plan.told)
        sampled = logits[:count] if len(plan.told) else logits
        tokens = sampler.sample(sampled, plan.sampling, lambda: plan.positions)
        reported = sampler.logprobs(sampled, plan.sampling, tokens)
        if len(plan.told):
            reported |= enumerate(sampler.prompt_logprobs(logits[count:], plan.told), count)
        return tokens.tolist(), reported


class RankExecutor:
    """The driver's executor: see `Executor`."""

    def __init__(self, rank: Rank, links: RankLinks) -> None:
        self.rank, self.links = rank, links
        self.facts = rank.facts
        self._drawn: deque[Drawn | None] = deque()
        """Of the plans under way; None: the last stage will say."""
        self._active_since = time.perf_counter_ns()

    def submit(self, plan: StepPlan) -> None:
        if plan.is_idle:
            self._drawn.append(([], {}))
            return
        if not self._drawn:
            self._active_since = time.perf_counter_ns()
        if self.rank.trace is not None:
            plan = dataclasses.replace(plan, more=0)  # which shows every step
        if self.rank.place.layout.world_size > 1:
            self.links.send_plan(step_plan_wire.encode(plan))
        try:
            drawn = self.rank.run(plan)
            self._drawn.append(drawn if len(plan) else ([], {}))
        except (MemoryError, RuntimeError) as error:
            # Alone it can be tried again with less; with others waiting for this rank's sums, it cannot.
            if self.rank.place.layout.world_size == 1 and is_out_of_memory(error):
                raise StepOutOfMemoryError(str(error).splitlines()[0] if str(error) else "MemoryError") from error
            raise

    def heed(self, descriptor: int) -> None:
        self.rank.messages = descriptor

    def exchange_records(self, record: bytes) -> list[bytes]:
        return self.links.exchange_records(record)

    def profile(self, folder: str | None) -> tuple[bool, str]:
        if (folder is None) == (self.rank.trace is None):
            return False, "there is no trace to end" if folder is None else "a trace is being made already"
        return self.order("stop trace" if folder is None else f"start trace:{folder}")

    def order(self, text: str) -> tuple[bool, str]:
        order = ORDER + text.encode()
        self.links.send_plan(order)
        try:
            return True, self.rank.obey(order)
        except (OSError, ValueError) as error:
            return False, f"{text.partition(':')[0]}: {error}"
        finally:
            self.links.order_obeyed()

    def collect(self) -> Drawn:
        drawn = self._drawn[0]
        drawn = _decoded(self.links.take_tokens()) if drawn is None else drawn
        self._drawn.popleft()
        if not self._drawn:
            self.links.was_active(time.perf_counter_ns() - self._active_since)
        return drawn

    def close(self) -> None:
        self.links.send_plan(NO_PLAN)


def follow(rank: Rank, links: RankLinks) -> None:
    """What every rank but the driver does until nothing more is to be done. Raises CollectiveError when one is gone."""
    while data := links.take_plan():
        if data.startswith(ORDER):
            with contextlib.suppress(OSError, ValueError):  # the driver has the same trouble and says so
                rank.obey(data)
            links.order_obeyed()
            continue
        drawn = rank.run(step_plan_wire.decode(data, draws=rank.place.samples))
        if drawn is not None:
            links.send_tokens(_encoded(drawn))


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it in a RuntimeError on CPU."""
    words = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def failure(error: BaseException) -> str:
    """One line about an error that nobody expected, with what helps if something does."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if not is_out_of_memory(error):
        return line
    return f"{line}; start with a lower --mem-fraction-static, --chunked-prefill-size or --max-running-requests"


def start(folder: Path, config: ModelConfig, args: WorkerArgs, links: RankLinks) -> Rank:
    """The rank with its weights. Raises StartupError, on every rank the words of the first that failed."""
    try:
        return Rank(folder, config, args, links)
    except StartupError as error:
        links.abort(str(error))
        raise


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """While a process serves: what it has loaded stays. With torch that is 330,000 objects, through which Python's
    collector walks now and then, while every request waits for 150 ms."""
    gc.freeze()
    try:
        yield
    finally:
        # Some libraries complain at the end about what nobody has collected.
        gc.unfreeze()


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
