"""Measurements and the tables made of them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.workloads import Workload


@dataclass
class Cell:
    """One contender, one workload, one round. Microseconds where nothing else is said; -1: not measured."""

    contender: str
    workload: str
    cpu_saturated: float = -1.0
    """Router CPU per request, or per chunk when streaming."""
    cpu_paced: float = -1.0
    per_second: float = -1.0
    """Requests or chunks, saturated."""
    p50: float = -1.0
    p99: float = -1.0
    latency: dict[str, float] = field(default_factory=dict)
    first_byte_p99: float = -1.0
    transit_p50: float = -1.0
    transit_p99: float = -1.0
    resident_mb: float = -1.0
    failed: int = 0
    disturbed: bool = False


def median(cells: list[Cell], pick: Callable[[Cell], float]) -> tuple[float, float]:
    """(median, half the span in percent of it); (-1, 0) when it was not measured."""
    values = [pick(cell) for cell in cells if pick(cell) >= 0]
    if not values:
        return -1.0, 0.0
    middle = statistics.median(values)
    return middle, (max(values) - min(values)) / 2 / middle * 100 if middle else 0.0


def report(workload: Workload, cells: list[Cell], names: list[str]) -> None:
    """A table of medians, and ratios to ours."""
    unit = "chunk" if workload.streams else "req"
    columns: list[tuple[str, Callable[[Cell], float]]] = [
        (f"CPU us/{unit} saturated", lambda cell: cell.cpu_saturated),
        (f"CPU us/{unit} paced", lambda cell: cell.cpu_paced),
        (f"{unit}/s", lambda cell: cell.per_second),
        ("p50 us", lambda cell: cell.p50),
        ("p99 us", lambda cell: cell.p99),
    ]
    columns += [(f"{label} us", _latency(label)) for label in sorted({key for cell in cells for key in cell.latency})]
    columns += [
        ("transit p50 us", lambda cell: cell.transit_p50),
        ("transit p99 us", lambda cell: cell.transit_p99),
        ("first byte p99 us", lambda cell: cell.first_byte_p99),
        ("PSS MB", lambda cell: cell.resident_mb),
    ]
    columns = [(label, pick) for label, pick in columns if any(pick(cell) >= 0 for cell in cells)]
    print(f"\n### {workload.name} (policy {workload.policy})\n")
    print("| | " + " | ".join(label for label, _ in columns) + " | failed |")
    print("|" + "---|" * (len(columns) + 2))
    for name in names:
        own = [cell for cell in cells if cell.contender == name]
        texts = []
        for _, pick in columns:
            middle, spread = median(own, pick)
            texts.append("-" if middle < 0 else f"{middle:.3g}" if middle < 1000 else f"{middle:.0f}")
            if spread > 5:
                texts[-1] += f" ±{spread:.0f}%"
        mark = " (disturbed)" if any(cell.disturbed for cell in own) else ""
        print(f"| {name}{mark} | " + " | ".join(texts) + f" | {sum(cell.failed for cell in own)} |")
    ours = [cell for cell in cells if cell.contender == "warmroute"]
    for name in names:
        peer = [cell for cell in cells if cell.contender == name]
        if name == "warmroute" or not ours or not peer:
            continue
        ratios = []
        for label, pick in columns[:2]:
            (mine, _), (theirs, _) = median(ours, pick), median(peer, pick)
            if mine > 0 and theirs > 0:
                ratios.append(f"{label} {mine / theirs:.2f}x")
        print(f"warmroute / {name}: {', '.join(ratios)}")


def _latency(label: str) -> Callable[[Cell], float]:
    return lambda cell: cell.latency.get(label, -1.0)
