"""`--plots FOLDER`: what the tables say, a picture for each workload. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from matplotlib.axes import Axes

    from bench.simulator.report import Row
    from bench.simulator.simulation import Answer, Outcome
    from bench.simulator.workload import Workload

_POINTS = 400


def draw(folder: Path, workload: Workload, runs: list[tuple[Row, Outcome]], limits: tuple[float, float]) -> Path:
    """The file that was written. Raises ImportError without matplotlib. `limits`: as of `report.reachable`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(f"{workload.name}: {workload.what}; KV {workload.engine.kv_tokens:,} tokens a target")
    (hits, first), (step, spread) = figure.subplots(2, 2)
    names = [row.router.removeprefix("preset:") for row, _ in runs]
    colours = [f"C{number}" for number in range(len(runs))]

    hits.barh(names, [row.hit_rate * 100 for row, _ in runs], color=colours)
    for limit, label in zip(limits, ("endless cache", "one cache as large as all"), strict=True):
        hits.axvline(limit * 100, color="black", linestyle="--" if label[0] == "e" else ":", label=label)
    hits.set(xlabel="cached prompt tokens, %", title="Hit rate", xlim=(0, 100))
    hits.invert_yaxis()
    hits.legend(loc="lower right", fontsize="small")

    for (_, outcome), name, colour in zip(runs, names, colours, strict=True):
        _distribution(first, (answer.first_token_seconds for answer in outcome.answers), name, colour)
        seconds = (answer.seconds_per_token for answer in outcome.answers)
        _distribution(step, (one for one in seconds if not math.isnan(one)), name, colour)
    first.set(xlabel="ms", ylabel="share of requests", title="Time to first token", xscale="log")
    step.set(xlabel="ms", ylabel="share of requests", title="Time per token after it", xscale="log")
    first.legend(fontsize="small")

    width = 0.8 / len(runs)
    for number, (_, outcome) in enumerate(runs):
        shares = _per_target(outcome.answers, workload.workers)
        places = [worker + number * width for worker in range(workload.workers)]
        spread.bar(places, shares, width, color=colours[number])
    spread.set(xlabel="worker", ylabel="prompt tokens to read", title="Load: uncached prompt tokens per worker")

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{workload.name}.png"
    figure.savefig(path, dpi=110)
    return path


def _distribution(axes: Axes, seconds: Iterable[float], name: str, colour: str) -> None:
    ordered = sorted(seconds)
    if not ordered:
        return
    picked = [int(share * (len(ordered) - 1) / _POINTS) for share in range(_POINTS + 1)]
    shares = [index / max(len(ordered) - 1, 1) for index in picked]
    axes.plot([max(ordered[index] * 1e3, 0.1) for index in picked], shares, label=name, color=colour)
    axes.grid(visible=True, alpha=0.3)


def _per_target(answers: list[Answer], workers: int) -> list[int]:
    totals = [0] * workers
    for answer in answers:
        totals[answer.worker] += answer.prompt_tokens - answer.cached_tokens
    return totals
