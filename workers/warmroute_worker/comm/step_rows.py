"""Where the rows of a step are between attention and MLPs, when attention is data-parallel and MLPs are not.

Attention sees the rows of its own data-parallel rank, the same on all ranks that share it. An MLP that is divided among
all ranks of the stage must see everybody's rows, and what comes out is a sum. Experts to which rows are sent want each
row once. (SGLang calls the three TP_ATTN_FULL, FULL and SCATTERED.)

A rank shows its share of its group's rows only, so each row is moved once.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from warmroute_worker import topology
from warmroute_worker.comm.tensor_group import row_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from warmroute_worker.comm.tensor_group import TensorGroup


class StepRows:
    """Of one step. All ranks of the stage make the same one, and call its methods in the same order."""

    def __init__(self, stage: TensorGroup, attention: TensorGroup, counts: Sequence[int]) -> None:
        """`stage`: all its ranks; `attention`: those that share this rank's heads; `counts`: rows of each data-parallel
        rank, of which there is one without DP attention."""
        self._stage, self._attention = stage, attention
        self.counts = counts

    @cached_property
    def own(self) -> range:
        """Which of all rows are this data-parallel rank's."""
        return row_ranges(self.counts)[self._stage.rank // self._attention.size]

    @cached_property
    def _single(self) -> range:
        """Of the own ones, those that are this rank's."""
        return topology.share(len(self.own), self._attention.rank, self._attention.size)

    @cached_property
    def _singles(self) -> list[int]:
        """How many those are, of each rank."""
        size = self._attention.size
        return [len(topology.share(count, rank, size)) for count in self.counts for rank in range(size)]

    def all(self, x: torch.Tensor) -> torch.Tensor:
        """Own rows -> everybody's."""
        return x if len(self.counts) == 1 else self._stage.gather_rows(self.single(x), self._singles)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """Parts of a sum, for everybody's rows -> the sum, of own rows; `x` may be overwritten."""
        if len(self.counts) == 1:
            return self._stage.sum(x)
        wanted = [rows for rows in row_ranges(self.counts) for _ in range(self._attention.size)]
        return self._stage.sum_rows(x, wanted)

    def single(self, x: torch.Tensor) -> torch.Tensor:
        """Own rows -> those that no other rank has."""
        return x[self._single.start : self._single.stop]

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """What `single` gave, or was made of it -> own rows."""
        size = self._attention.size
        counts = [len(topology.share(len(self.own), rank, size)) for rank in range(size)]
        return self._attention.gather_rows(x, counts)
