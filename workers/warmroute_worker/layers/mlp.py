"""An ordinary MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmroute_worker import topology
from warmroute_worker.layers.compiled_mlp import CompiledMlp
from warmroute_worker.layers.linear import Linear, silu_and_multiply
from warmroute_worker.weights.source import Part

if TYPE_CHECKING:
    import torch

    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.weights.source import WeightSource


def gated_mlp(
    source: WeightSource, name: str, hidden: int, intermediate: int, bias: bool, group: TensorGroup
) -> GatedMlp | CompiledMlp:
    """The one that the source's packing asks for."""
    kind = CompiledMlp if source.packing.compiled_mlps else GatedMlp
    return kind(source, name, hidden, intermediate, bias, group)


class GatedMlp:
    """down(silu(gate(x)) * up(x)), of which each rank computes its share of the inner numbers."""

    def __init__(
        self, source: WeightSource, name: str, hidden: int, intermediate: int, bias: bool, group: TensorGroup
    ) -> None:
        own = topology.share(intermediate, group.rank, group.size)
        inner = [f"{name}.gate_proj", f"{name}.up_proj"]
        self.gate_up = Linear(source, inner, hidden, [intermediate] * 2, bias, [Part.of_rows(own)] * 2)
        self.down = Linear(source, [f"{name}.down_proj"], intermediate, [hidden], bias, [Part(columns=own)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> this rank's part of the sum, [tokens, hidden]"""
        return self.down(silu_and_multiply(self.gate_up(x)))
