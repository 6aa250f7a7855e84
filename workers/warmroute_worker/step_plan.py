"""One step of the engine, as the scheduler orders it and an executor runs it. Imports no torch.

A plan is columns of numbers and nothing else, so that it can be sent to executors in other processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

PADDING_PAGE = 0
"""Page 0 of the pool belongs to nobody and stays zero: page lists are padded with it."""


@dataclass(frozen=True)
class LogitChanges:
    """Single logits that are changed before a token is chosen, [n] each: of sampled sequence `rows[i]` id `ids[i]`."""

    rows: Int64s
    ids: Int64s
    values: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


NO_CHANGES = LogitChanges(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True)
class SamplingColumns:
    """One entry per sequence that gets a token in this step, in the order of the plan."""

    temperatures: npt.NDArray[np.float32]
    """0 is greedy."""
    top_ks: Int32s
    """Below 1: off."""
    top_ps: npt.NDArray[np.float32]
    min_ps: npt.NDArray[np.float32]
    """0: off."""
    seeds: npt.NDArray[np.uint64]
    positions: Int64s
    """Place of the new token in its sequence. With the seed it fixes the random number, whatever the batch."""
    logprobs: Int32s
    """How many of the likeliest tokens to report beside the new one; -1: nothing."""
    scaled: LogitChanges = NO_CHANGES
    """First: positive logits are divided by the value, negative ones multiplied."""
    added: LogitChanges = NO_CHANGES
    """Then: the value is added; an id may stand here more than once."""


@dataclass(frozen=True)
class StepPlan:
    """What to compute: for each sequence i, `lengths[i]` tokens after the `starts[i]` whose keys and values are stored.

    An executor keeps a page table: [row, n] is the page of tokens n * page_size ... of the sequence in that row.
    """

    rows: Int32s
    """Row of each sequence in the page table."""
    starts: Int32s
    lengths: Int32s
    token_ids: Int64s
    """[sum(lengths)]"""
    sampled: npt.NDArray[np.bool_]
    """False for a prefill chunk that is not the last: it yields no token."""
    sampling: SamplingColumns
    page_updates: Int32s
    """[n, 3]: row, index, page; to be written into the page table in this order, before the step."""

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self) -> bytes:
        """How the driver sends a plan to the other ranks; `decode` is the other end."""
        by_name = self._columns()
        columns = [by_name[name] for name in _DTYPES]
        counts = np.array([column.size for column in columns], np.int64)
        return b"".join([counts.tobytes(), *(column.tobytes() for column in columns)])

    @classmethod
    def decode(cls, data: bytes) -> StepPlan:
        """What `encode` wrote."""
        # Writable, since tensors are made of the columns; the 8-byte ones come first, so that all are aligned.
        buffer = bytearray(data)
        counts = np.frombuffer(buffer, np.int64, len(_DTYPES))
        at = counts.nbytes
        columns: dict[str, Any] = {}
        for (name, dtype), count in zip(_DTYPES.items(), counts.tolist(), strict=True):
            columns[name] = np.frombuffer(buffer, dtype, count, at)
            at += columns[name].nbytes
        changes: dict[str, Any] = {
            kind: LogitChanges(*(columns.pop(f"{kind}_{part}") for part in ("rows", "ids", "values")))
            for kind in ("scaled", "added")
        }
        sampling = SamplingColumns(**{name: columns.pop(name) for name in _SAMPLING}, **changes)
        columns["page_updates"] = columns["page_updates"].reshape(-1, 3)
        return cls(**columns, sampling=sampling)

    def _columns(self) -> dict[str, npt.NDArray[Any]]:
        columns: dict[str, npt.NDArray[Any]] = vars(self) | vars(self.sampling)
        for kind in ("scaled", "added"):
            changes = columns[kind]
            columns |= {f"{kind}_{part}": getattr(changes, part) for part in ("rows", "ids", "values")}
        return columns


_DTYPES: dict[str, type[np.generic]] = {
    "token_ids": np.int64,
    "seeds": np.uint64,
    "positions": np.int64,
    "scaled_rows": np.int64,
    "scaled_ids": np.int64,
    "added_rows": np.int64,
    "added_ids": np.int64,
    "rows": np.int32,
    "starts": np.int32,
    "lengths": np.int32,
    "page_updates": np.int32,
    "temperatures": np.float32,
    "top_ks": np.int32,
    "top_ps": np.float32,
    "min_ps": np.float32,
    "logprobs": np.int32,
    "scaled_values": np.float32,
    "added_values": np.float32,
    "sampled": np.bool_,
}
"""Of a plan's columns, in the order in which they are sent."""

_SAMPLING = ("temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions", "logprobs")
