"""Weights on the move between ranks, which are threads here."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from warmroute_worker.args import WorkerArgs
from warmroute_worker.executor.expert_balancing import ExpertBalancer
from warmroute_worker.layers.expert_map import ExpertLayout, ExpertMap

if TYPE_CHECKING:
    from collections.abc import Sequence

HIDDEN, INNER = 3, 2


class _Stage:
    """The ranks of a stage; one and the same for all of them, who says which one asks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._shown: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)

    def rank(self, rank: int) -> Any:
        def exchange_rows(x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
            assert len(x) == sum(counts[rank])
            self._shown[rank] = x
            self._barrier.wait(10)
            firsts = [sum(of_source[:rank]) for of_source in counts]
            parts = [self._shown[n][first:][: counts[n][rank]] for n, first in enumerate(firsts)]
            self._barrier.wait(10)
            return torch.cat(parts)

        return SimpleNamespace(size=self.size, exchange_rows=exchange_rows)


def _weights(experts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.tensor(experts, dtype=torch.float32)[:, None, None]
    ups = numbers * 100 + torch.arange(2 * INNER * HIDDEN).view(2 * INNER, HIDDEN)
    downs = -numbers * 100 - torch.arange(INNER * HIDDEN).view(HIDDEN, INNER)
    return ups, downs


@pytest.mark.parametrize(("ranks", "redundant"), [(1, 3), (2, 2), (3, 3), (3, 0)])
def test_every_slot_has_its_experts_weights(ranks: int, redundant: int) -> None:
    """Wherever the expert was before: on another rank, in another slot of this one, or here already."""
    experts, draw, stage = 6, random.Random(ranks + redundant), _Stage(ranks)
    plans = []
    for _ in range(10):
        placed = [*range(experts), *draw.choices(range(experts), k=redundant)]
        draw.shuffle(placed)
        plans.append(placed)
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        layout = ExpertLayout(ep_rank=rank, ep_size=ranks, redundant=redundant, movable=True)
        placed_now = ExpertMap(experts, layout, torch.device("cpu"))
        slots = layout.slots(experts)
        held = SimpleNamespace(weights=_weights([placed_now.expert_of[slot] for slot in slots]))
        layer: Any = SimpleNamespace(experts=held, map=placed_now)
        balancer = ExpertBalancer([], stage.rank(rank), WorkerArgs("m", "m"))
        try:
            for placed in plans:
                balancer._move(layer, placed)
                assert placed_now.expert_of == placed
                for weight, wanted in zip(held.weights, _weights([placed[slot] for slot in slots]), strict=True):
                    assert torch.equal(weight, wanted)
            assert (balancer.moved_experts > 0) == (ranks > 1)
        except BaseException as failure:
            failures.append(failure)
            stage._barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
