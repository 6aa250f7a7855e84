"""How fast one core, and two at a time, read memory here: `python -m bench.memory_speed`.

A decode step of one sequence reads every weight once and does hardly anything else, so two ranks are faster than one by
what the second core adds to that. In a virtual machine that can be nothing, and change from minute to minute: its two
cores may be one core's two threads.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Barrier

MEGABYTES = 96
"""More than any cache holds; two processes read half of it each."""
ROUNDS = 40


def measure() -> tuple[float, float]:
    """GB/s of one process, and of two together: medians."""
    return _read_by(1), _read_by(2)


def _read_by(count: int) -> float:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    pipes, processes = [], []
    for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=_read, args=(MEGABYTES // count, barrier, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    seconds: list[list[float]] = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    slowest: list[float] = [max(together) for together in zip(*seconds, strict=True)]
    return MEGABYTES / 1e3 / statistics.median(slowest)


def _read(megabytes: int, barrier: Barrier, pipe: Connection) -> None:
    import torch

    from warmroute_worker.layers.native import Matrix

    torch.set_num_threads(1)
    # As weights are read: a matrix of 2 MB each.
    matrices = [Matrix(torch.ones((1024, 512)), None) for _ in range(megabytes // 2)]
    x = torch.ones((1, 512))
    times = []
    for _ in range(ROUNDS):
        barrier.wait()
        began = time.perf_counter()
        for matrix in matrices:
            matrix(x)
        times.append(time.perf_counter() - began)
    pipe.send(times)


def main() -> None:
    one, two = measure()
    print(f"one core reads {one:.0f} GB/s, two at a time {two:.0f} GB/s: {two / one:.2f}x")


if __name__ == "__main__":
    main()
