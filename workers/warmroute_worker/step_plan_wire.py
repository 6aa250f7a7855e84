"""How the driver sends a step's plan to the other ranks: columns of numbers, one behind the other. Imports no torch."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from warmroute_worker.step_plan import (
    NO_SAMPLING,
    RECORD_NUMBERS,
    Int32s,
    LogitChanges,
    SamplingColumns,
    StepPlan,
    ToldColumns,
)


def encode(plan: StepPlan) -> bytes:
    """What `decode` reads. Its first eight bytes are a number: of tokens, or negative."""
    if plan.logit_rows is None and not len(plan.everybody) and not plan.first_half:
        return _encoded_decodes(plan) + _encoded_sampling(plan.sampling)
    assert not plan.more, "only steps in which everybody decodes go on"
    columns: dict[str, npt.NDArray[Any]] = vars(plan) | {
        "first_half": np.array([plan.first_half], np.int64),
        **{f"told_{part}": getattr(plan.told, part) for part in _TOLD},
    }
    return _packed(columns, _COLUMNS) + _encoded_sampling(plan.sampling)


def decode(data: bytes, *, draws: bool = True) -> StepPlan:
    """What `encode` wrote. For ranks that draw no tokens (not `draws`), `sampling` is left out: who follows a plan is
    late by what this takes."""
    buffer = bytearray(data)  # writable, since tensors are made of the columns
    if int.from_bytes(data[:8], "little", signed=True) < 0:
        return _decoded_decodes(buffer, draws=draws)
    columns, end = _unpacked(buffer, _COLUMNS, 0)
    told = [columns.pop(f"told_{part}") for part in _TOLD]
    if len(told[0]):
        columns["told"] = ToldColumns(*told)
    columns["page_updates"] = columns["page_updates"].reshape(-1, 3)
    columns["first_half"] = int(columns["first_half"][0])
    columns["everybody"] = columns["everybody"].reshape(-1, RECORD_NUMBERS)
    return StepPlan(**columns, sampling=_sampling(buffer, end) if draws else NO_SAMPLING)


_HEAD = struct.Struct("<qqqq")
"""-1 - sequences, page updates, steps that may follow, ids that end them."""


def _encoded_decodes(plan: StepPlan) -> bytes:
    """Most plans: one token of each sequence, and one for each. Who follows reads it in half the time: the driver waits
    for that."""
    head = _HEAD.pack(-1 - len(plan), len(plan.page_updates), plan.more, len(plan.stop_ids))
    columns = plan.token_ids, plan.stop_ids, plan.rows, plan.starts, plan.page_updates
    data = b"".join([head, *(column.tobytes() for column in columns)])
    return data + bytes(-len(data) % 8)


def _decoded_decodes(buffer: bytearray, *, draws: bool) -> StepPlan:
    first, updates, more, stops = _HEAD.unpack_from(buffer)
    count = -1 - first
    at = _HEAD.size + 8 * (count + stops)
    numbers = 2 * count + 3 * updates
    ids = np.frombuffer(buffer, np.int64, count + stops, _HEAD.size)
    columns = np.frombuffer(buffer, np.int32, numbers, at)
    end = at + 4 * numbers
    plan = StepPlan(
        rows=columns[:count],
        starts=columns[count : 2 * count],
        lengths=_ones(count),
        token_ids=ids[:count],
        sampled=_all(count),
        sampling=_sampling(buffer, end + -end % 8) if draws else NO_SAMPLING,
        page_updates=columns[2 * count :].reshape(-1, 3),
        more=more,
        stop_ids=ids[count:],
    )
    vars(plan)["logit_rows"] = None  # it need not be found out again
    return plan


@lru_cache
def _ones(count: int) -> Int32s:
    ones = np.ones(count, np.int32)
    ones.setflags(write=False)
    return ones


@lru_cache
def _all(count: int) -> npt.NDArray[np.bool_]:
    everybody = np.ones(count, np.bool_)
    everybody.setflags(write=False)
    return everybody


@lru_cache(maxsize=8)
def _encoded_sampling(sampling: SamplingColumns) -> bytes:
    """Mostly the same object as in the plan before."""
    columns: dict[str, npt.NDArray[Any]] = dict(vars(sampling))
    for kind in _CHANGES:
        changes = columns[kind]
        columns |= {f"{kind}_{part}": getattr(changes, part) for part in _CHANGE}
    return _packed(columns, _SAMPLING)


def _sampling(buffer: bytearray, at: int) -> SamplingColumns:
    columns, _ = _unpacked(buffer, _SAMPLING, at)
    for kind in _CHANGES:
        columns[kind] = LogitChanges(*(columns.pop(f"{kind}_{part}") for part in _CHANGE))
    return SamplingColumns(**columns)


def _packed(columns: dict[str, npt.NDArray[Any]], dtypes: dict[str, type[np.generic]]) -> bytes:
    """How many numbers each column has, then the columns, filled up to whole words."""
    wanted = [columns[name] for name in dtypes]
    counts = np.array([column.size for column in wanted], np.int64)
    data = b"".join([counts.tobytes(), *(column.tobytes() for column in wanted)])
    return data + bytes(-len(data) % 8)


def _unpacked(buffer: bytearray, dtypes: dict[str, type[np.generic]], at: int) -> tuple[dict[str, Any], int]:
    """What `_packed` wrote there, and where it ends."""
    counts = np.frombuffer(buffer, np.int64, len(dtypes), at).tolist()
    at += 8 * len(dtypes)
    columns: dict[str, Any] = {}
    for (name, dtype), count in zip(dtypes.items(), counts, strict=True):
        columns[name] = np.frombuffer(buffer, dtype, count, at) if count else _EMPTY[dtype]
        at += count * _SIZES[dtype]
    return columns, at + -at % 8


# The wider ones come first, so that all are aligned.
_COLUMNS: dict[str, type[np.generic]] = {
    "token_ids": np.int64,
    "told_rows": np.int64,
    "told_ids": np.int64,
    "told_tops": np.int64,
    "everybody": np.int64,
    "first_half": np.int64,
    "rows": np.int32,
    "starts": np.int32,
    "lengths": np.int32,
    "page_updates": np.int32,
    "sampled": np.bool_,
}
_SAMPLING: dict[str, type[np.generic]] = {
    "seeds": np.uint64,
    "scaled_rows": np.int64,
    "scaled_ids": np.int64,
    "added_rows": np.int64,
    "added_ids": np.int64,
    "temperatures": np.float32,
    "top_ks": np.int32,
    "top_ps": np.float32,
    "min_ps": np.float32,
    "logprobs": np.int32,
    "scaled_values": np.float32,
    "added_values": np.float32,
}
_EMPTY = {dtype: np.empty(0, dtype) for dtype in (*_COLUMNS.values(), *_SAMPLING.values())}
_SIZES = {dtype: np.dtype(dtype).itemsize for dtype in _EMPTY}

_TOLD = ("rows", "ids", "tops")

_CHANGES, _CHANGE = ("scaled", "added"), ("rows", "ids", "values")
