"""One step of the engine, as the scheduler orders it and an executor runs it. Imports no torch.

A plan is columns of numbers and nothing else, so that it can be sent to executors in other processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

PADDING_PAGE = 0
"""Page 0 of the pool belongs to nobody and stays zero: page lists are padded with it."""


IDLE, DECODE, PREFILL = range(3)
"""What a rank does in a step."""

RECORD_NUMBERS = 8


class Record(NamedTuple):
    """What data-parallel ranks tell each other before each step. Sent as `RECORD_NUMBERS` int64, the rest is spare."""

    tokens: int
    logit_rows: int
    """Of logits that are wanted: one for each sequence that gets a token, and for each prompt token that is told."""
    mode: int
    first_half: int = 0
    """Tokens of the first of two halves in which it could be computed; 0: in one piece only."""

    def encode(self) -> bytes:
        return np.array([*self, *[0] * (RECORD_NUMBERS - len(self))], np.int64).tobytes()


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
class ToldColumns:
    """One entry per prompt token whose logprob is told, [n] each."""

    rows: Int64s
    """Of the step's tokens, the one before it, whose logits say how likely it is."""
    ids: Int64s
    """The token itself."""
    tops: Int64s
    """How many of the likeliest tokens to report beside it."""

    def __len__(self) -> int:
        return len(self.rows)


NOTHING_TOLD = ToldColumns(*(np.empty(0, np.int64) for _ in range(3)))


@dataclass(frozen=True, eq=False)
class SamplingColumns:
    """One entry per sequence that gets a token in this step, in the order of the plan.

    Nothing here depends on the step, unless logits are changed, so that plans share one as long as they draw for the
    same sequences.
    """

    temperatures: npt.NDArray[np.float32]
    """0 is greedy."""
    top_ks: Int32s
    """Below 1: off."""
    top_ps: npt.NDArray[np.float32]
    min_ps: npt.NDArray[np.float32]
    """0: off."""
    seeds: npt.NDArray[np.uint64]
    logprobs: Int32s
    """How many of the likeliest tokens to report beside the new one; -1: nothing."""
    scaled: LogitChanges = NO_CHANGES
    """First: positive logits are divided by the value, negative ones multiplied."""
    added: LogitChanges = NO_CHANGES
    """Then: the value is added; an id may stand here more than once."""

    @cached_property
    def is_greedy(self) -> bool:
        """Of everybody's logits, as they are, the largest is drawn."""
        return not (len(self.scaled) or len(self.added) or (self.temperatures > 0).any())

    @cached_property
    def reports(self) -> bool:
        """Somebody wants logprobs."""
        return bool((self.logprobs >= 0).any())


_NOBODY = np.empty((0, RECORD_NUMBERS), np.int64)
NO_IDS = np.empty(0, np.int64)

NO_SAMPLING = SamplingColumns(
    temperatures=np.empty(0, np.float32),
    top_ks=np.empty(0, np.int32),
    top_ps=np.empty(0, np.float32),
    min_ps=np.empty(0, np.float32),
    seeds=np.empty(0, np.uint64),
    logprobs=np.empty(0, np.int32),
)


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
    told: ToldColumns = NOTHING_TOLD
    more: int = 0
    """Decode steps that may follow at once, each of the tokens that the one before has brought. There are pages for
    them. An executor may do fewer."""
    stop_ids: Int64s = field(default_factory=lambda: NO_IDS)
    """After a step that brings one of these none follows."""
    first_half: int = 0
    """See `Record`."""
    everybody: Int64s = field(default_factory=lambda: _NOBODY)
    """[data-parallel ranks, 8]: what each of them does in this step (`Record`), if they go in step."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def positions(self) -> Int64s:
        """Places of the new tokens in their sequences. With the seeds they fix the random numbers, whoever is drawn for
        beside them."""
        positions: Int64s = (self.starts + self.lengths)[self.sampled].astype(np.int64)
        return positions

    @cached_property
    def record(self) -> Record:
        """What other data-parallel ranks must know of this step."""
        tokens = len(self.token_ids)
        if self.logit_rows is None:
            return Record(tokens, tokens, DECODE if tokens else IDLE, self.first_half)
        mode = PREFILL if (self.lengths > 1).any() else DECODE if tokens else IDLE
        return Record(tokens, int(self.sampled.sum()) + len(self.told), mode, self.first_half)

    @cached_property
    def records(self) -> list[Record]:
        """Of all data-parallel ranks that go in step; else of this one."""
        if not len(self.everybody):
            return [self.record]
        return [Record(*row[: len(Record._fields)]) for row in self.everybody.tolist()]

    @cached_property
    def logit_rows(self) -> Int64s | None:
        """Of the step's tokens, those whose logits are wanted: the sampled sequences, then what is told. None: all
        in order, as in most steps.
        """
        if len(self.token_ids) == len(self) and not len(self.told) and np.count_nonzero(self.sampled) == len(self):
            return None
        return np.concatenate([np.cumsum(self.lengths, dtype=np.int64)[self.sampled] - 1, self.told.rows])

    @property
    def is_idle(self) -> bool:
        """Nobody has anything to compute."""
        if not len(self.everybody):
            return not len(self.token_ids)
        return not any(record.tokens for record in self.records)

    @property
    def halves(self) -> list[tuple[int, int]] | None:
        """Tokens of both halves, by data-parallel rank, if all that have any can be cut in two; else None."""
        records = self.records
        if not any(record.first_half for record in records):
            return None
        if any(record.tokens and not record.first_half for record in records):
            return None
        return [(record.first_half, record.tokens - record.first_half) for record in records]

    def cut(self) -> tuple[StepPlan, StepPlan]:
        """The two halves. They have the tokens; what is drawn at the end stays with the whole."""
        ends = np.cumsum(self.lengths)
        begins = ends - self.lengths
        parts: list[StepPlan] = []
        for low, high in ((0, self.first_half), (self.first_half, len(self.token_ids))):
            inside = (ends > low) & (begins < high)
            first = np.maximum(begins[inside], low)
            lengths = np.minimum(ends[inside], high) - first
            parts.append(
                replace(
                    self,
                    rows=self.rows[inside],
                    starts=(self.starts[inside] + first - begins[inside]).astype(np.int32),
                    lengths=lengths.astype(np.int32),
                    token_ids=self.token_ids[low:high],
                    sampled=np.zeros(int(inside.sum()), np.bool_),
                    told=NOTHING_TOLD,
                    page_updates=self.page_updates[: 0 if parts else None],
                )
            )
        return parts[0], parts[1]
