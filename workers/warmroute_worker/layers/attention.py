"""Attention over the paged pool: stores the step's keys and values, then lets every query see its own sequence.

`PagedAttention.begin` turns a StepPlan into index tensors once; the layers share them. What decodes goes to our own
kernel (float32 on CPU), which reads pages where they are; elsewhere it is gathered into padded batches of similar
length. Prefills are computed one by one. This is all that a backend with other kernels would have to offer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from warmroute_worker.layers import native
from warmroute_worker.step_plan import PADDING_PAGE

if TYPE_CHECKING:
    from warmroute_worker.kv.pool import KvPool
    from warmroute_worker.step_plan import Int32s, Int64s, StepPlan

MAX_PADDING = 2.0
"""A sequence joins a decode batch if the longest in it is at most so many times as long. One batch more costs 30 to 60
us per layer on CPU, about as much as reading 500 tokens of the demo model's keys and values."""

ALWAYS_TOGETHER_PAGES = 8
"""Sequences of at most so many pages share a batch whatever the ratio of their lengths."""

MAX_GATHERED_PAGES = 4096
"""Pages in one decode batch: bounds the gathered copy (64 MiB for the demo model with pages of 16 tokens)."""

QUERY_BLOCK = 512
"""Queries of a prefill with a prefix are computed in blocks, because their mask has a column for each token before."""


@dataclass(frozen=True)
class DecodeBatch:
    """Sequences with one query each, padded to the longest."""

    queries: slice | torch.Tensor
    """Which of the step's tokens they are."""
    pages: torch.Tensor
    """[sequences * pages of the longest], flat; short ones are filled up with the padding page."""
    size: int
    mask: torch.Tensor
    """[sequences, 1, 1, tokens]: 0 for a sequence's own tokens, -inf for padding."""


@dataclass(frozen=True)
class Prefill:
    """A run of queries of one sequence."""

    queries: slice
    pages: torch.Tensor | None
    """None: the sequence begins here, its keys and values are the queries' own."""
    num_tokens: int
    """Keys and values to be seen by the last query."""
    mask: torch.Tensor | None
    """[queries, num_tokens]; None: causal, without a prefix."""


@dataclass(frozen=True)
class AttentionBatch:
    """A StepPlan's tokens by place: made once per step."""

    positions: torch.Tensor
    """[tokens]"""
    slots: torch.Tensor
    """[tokens]: where their keys and values go; of tokens that only fill up, nowhere."""
    seen: native.Seen | None
    """What the first tokens see: all that decode, with our own kernel; None without it."""
    decodes: list[DecodeBatch]
    """Those that decode, without it."""
    prefills: list[Prefill]


class PagedAttention:
    """Owns the page table and the scratch memory; reads and writes the pool."""

    def __init__(
        self, pool: KvPool, num_rows: int, context_length: int, rounded: int = 1, *, own_kernel: bool = False
    ) -> None:
        """`rounded`: steps have a multiple of so many tokens; more than 1 (only with our own kernel): the others see
        nothing and are stored nowhere, and prefills are computed as decodes are, so that nobody's company shows."""
        self.pool = pool
        self._native = own_kernel
        self._rounded, self._deterministic = rounded, rounded > 1
        assert self._native or not self._deterministic
        self._page_size = pool.page_size
        self._device, self._dtype = pool.data.device, pool.data.dtype
        self.page_table = np.full((num_rows, -(-context_length // pool.page_size)), PADDING_PAGE, np.int64)
        self._gathered = torch.empty(0, dtype=self._dtype, device=self._device)

    def update(self, plan: StepPlan) -> None:
        """The page table, as the plan wants it."""
        if len(plan.page_updates):
            rows, indices, pages = plan.page_updates.T
            self.page_table[rows, indices] = pages

    def begin(self, plan: StepPlan) -> AttentionBatch:
        """Update the page table and say where the plan's tokens belong."""
        self.update(plan)
        if len(plan.token_ids) == len(plan):
            # Everybody decodes: most steps.
            positions, token_rows, num_decodes = plan.starts.astype(np.int64), plan.rows, len(plan)
        else:
            positions = _positions(plan.starts, plan.lengths)
            token_rows = np.repeat(plan.rows, plan.lengths)
            num_decodes = int(np.argmax(plan.lengths > 1))
        size = self._page_size
        slots = self.page_table[token_rows, positions // size] * size + positions % size
        seen, decodes = None, []
        if self._native:
            alone = len(positions) if self._deterministic else num_decodes
            rows, visible = token_rows[:alone].astype(np.int64), positions[:alone] + 1
            seen = native.Seen(rows, visible, self.page_table, size, torch.get_num_threads())
        else:
            decodes = self._decodes(plan.rows[:num_decodes], plan.starts[:num_decodes] + 1)
        decoded = self._native and (self._deterministic or num_decodes == len(plan))
        prefills = [] if decoded else self._prefills(plan, num_decodes)
        positions = rounded_up(positions, self._rounded)
        return AttentionBatch(self._tensor(positions), self._tensor(slots), seen, decodes, prefills)

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        """[tokens, heads, head_dim], twice [tokens, kv_heads, head_dim] -> [tokens, heads * head_dim]"""
        self._store(self.pool.keys[layer], keys, batch)
        self._store(self.pool.values[layer], values, batch)
        return self._attend(layer, queries, keys, values, batch, None)

    def attend_latent(
        self, layer: int, queries: torch.Tensor, rows: torch.Tensor, rank: int, scale: float, batch: AttentionBatch
    ) -> torch.Tensor:
        """[tokens, heads, dim], [tokens, dim] latent rows -> [tokens, heads * rank].

        A row is the key of every head, its first `rank` numbers are the value. Scores are multiplied with `scale`.
        """
        keys = rows.unsqueeze(1)
        self._store(self.pool.keys[layer], keys, batch)
        return self._attend(layer, queries, keys, keys[:, :, :rank], batch, scale)

    def _store(self, pool: torch.Tensor, x: torch.Tensor, batch: AttentionBatch) -> None:
        if self._native:
            native.store(x[: len(batch.slots)], batch.slots, pool)
        else:
            pool.index_copy_(0, batch.slots, x)

    def _attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: AttentionBatch,
        scale: float | None,
    ) -> torch.Tensor:
        value_dim = values.shape[2]
        alone: torch.Tensor | None = None
        if batch.seen is not None:
            pool = self.pool.keys[layer], (self.pool.values or self.pool.keys)[layer]
            alone = native.attend(queries, *pool, value_dim, scale or queries.shape[2] ** -0.5, batch.seen)
            if not batch.prefills:
                missing = len(queries) - len(alone)
                return functional.pad(alone, (0, 0, 0, missing)) if missing else alone
        if len(batch.decodes) == 1 and not batch.prefills:
            return self._decode(layer, queries, value_dim, batch.decodes[0], scale)
        output = torch.empty((len(queries), queries.shape[1] * value_dim), dtype=self._dtype, device=self._device)
        if alone is not None:
            output[: len(alone)] = alone
        for decodes in batch.decodes:
            output[decodes.queries] = self._decode(layer, queries[decodes.queries], value_dim, decodes, scale)
        for prefill in batch.prefills:
            own = prefill.queries
            output[own] = self._prefill(layer, queries[own], keys[own], values[own], prefill, scale)
        return output

    def _decode(
        self, layer: int, queries: torch.Tensor, value_dim: int, batch: DecodeBatch, scale: float | None
    ) -> torch.Tensor:
        keys, values = self._gather(layer, batch.pages, batch.size, queries.shape[2], value_dim)
        output = functional.scaled_dot_product_attention(
            queries.unsqueeze(2), keys, values, attn_mask=batch.mask, enable_gqa=True, scale=scale
        )
        return output.reshape(batch.size, -1)

    def _prefill(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        prefill: Prefill,
        scale: float | None,
    ) -> torch.Tensor:
        if prefill.pages is None:
            keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
        else:
            keys, values = self._gather(layer, prefill.pages, 1, queries.shape[2], values.shape[2])
            keys, values = keys[:, :, : prefill.num_tokens], values[:, :, : prefill.num_tokens]
        output = functional.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            enable_gqa=True,
            scale=scale,
        )
        return output[0].transpose(0, 1).reshape(len(queries), -1)

    def _gather(
        self, layer: int, pages: torch.Tensor, size: int, head_dim: int, value_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `size` equally long page lists, each [size, kv_heads, tokens, their dim]."""
        source = self.pool.pages[layer]
        parts = source.shape[0]
        shape = (parts, len(pages), source.shape[2])
        needed = parts * len(pages) * source.shape[2]
        if needed > len(self._gathered):
            # Kept between steps: fresh memory of this size would be mapped and unmapped by the kernel in every layer.
            self._gathered = torch.empty(needed, dtype=self._dtype, device=self._device)
        gathered = self._gathered[:needed].view(shape)
        torch.index_select(source, 1, pages, out=gathered)
        tokens = len(pages) // size * self._page_size
        found = gathered.view(parts, size, tokens, -1, head_dim).transpose(2, 3)
        return found[0], found[1] if parts == 2 else found[0][..., :value_dim]

    def _decodes(self, rows: Int32s, num_tokens: Int32s) -> list[DecodeBatch]:
        batches = []
        page_counts = -(-num_tokens // self._page_size)
        for members in similar_lengths(page_counts):
            longest = int(page_counts[members].max())
            offsets = np.arange(longest)
            pages = self.page_table[rows[members], :longest]
            # The table keeps what earlier sequences left behind a row's end.
            pages = np.where(offsets < page_counts[members, None], pages, PADDING_PAGE)
            visible = np.arange(longest * self._page_size) < num_tokens[members, None]
            mask = torch.zeros(visible.shape, dtype=self._dtype).masked_fill_(torch.from_numpy(~visible), -torch.inf)
            whole = len(members) == len(rows)
            batches.append(
                DecodeBatch(
                    slice(0, len(rows)) if whole else self._tensor(members),
                    self._tensor(pages.reshape(-1)),
                    len(members),
                    mask.to(self._device)[:, None, None, :],
                )
            )
        return batches

    def _prefills(self, plan: StepPlan, first: int) -> list[Prefill]:
        prefills = []
        offset = first
        for row, start, length in zip(
            plan.rows[first:].tolist(), plan.starts[first:].tolist(), plan.lengths[first:].tolist(), strict=True
        ):
            if start == 0:
                prefills.append(Prefill(slice(offset, offset + length), None, length, None))
            else:
                for begin in range(start, start + length, QUERY_BLOCK):
                    end = min(begin + QUERY_BLOCK, start + length)
                    at = offset + begin - start
                    pages = self.page_table[row, : -(-end // self._page_size)]
                    visible = torch.ones((end - begin, end), dtype=torch.bool, device=self._device).tril_(begin)
                    prefills.append(Prefill(slice(at, at + end - begin), self._tensor(pages), end, visible))
            offset += length
        return prefills

    def _tensor(self, array: Int64s) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def rounded_up(numbers: Int64s, multiple: int) -> Int64s:
    """Filled up with zeros to a multiple."""
    missing = -len(numbers) % multiple
    return np.pad(numbers, (0, missing)) if missing else numbers


def similar_lengths(page_counts: Int32s) -> list[Int64s]:
    """Indices into `page_counts`, in groups whose lengths are worth padding to the longest.

    One group of all keeps the order it was given in; several are sorted by length.
    """
    if len(page_counts) == 0:
        return []
    order = np.argsort(-page_counts, kind="stable")
    groups: list[list[int]] = []
    longest = 0
    for index in order.tolist():
        pages = int(page_counts[index])
        fits = pages * MAX_PADDING >= longest or longest <= ALWAYS_TOGETHER_PAGES
        if not groups or not fits or (len(groups[-1]) + 1) * longest > MAX_GATHERED_PAGES:
            groups.append([])
            longest = pages
        groups[-1].append(index)
    return [np.sort(np.array(group, np.int64)) for group in groups]


def _positions(starts: Int32s, lengths: Int32s) -> Int64s:
    """Each sequence's run start, start + 1, ... one after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    within = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(ends - lengths, lengths)
    positions: Int64s = np.repeat(starts.astype(np.int64), lengths) + within
    return positions
