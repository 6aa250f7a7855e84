"""A step computed in two halves: the rows of one are on their way to experts, or back, while the other is computed.

In every layer: attention of A, its rows leave; attention of B, its rows leave; experts for A's rows, they go back;
experts for B's. So A's way back overlaps B's experts, and B's the attention of A in the next layer. The order is the
same on all ranks. A sequence that stands in both halves has its first tokens in A, so that B sees their keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from warmroute_worker.layers.moe import MixtureOfExperts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker.comm.step_rows import StepRows
    from warmroute_worker.layers.attention import AttentionBatch, PagedAttention
    from warmroute_worker.layers.moe import Returning
    from warmroute_worker.layers.rope import RotaryEmbedding
    from warmroute_worker.models.decoder import DecoderLayer
    from warmroute_worker.models.self_attention import CosSin


@dataclass
class Half:
    """One of the two."""

    x: torch.Tensor
    cos_sin: CosSin
    batch: AttentionBatch
    rows: StepRows
    shared: torch.Tensor | None = None
    """What the shared expert made of the rows that are away."""
    returning: Returning | None = None


def forward(
    layers: Sequence[DecoderLayer], halves: tuple[Half, Half], rope: RotaryEmbedding, attention: PagedAttention
) -> torch.Tensor:
    """[tokens, hidden] of both, through all layers."""
    mlp: MixtureOfExperts | None = None
    for layer in layers:
        away = []
        for half in halves:
            _land(mlp, half)
            inner = layer.attend(half.x, half.cos_sin, rope, attention, half.batch)
            if not layer.sends:
                half.x += half.rows.summed(layer.mlp(half.rows.all(inner)))
                continue
            assert isinstance(layer.mlp, MixtureOfExperts)
            single = half.rows.single(inner)
            away.append((half, layer.mlp.send(single)))
            half.shared = layer.mlp.shared(single)
        mlp = layer.mlp if layer.sends and isinstance(layer.mlp, MixtureOfExperts) else None
        for half, sent in away:
            assert mlp is not None
            half.returning = mlp.compute(sent)
    for half in halves:
        _land(mlp, half)
    return torch.cat([half.x for half in halves])


def _land(mlp: MixtureOfExperts | None, half: Half) -> None:
    """Take back the rows that are away, if any are."""
    if half.returning is None:
        return
    assert mlp is not None
    output, half.returning = mlp.received(half.returning), None
    if half.shared is not None:
        output += half.shared
    half.x += half.rows.joined(output)
