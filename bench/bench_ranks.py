"""What several ranks are worth: the same engine steps, without HTTP, by layout.

`python -m bench.bench_ranks [--hidden 512 --layers 8 --batch 1 8 --turns 40]`. The engines stand side by side and take
short turns, A B C, C B A. One rank is measured with one thread and with two and stands for its better one. `step by
step`: with `--num-continuous-decode-steps 1`.

With one sequence, no ratio can be far above that of the speeds at which two cores and one read memory, which is
measured before every turn (`bench.memory_speed` says why it changes).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.bench_engine import decode, write_config
from bench.memory_speed import Readers
from warmroute_worker import offline
from warmroute_worker.args import WorkerArgs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

SETTINGS: dict[str, dict[str, Any]] = {
    "1 rank, 1 thread": {"threads": 1},
    "1 rank, 2 threads": {"threads": 2},
    "tp 2": {"tp_size": 2, "threads": 1},
    "1 rank, step by step": {"threads": 1, "num_continuous_decode_steps": 1},
    "tp 2, step by step": {"tp_size": 2, "threads": 1, "num_continuous_decode_steps": 1},
    "tp 2 over gloo": {"tp_size": 2, "threads": 1, "disable_custom_all_reduce": True},
    "pp 2": {"pp_size": 2, "threads": 1},
}
PROMPT_TOKENS = 64


class Turn(NamedTuple):
    memory: float
    """Times what one core reads that two read."""
    seconds: dict[str, float]
    """Per decode step, by setting."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--checkpoint", default="float32", choices=["float32", "bfloat16"], help="its dtype")
    parser.add_argument("--new", type=int, default=64, help="tokens of a turn")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    options = parser.parse_args()
    found: dict[int, list[Turn]] = {batch: [] for batch in options.batch}
    with tempfile.TemporaryDirectory() as folder, Readers() as readers, contextlib.ExitStack() as stack:
        write_config(Path(folder), options)
        engines = {name: stack.enter_context(_engine(folder, SETTINGS[name])) for name in options.settings}
        for number in range(-1, options.turns):  # the first one is for warming up
            for batch, turns in found.items():
                one_core, two_cores = readers.measure()
                order = options.settings if number % 2 else options.settings[::-1]
                seconds = {name: engines[name](batch, options.new) for name in order}
                if number >= 0:
                    turns.append(Turn(two_cores / one_core, seconds))
    print(f"hidden {options.hidden}, {options.layers} layers, {options.checkpoint} checkpoint; {options.turns} turns")
    for batch, turns in found.items():
        memory = statistics.median(turn.memory for turn in turns)
        print(f"batch {batch}: two cores read {memory:.2f}x what one reads")
        _report(options.settings, turns)


def _report(settings: Sequence[str], turns: Sequence[Turn]) -> None:
    medians = {name: statistics.median(turn.seconds[name] for turn in turns) for name in settings}
    alone = [name for name in settings if name.startswith("1 rank")]
    better = min(alone, key=lambda name: medians[name], default=None)
    for name in settings:
        times = sorted(turn.seconds[name] * 1e3 for turn in turns)
        tenth = len(times) // 10
        line = f"  {name:18s} {medians[name] * 1e3:7.2f} ms/step ({times[tenth]:.2f} to {times[-tenth - 1]:.2f})"
        if better is not None:
            ratio = statistics.median(turn.seconds[better] / turn.seconds[name] for turn in turns)
            line += f"  {medians[better] / medians[name]:.2f}x one rank; within turns {ratio:.2f}x"
        print(line)


@contextlib.contextmanager
def _engine(folder: str, settings: dict[str, Any]) -> Iterator[Callable[[int, int], float]]:
    """Batch and tokens to seconds per decode step. In a process of its own, as torch's threads are set once in each."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # As the worker's supervisor sets it: threads that wait do so asleep.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    process = context.Process(target=_be_engine, args=(folder, settings, theirs))
    process.start()
    theirs.close()
    ours.recv()

    def take_turn(batch: int, new: int) -> float:
        ours.send((batch, new))
        seconds: float = ours.recv()
        return seconds

    try:
        yield take_turn
    finally:
        with contextlib.suppress(BrokenPipeError):  # it has failed
            ours.send(None)
        process.join()


def _be_engine(folder: str, settings: dict[str, Any], pipe: Connection) -> None:
    args = WorkerArgs(folder, "bench", load_format="dummy", device="cpu", max_total_tokens=1 << 15, **settings)
    with offline.ranks(args) as (engine, _):
        pipe.send(None)
        run = 0
        while order := pipe.recv():
            batch, new = order
            tokens, seconds, _ = decode(engine, batch, PROMPT_TOKENS, new, run)
            pipe.send(seconds / tokens * batch)
            run += 1


if __name__ == "__main__":
    main()
