"""An ordinary MLP as torch compiles it (`--enable-torch-compile`): the one part of a layer that is torch's own
operations from end to end and has no collective in it."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from warmroute_worker import topology
from warmroute_worker.layers.linear import weight_and_bias
from warmroute_worker.startup_error import StartupError
from warmroute_worker.weights.source import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from warmroute_worker.comm.tensor_group import TensorGroup
    from warmroute_worker.weights.source import WeightSource

MOST_VARIANTS = 64
"""Of the function, for shapes of MLPs, single rows and numbers of threads. Torch's own limit is 8, beyond which it does
not compile and does not say so."""


class CompiledMlp:
    """As `GatedMlp`, whose matrices stay as they are here."""

    def __init__(
        self, source: WeightSource, name: str, hidden: int, intermediate: int, bias: bool, group: TensorGroup
    ) -> None:
        own = topology.share(intermediate, group.rank, group.size)
        inner = [f"{name}.gate_proj", f"{name}.up_proj"]
        self._gate_up = weight_and_bias(source, inner, hidden, [intermediate] * 2, bias, [Part.of_rows(own)] * 2)
        self._down = weight_and_bias(source, [f"{name}.down_proj"], intermediate, [hidden], bias, [Part(columns=own)])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> this rank's part of the sum, [tokens, hidden]"""
        # No rows would be one more shape to compile for.
        return compiled()(x, *self._gate_up, *self._down) if len(x) else torch.empty_like(x)

    def warm_up(self) -> None:
        """Compile what it needs: torch makes one function for single rows and one for all other numbers."""
        weight = self._down[0]
        for rows in (1, 2):
            self(torch.zeros((rows, len(weight)), dtype=weight.dtype, device=weight.device))


@functools.cache
def compiled() -> Callable[..., torch.Tensor]:
    """One function for all MLPs of this process, so that layers of the same shape share what was compiled."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = MOST_VARIANTS
    # In this process: the pool that torch would start outlives it.
    torch._inductor.config.compile_threads = 1
    return torch.compile(_gated_mlp, dynamic=True, fullgraph=True)


def warm_up(mlps: Sequence[CompiledMlp], threads: Iterable[int]) -> float:
    """Compile all that steps will need, which depends on the number of torch's threads; how many seconds it took.

    Raises StartupError if torch cannot compile here.
    """
    began = time.perf_counter()
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            for count in threads:
                torch.set_num_threads(count)
                for mlp in mlps:
                    mlp.warm_up()
    except Exception as error:
        cause = next((line for line in str(error).splitlines() if line.strip()), "it gives no reason")
        raise StartupError(
            f"--enable-torch-compile: torch cannot compile here ({cause}); install a C++ compiler (g++, or another one "
            "that CXX names), or remove the flag"
        ) from error
    finally:
        torch.set_num_threads(before)
    return time.perf_counter() - began


def _gated_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
) -> torch.Tensor:
    gate, up = functional.linear(x, gate_up, gate_up_bias).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down, down_bias)
