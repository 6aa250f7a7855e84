"""Which expert should stand in which slot, so that ranks have as much to do as each other. Pure.

Experts with much to do get copies first; then copies are put into ranks, the heaviest first, each where there is least.
(The two steps of DeepSeek's expert-parallel load balancer, arXiv 2412.19437, section 3.4.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


LITTLE = 0.02
"""Of a rank's even share."""


def balancedness(rows: Sequence[float]) -> float:
    """Mean over maximum of what ranks have to do: 1 if all have as much; of nothing, 1."""
    most = max(rows)
    return sum(rows) / len(rows) / most if most else 1.0


def expected(loads: Sequence[float], slots: Sequence[range], placed: Sequence[int]) -> float:
    """The balancedness of `loads` with experts placed like that, if copies get equal shares."""
    copies = [placed.count(expert) for expert in range(len(loads))]
    return balancedness([sum(loads[placed[slot]] / copies[placed[slot]] for slot in own) for own in slots])


def place(loads: Sequence[float], slots: Sequence[range], now: Sequence[int]) -> list[int]:
    """The expert of each slot.

    `loads`: rows of each expert. `slots`: of each rank. `now`: the expert of each slot; where it makes little
    difference an expert stays on its rank, and there in its slot.
    """
    copies = _copies(loads, sum(map(len, slots)), len(slots))
    share = [load / number for load, number in zip(loads, copies, strict=True)]
    of_rank: list[list[int]] = [[] for _ in slots]
    busy = [0.0] * len(slots)
    little = LITTLE * sum(loads) / len(slots)
    pieces = sorted((expert for expert, number in enumerate(copies) for _ in range(number)), key=lambda e: -share[e])
    for expert in pieces:
        free = [rank for rank, own in enumerate(slots) if len(of_rank[rank]) < len(own)]

        least = min(busy[rank] for rank in free)

        # Two copies on one rank would be worth one; and where it is already, it need not be sent.
        def order(rank: int, expert: int = expert, least: float = least) -> tuple[bool, bool, float]:
            is_here = expert in [now[slot] for slot in slots[rank]] and busy[rank] <= least + little
            return expert in of_rank[rank], not is_here, busy[rank]

        chosen = min(free, key=order)
        of_rank[chosen].append(expert)
        busy[chosen] += share[expert]
    placed = list(now)
    for own, experts in zip(slots, of_rank, strict=True):
        coming = list(experts)
        leaving = []
        for slot in own:
            if now[slot] in coming:
                coming.remove(now[slot])
            else:
                leaving.append(slot)
        for slot, expert in zip(leaving, coming, strict=True):
            placed[slot] = expert
    return placed


def _copies(loads: Sequence[float], num_slots: int, num_ranks: int) -> list[int]:
    """How often each expert is there: once, and again as long as there are slots, for whose copies have most to do."""
    copies = [1] * len(loads)
    for _ in range(num_slots - len(loads)):
        candidates = [expert for expert, number in enumerate(copies) if number < num_ranks] or range(len(copies))
        copies[max(candidates, key=lambda expert: loads[expert] / copies[expert])] += 1
    return copies


def moves(slots: Sequence[range], now: Sequence[int], then: Sequence[int]) -> list[list[list[int]]]:
    """Which experts' weights go from whom to whom: [source][destination] a list without repetitions. Those that a rank
    has already it takes from itself."""
    ranks = range(len(slots))
    has = [[now[slot] for slot in own] for own in slots]
    sent: list[list[list[int]]] = [[[] for _ in ranks] for _ in ranks]
    for destination, own in enumerate(slots):
        for expert in dict.fromkeys(then[slot] for slot in own):
            if expert not in has[destination]:
                holders = [rank for rank in ranks if expert in has[rank]]
                # In turn, so that one popular expert's rank does not send all copies.
                sent[holders[destination % len(holders)]][destination].append(expert)
    return sent
