"""From logits to tokens. A row's token depends on its own logits, parameters, seed and position, not on the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from warmroute_worker.executor.philox import Float64s, uniforms
from warmroute_worker.layers import native
from warmroute_worker.messages import TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from warmroute_worker.step_plan import Int32s, Int64s, SamplingColumns, ToldColumns

ROWS_AT_ONCE = 32
"""Rows of logits that are held twice more in float64 while prompt logprobs are made of them."""


def sample(logits: torch.Tensor, columns: SamplingColumns, positions: Callable[[], Int64s]) -> Int64s:
    """[rows, vocab] float32 logits -> [rows] token ids. `positions`: where they go in their sequences."""
    if columns.is_greedy and logits.is_cpu:
        return native.likeliest(logits)
    vocab = logits.shape[1]
    logits = _changed(logits, columns)
    drawn = columns.temperatures > 0
    tokens = logits.argmax(dim=-1)
    if drawn.any():
        fewer = ((columns.top_ks >= 1) & (columns.top_ks < vocab)) | (columns.top_ps < 1) | (columns.min_ps > 0)
        filtered = drawn & fewer
        numbers = uniforms(columns.seeds, positions())
        for kind, draw in ((drawn & ~filtered, _draw), (filtered, _draw_filtered)):
            rows = np.flatnonzero(kind)
            if len(rows):
                index = torch.from_numpy(rows).to(logits.device)
                tokens[index] = draw(logits[index], columns, rows, numbers[rows])
    result: Int64s = tokens.cpu().numpy()
    return result


def logprobs(logits: torch.Tensor, columns: SamplingColumns, tokens: Int64s) -> dict[int, TokenLogprobs]:
    """Of the rows that ask for it, by row: of the token in `tokens` and of the likeliest ones."""
    if not columns.reports:
        return {}
    rows = np.flatnonzero(columns.logprobs >= 0)
    index = torch.from_numpy(rows).to(logits.device)
    reported = _reported(logits[index], tokens[rows], columns.logprobs[rows])
    return dict(zip(rows.tolist(), reported, strict=True))


def prompt_logprobs(logits: torch.Tensor, told: ToldColumns) -> list[TokenLogprobs]:
    """[told, vocab] logits -> the logprobs of the tokens that stand behind them, and of the likeliest ones."""
    reported: list[TokenLogprobs] = []
    for begin in range(0, len(told), ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        reported += _reported(logits[part], told.ids[part], told.tops[part])
    return reported


def _reported(logits: torch.Tensor, ids: Int64s, tops: Int32s | Int64s) -> list[TokenLogprobs]:
    """Of `ids[i]` and the `tops[i]` likeliest tokens, by row."""
    shares = torch.log_softmax(logits.double(), dim=-1)
    own = shares.gather(1, torch.from_numpy(ids).to(logits.device)[:, None])[:, 0].tolist()
    top = shares.topk(min(int(tops.max()), shares.shape[1]), dim=-1)
    likeliest, values = top.indices.tolist(), top.values.tolist()
    return [
        TokenLogprobs(own[row], list(zip(likeliest[row][:count], values[row][:count], strict=True)))
        for row, count in enumerate(tops.tolist())
    ]


def _changed(logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """As the penalties and biases of the rows want them."""
    scaled, added = columns.scaled, columns.added
    if not len(scaled) and not len(added):
        return logits
    logits = logits.clone()
    for changes in (scaled, added):
        known = np.flatnonzero(changes.ids < logits.shape[1])  # a stop id may be one that the model does not have
        if not len(known):
            continue
        places = tuple(torch.from_numpy(column[known]).to(logits.device) for column in (changes.rows, changes.ids))
        values = torch.from_numpy(changes.values[known]).to(logits.device)
        if changes is scaled:
            before = logits[places]
            logits[places] = torch.where(before > 0, before / values, before * values)
        else:
            logits.index_put_(places, values, accumulate=True)
    return logits


def _draw(logits: torch.Tensor, columns: SamplingColumns, rows: Int64s, numbers: Float64s) -> torch.Tensor:
    """Inversion of the whole distribution, in the order of token ids."""
    return _invert(_probabilities(logits, columns, rows), numbers)


def _draw_filtered(logits: torch.Tensor, columns: SamplingColumns, rows: Int64s, numbers: Float64s) -> torch.Tensor:
    """The `top_k` likeliest tokens, of them the fewest whose share reaches `top_p`, and of these such as are not below
    `min_p` of the likeliest; equal ones by token id."""
    vocab, device = logits.shape[1], logits.device
    ordered, ids = _probabilities(logits, columns, rows).sort(dim=-1, descending=True, stable=True)
    wanted = columns.top_ks[rows].astype(np.int64)
    top_ks = torch.from_numpy(np.where(wanted < 1, vocab, wanted)).to(device)
    top_ps = torch.from_numpy(columns.top_ps[rows].astype(np.float64)).to(device)
    min_ps = torch.from_numpy(columns.min_ps[rows].astype(np.float64)).to(device)
    unlikely = ordered < ordered[:, :1] * min_ps[:, None]
    ordered = ordered.masked_fill_(torch.arange(vocab, device=device) >= top_ks[:, None], 0.0)
    ordered /= ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    before[:, 0] = -1.0  # the likeliest token stays, even with top_p 0
    ordered.masked_fill_(before >= top_ps[:, None], 0.0)
    ordered.masked_fill_(unlikely, 0.0)
    return ids.gather(1, _invert(ordered, numbers)[:, None])[:, 0]


def _probabilities(logits: torch.Tensor, columns: SamplingColumns, rows: Int64s) -> torch.Tensor:
    """In float64: the sums below must not depend on the order of addition in any way that shows."""
    temperatures = torch.from_numpy(columns.temperatures[rows].astype(np.float64)).to(logits.device)
    # The largest is taken off first, so that a temperature of 1e-30 gives -inf beside 0 and not inf beside inf.
    logits = logits.double()
    return torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None], dim=-1)


def _invert(weights: torch.Tensor, numbers: Float64s) -> torch.Tensor:
    """Index of the column in which number x total falls; never one of weight 0."""
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    # The product may round up to the total itself, which lies beyond the last column.
    targets = torch.minimum(
        torch.from_numpy(numbers).to(weights.device)[:, None] * total, torch.nextafter(total, -total)
    )
    return torch.searchsorted(sums, targets, right=True)[:, 0]
