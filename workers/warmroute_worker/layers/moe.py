"""The MLP as a choice of experts, and where its rows are: at every rank (`none`), or sent to those who want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from warmroute_worker.comm.tensor_group import Alone
from warmroute_worker.layers.expert_exchange import ExpertExchange
from warmroute_worker.layers.expert_map import ExpertMap
from warmroute_worker.layers.experts import Experts
from warmroute_worker.layers.linear import Linear
from warmroute_worker.layers.mlp import gated_mlp
from warmroute_worker.layers.router import Router

if TYPE_CHECKING:
    from warmroute_worker.comm.background import Background, Pending
    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.layers.compiled_mlp import CompiledMlp
    from warmroute_worker.layers.expert_exchange import Statistics
    from warmroute_worker.layers.expert_map import ExpertLayout
    from warmroute_worker.layers.mlp import GatedMlp
    from warmroute_worker.model_config import MoeConfig
    from warmroute_worker.weights.source import WeightSource


T = TypeVar("T")


@dataclass(frozen=True)
class ExpertParallel:
    """What a rank needs to take part in experts."""

    layout: ExpertLayout
    group: TensorGroup
    """Those to whom rows are sent."""
    background: Background
    statistics: Statistics


@dataclass
class Sent:
    """Rows that are on their way to experts."""

    x: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    """Which of `x` were sent, by receiver."""
    arriving: Pending[tuple[list[list[int]], torch.Tensor]]


@dataclass
class Returning:
    """Rows that are on their way back."""

    sent: Sent
    results: Pending[torch.Tensor]


class MixtureOfExperts:
    """Each token goes through the experts that the router likes best, and through the shared one.

    Without sending, what comes out is this rank's part of a sum over the stage; with it, it is complete, of the rows
    that were given, which no other rank must have.
    """

    def __init__(
        self,
        source: WeightSource,
        name: str,
        hidden: int,
        config: MoeConfig,
        stage: TensorGroup,
        parallel: ExpertParallel,
        number: int,
    ) -> None:
        """`number`: of the layer in the model."""
        layout = parallel.layout
        self.number = number
        self.sends = layout.sent
        self._background, self.statistics = parallel.background, parallel.statistics
        self._per_row = layout.row_per_expert
        self.in_halves = False
        """Another half of the step is computed while rows are on their way."""
        self._router = Router(source, f"{name}.gate", hidden, config)
        self.map = ExpertMap(config.num_experts, layout, source.device)
        self.counters: list[torch.Tensor] = []
        """Each [experts]: for how many rows each was chosen, of the rows that this rank routed."""
        self.computed_rows = 0
        """By this rank's experts, since the start."""
        self.experts = Experts(source, f"{name}.experts", hidden, config, self.map)
        self._exchange = ExpertExchange(parallel.group, self.map)
        # With rows that are sent, each rank has its own ones for the shared expert, too, and so all of it.
        among = Alone() if self.sends else stage
        self._shared: GatedMlp | CompiledMlp | None = None
        self._shared_gate: Linear | None = None
        if config.shared_intermediate_size:
            size = config.shared_intermediate_size
            self._shared = gated_mlp(source, f"{name}.{config.shared_module}", hidden, size, False, among)
            if config.shared_gated:
                self._shared_gate = Linear(source, [f"{name}.{config.shared_module}_gate"], hidden, [1], bias=False)

    @property
    def shared_mlp(self) -> GatedMlp | CompiledMlp | None:
        """The shared expert without what weighs it."""
        return self._shared

    def new_counter(self) -> torch.Tensor:
        """For `counters`."""
        return torch.zeros(self.map.num_experts, dtype=torch.int64, device=self.map.owners.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> the same; see the class."""
        if self.sends:
            sent = self.send(x)
            # While the rows are on their way.
            shared = self.shared(x)
            output = self.received(self.compute(sent))
            return output if shared is None else output.add_(shared)
        weights, slots = self._route(x)
        output = self._weighted_sums(x, slots, weights)
        shared = self.shared(x)
        return output if shared is None else output.add_(shared)

    def shared(self, x: torch.Tensor) -> torch.Tensor | None:
        """[tokens, hidden] -> what the shared expert makes of it, if there is one."""
        if self._shared is None:
            return None
        shared = self._shared(x)
        return shared if self._shared_gate is None else shared.mul_(torch.sigmoid(self._shared_gate(x)))

    # What a row that is sent goes through, so that something else can be done in between.

    def send(self, x: torch.Tensor) -> Sent:
        """[tokens, hidden]: on their way to their experts."""
        weights, slots = self._route(x)
        if self._per_row:
            data, pairs, to = self._exchange.packed(
                x.repeat_interleave(slots.shape[1], dim=0), slots.view(-1, 1), torch.ones_like(weights).view(-1, 1)
            )
            rows = pairs
        else:
            data, rows, to = self._exchange.packed(x, slots, weights)
        self.statistics.sent_rows += len(rows)
        return Sent(x, weights, rows, self._background.submit(lambda: self._exchange.send(data, to), "dispatch"))

    def compute(self, sent: Sent) -> Returning:
        """Let this rank's experts do their part, and send back what came of it."""
        counts, data = self._waited(sent.arriving)
        per_row = 1 if self._per_row else sent.weights.shape[1]
        x, slots, weights = self._exchange.unpacked(data, sent.x, per_row)
        results = self._weighted_sums(x, slots, weights)
        exchange = self._exchange
        return Returning(sent, self._background.submit(lambda: exchange.send_back(results, counts), "combine"))

    def received(self, returning: Returning) -> torch.Tensor:
        """[tokens, hidden]: the sums over all experts of each."""
        sent, results = returning.sent, self._waited(returning.results)
        if not self._per_row:
            return torch.zeros_like(sent.x).index_add_(0, sent.rows, results)
        by_expert = torch.empty((sent.weights.numel(), sent.x.shape[1]), dtype=results.dtype, device=results.device)
        by_expert[sent.rows] = results
        weighted = by_expert.view(*sent.weights.shape, by_expert.shape[1]) * sent.weights.to(results.dtype).unsqueeze(2)
        return weighted.sum(dim=1)

    def _waited(self, pending: Pending[T]) -> T:
        result = pending.result()
        if self.in_halves:
            self.statistics.overlap_ns += pending.overlap_ns
        return result

    def _weighted_sums(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output, rows = self.experts.weighted_sums(x, slots, weights.to(x.dtype))
        self.computed_rows += rows
        self.statistics.expert_rows += rows
        return output

    def _route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, k] weights in float32, and slots."""
        weights, chosen = self._router(x)
        for counter in self.counters:
            counter += torch.bincount(chosen.flatten(), minlength=len(counter))
        return weights, self.map.slots_for(chosen)
