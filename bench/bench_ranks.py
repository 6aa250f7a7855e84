"""What several ranks are worth: the same engine steps, without HTTP, by layout. In turn A B C, C B A; medians.

`python -m bench.bench_ranks [--hidden 512 --layers 8 --batch 1 8 --rounds 4]`. One rank is measured with one thread and
with two and stands for its better one. How fast memory is read by one core and by two is printed before and after: with
one sequence, no ratio can be above theirs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import memory_speed
from bench.bench_engine import decode, write_config
from warmroute_worker import offline
from warmroute_worker.args import WorkerArgs

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

SETTINGS: dict[str, dict[str, Any]] = {
    "1 rank, 1 thread": {"threads": 1},
    "1 rank, 2 threads": {"threads": 2},
    "tp 2": {"tp_size": 2, "threads": 1},
    "tp 2 over gloo": {"tp_size": 2, "threads": 1, "disable_custom_all_reduce": True},
    "pp 2": {"pp_size": 2, "threads": 1},
}
PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--checkpoint", default="float32", choices=["float32", "bfloat16"], help="its dtype")
    parser.add_argument("--new", type=int, default=96, help="tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), options)
        print_memory_speed()
        for round_ in range(options.rounds):
            order = options.settings if round_ % 2 == 0 else options.settings[::-1]
            for name in order:
                for batch, seconds in in_a_process(folder, SETTINGS[name], options.batch, options.new).items():
                    found.setdefault((name, batch), []).append(seconds)
    print_memory_speed()
    print(
        f"hidden {options.hidden}, {options.layers} layers, float32; medians of {options.rounds} rounds, best of 3 each"
    )
    for batch in options.batch:
        one_rank = [
            statistics.median(times) for (name, size), times in found.items() if name[0] == "1" and size == batch
        ]
        for name in options.settings:
            times = found[name, batch]
            median = statistics.median(times)
            ratio = f"{min(one_rank) / median:5.2f}x one rank" if one_rank else ""
            spread = f"{min(times) * 1e3:.2f} to {max(times) * 1e3:.2f}"
            speed = f"{median * 1e3:7.2f} ms/step ({spread}) {batch / median:6.0f} tok/s"
            print(f"batch {batch:<3d} {name:18s} {speed} {ratio}")


def print_memory_speed() -> None:
    one, two = memory_speed.measure()
    print(f"memory: one core {one:.0f} GB/s, two at a time {two:.0f} GB/s, {two / one:.2f}x", flush=True)


def in_a_process(folder: str, settings: dict[str, Any], batches: list[int], new: int) -> dict[int, float]:
    """Seconds per decode step, by batch: torch's threads are set once per process, so each measurement has its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # As the worker's supervisor sets it: threads that wait do so asleep.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    process = context.Process(target=_measure, args=(folder, settings, batches, new, theirs))
    process.start()
    theirs.close()
    result: dict[int, float] = ours.recv()
    process.join()
    return result


def _measure(folder: str, settings: dict[str, Any], batches: list[int], new: int, pipe: Connection) -> None:
    args = WorkerArgs(folder, "bench", load_format="dummy", device="cpu", max_total_tokens=1 << 15, **settings)
    with offline.ranks(args) as (engine, _):
        best = {}
        for batch in batches:
            runs = [decode(engine, batch, PROMPT_TOKENS, new, run) for run in range(3)]
            best[batch] = min(seconds / tokens * batch for tokens, seconds, _ in runs)
        pipe.send(best)


if __name__ == "__main__":
    main()
