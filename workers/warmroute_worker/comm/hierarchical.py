"""Groups whose ranks are on several nodes: through shared memory inside a node, from node to node by one rank of each.

So what crosses the network crosses it once for each node, not for each rank. Ranks of a node stand together in the
group. Tensors on a GPU go through the host's memory.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from warmroute_worker import topology
from warmroute_worker.comm.node_exchange import added
from warmroute_worker.comm.tensor_group import DTYPES, row_ranges

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmroute_worker._native import Group
    from warmroute_worker.comm.node_exchange import NodeExchange


class HierarchicalGroup:
    """See `TensorGroup`. Sums are taken in the order of ranks inside a node, then in the order of nodes; of 16-bit
    numbers a node's sum is rounded before it is sent."""

    name = "shared memory, gloo between nodes"

    def __init__(self, sizes: Sequence[int], node: int, local: Group | None, index: int, between: NodeExchange | None):
        """`sizes`: ranks of each node; `node`: this one's place among them; `index`: this rank's place on its node;
        `local`: its ranks, if there are several; `between`: of the first rank of each node."""
        self._members = row_ranges(sizes)
        self._node, self._local, self._index, self._between = node, local, index, between
        self.rank, self.size = self._members[node].start + index, sum(sizes)
        self._here = self._members[node]
        assert (between is not None) == (index == 0)
        assert (local is not None) == (len(self._here) > 1)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        host = x.contiguous().cpu()
        with torch.profiler.record_function("all_reduce"):
            self._sum_here(host)
            if self._between is not None:
                host = self._between.sum(host)
            if self._local is not None:
                self._local.broadcast(host.data_ptr(), host.nbytes, 0)
        return host.to(x.device)

    def sum_rows(self, x: torch.Tensor, wanted: Sequence[range]) -> torch.Tensor:
        if not len(x):
            return x
        host = x.contiguous().cpu()
        spans = [_span(wanted[members.start : members.stop]) for members in self._members]
        own, span = wanted[self.rank], spans[self._node]
        with torch.profiler.record_function("reduce_scatter"):
            self._sum_here(host)
            result = host[:0]
            if self._between is not None:
                parts = [host[rows.start : rows.stop] for rows in spans]
                result = added(self._between.exchange(parts, [len(span)] * len(spans)))
            inside = range(own.start - span.start, own.stop - span.start) if len(own) else range(0)
            return self._hand_out(result, len(span), inside, host).to(x.device)

    def gather_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        host, places = x.contiguous().cpu(), row_ranges(counts)
        result = torch.empty((sum(counts), *host.shape[1:]), dtype=host.dtype)
        if not len(result):
            return result.to(x.device)
        spans = [range(places[members.start].start, places[members.stop - 1].stop) for members in self._members]
        span, row = spans[self._node], host.itemsize * host.shape[1:].numel()
        with torch.profiler.record_function("gather"):
            own = result[span.start : span.stop]
            if self._local is None:
                own.copy_(host)
            else:
                sizes = [counts[rank] * row for rank in self._here]
                self._local.gather(host.data_ptr(), sizes, self._index, None, own.data_ptr())
            if self._between is not None:
                for rows, part in zip(spans, self._between.gather(own, list(map(len, spans))), strict=True):
                    if rows is not span:
                        result[rows.start : rows.stop] = part
            if self._local is not None:
                for rows in (range(span.start), range(span.stop, len(result))):
                    self._local.broadcast(result.data_ptr() + rows.start * row, len(rows) * row, 0)
        return result.to(x.device)

    def exchange_rows(self, x: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        host, here = x.contiguous().cpu(), self._here
        with torch.profiler.record_function("all_to_all"):
            arrived = self._exchange_here(host, counts)
            crossing = [
                [sum(counts[a][b] for a in sources for b in to) for to in self._members] for sources in self._members
            ]
            if not any(n for a, row in enumerate(crossing) for b, n in enumerate(row) if a != b):
                return arrived.to(x.device)
            incoming = sum(row[self._node] for node, row in enumerate(crossing) if node != self._node)
            rows = self._rows_of_this_node(host, counts)
            delivered = host[:0]
            if self._between is not None:
                parts = [self._for_node(rows, counts, to) for to in self._members]
                found = self._between.exchange(parts, [row[self._node] for row in crossing])
                delivered = self._by_receiver(found, counts)
            far = [sum(counts[a][b] for a in range(self.size) if a not in here) for b in here]
            mine = self._hand_out(delivered, incoming, row_ranges(far)[self._index], host)
        before = sum(counts[a][self.rank] for a in range(here.start))
        return torch.cat([mine[:before], arrived, mine[before:]]).to(x.device)

    def join_columns(self, x: torch.Tensor, total: int, wanted: range | None) -> torch.Tensor | None:
        host, own = x.contiguous().cpu(), range(0) if wanted is None else wanted
        widths = [len(topology.share(total, rank, self.size)) for rank in range(self.size)]
        span = self._wanted_here(own)
        flat = self._collect_here(host.view(-1), [len(x) * widths[rank] for rank in self._here])
        joined = torch.empty((0, total), dtype=host.dtype)
        like = joined
        if self._between is not None:
            # Who wants what is asked first: it is little, and logits are much.
            asked = torch.tensor([[span.start, span.stop]])
            spans = [range(*rows[0].tolist()) for rows in self._between.gather(asked, [1] * len(self._members))]
            parts = torch.split(flat, [len(x) * widths[rank] for rank in self._here])
            columns = side_by_side(parts, [widths[rank] for rank in self._here])
            of_nodes = [sum(widths[rank] for rank in members) for members in self._members]
            found = self._between.exchange(
                [columns[rows.start : rows.stop].reshape(-1) for rows in spans], [len(span) * n for n in of_nodes]
            )
            joined = side_by_side(found, of_nodes)
        inside = range(own.start - span.start, own.stop - span.start) if len(own) else range(0)
        mine = self._hand_out(joined, len(span), inside, like)
        return None if wanted is None else mine.to(x.device)

    # Inside the node.

    def _sum_here(self, host: torch.Tensor) -> None:
        """The node's sum, at its first rank; elsewhere `host` stays as it was."""
        if self._local is not None:
            wanted = (0, host.nbytes if self._index == 0 else 0)
            self._local.reduce_scatter(host.data_ptr(), host.nbytes, wanted, DTYPES[host.dtype])

    def _wanted_here(self, own: range) -> range:
        """The least run in which all rows lie that ranks of this node want."""
        if self._local is None:
            return own
        asked, everybody = torch.tensor([own.start, own.stop]), torch.empty((len(self._here), 2), dtype=torch.int64)
        self._local.gather(asked.data_ptr(), [asked.nbytes] * len(self._here), self._index, None, everybody.data_ptr())
        return _span([range(*rows) for rows in everybody.tolist()])

    def _hand_out(self, x: torch.Tensor, rows: int, own: range, like: torch.Tensor) -> torch.Tensor:
        """To each rank its `own` ones of the `rows` that the first has; elsewhere `x` may be anything."""
        if self._local is None:
            return x[own.start : own.stop]
        result = torch.empty((len(own), *like.shape[1:]), dtype=like.dtype)
        row = like.itemsize * like.shape[1:].numel()
        others = len(self._here) - 1
        self._local.exchange(
            "gather",
            x.contiguous().data_ptr(),
            [rows * row] + [0] * others,
            self._index,
            [(own.start * row, own.stop * row)] + [(0, 0)] * others,
            result.data_ptr(),
        )
        return result

    def _collect_here(self, host: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The rows of all ranks of the node, at the first one; elsewhere nothing."""
        if self._local is None:
            return host
        first = self._index == 0
        result = torch.empty((sum(counts) if first else 0, *host.shape[1:]), dtype=host.dtype)
        row = host.itemsize * host.shape[1:].numel()
        sizes = [count * row for count in counts]
        self._local.gather(host.data_ptr(), sizes, self._index, 0, result.data_ptr() if first else None)
        return result

    def _exchange_here(self, host: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rows from ranks of this node for this rank."""
        firsts = [sum(counts[a][: self.rank]) for a in self._here]
        wanted = [range(first, first + counts[a][self.rank]) for first, a in zip(firsts, self._here, strict=True)]
        if self._local is None:
            return host[wanted[0].start : wanted[0].stop]
        result = torch.empty((sum(map(len, wanted)), *host.shape[1:]), dtype=host.dtype)
        row = host.itemsize * host.shape[1:].numel()
        self._local.exchange(
            "all_to_all",
            host.data_ptr(),
            [sum(counts[a]) * row for a in self._here],
            self._index,
            [(rows.start * row, rows.stop * row) for rows in wanted],
            result.data_ptr(),
        )
        return result

    # At the first rank of a node.

    def _rows_of_this_node(self, host: torch.Tensor, counts: Sequence[Sequence[int]]) -> torch.Tensor:
        """What its ranks have for other nodes: by source, then by receiver."""
        here = self._here
        before, after = sum(counts[self.rank][: here.start]), sum(counts[self.rank][: here.stop])
        leaving = torch.cat([host[:before], host[after:]])
        return self._collect_here(leaving, [sum(counts[a]) - sum(counts[a][b] for b in here) for a in here])

    def _for_node(self, rows: torch.Tensor, counts: Sequence[Sequence[int]], to: range) -> torch.Tensor:
        """Of `_rows_of_this_node` those for the ranks `to`."""
        if to == self._here:
            return rows[:0]
        parts, at = [], 0
        for a in self._here:
            leaving = [b for b in range(self.size) if b not in self._here]
            first = at + sum(counts[a][b] for b in leaving if b < to.start)
            parts.append(rows[first : first + sum(counts[a][b] for b in to)])
            at += sum(counts[a][b] for b in leaving)
        return torch.cat(parts)

    def _by_receiver(self, found: Sequence[torch.Tensor], counts: Sequence[Sequence[int]]) -> torch.Tensor:
        """What has come from each node, by source and receiver -> by receiver and source."""
        pieces: dict[tuple[int, int], torch.Tensor] = {}
        for members, part in zip(self._members, found, strict=True):
            if members == self._here:
                continue
            pairs = list(itertools.product(members, self._here))
            for (a, b), piece in zip(pairs, torch.split(part, [counts[a][b] for a, b in pairs]), strict=True):
                pieces[b, a] = piece
        return torch.cat([pieces[key] for key in sorted(pieces)])


def side_by_side(parts: Sequence[torch.Tensor], widths: Sequence[int]) -> torch.Tensor:
    """[rows * width] each -> [rows, sum of the widths]"""
    return torch.cat([part.view(-1, width) for part, width in zip(parts, widths, strict=True)], dim=1)


def _span(parts: Sequence[range]) -> range:
    """The least run in which all parts lie."""
    known = [part for part in parts if len(part)]
    return range(min(part.start for part in known), max(part.stop for part in known)) if known else range(0)
