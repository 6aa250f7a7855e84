"""How fast one core, and two at a time, read memory here: `python -m bench.memory_speed`.

A decode step of one sequence reads every weight once and does hardly anything else, so two ranks are faster than one by
what the second core adds to that. In a virtual machine it changes from second to second: the host moves its two cores
between groups that share a cache and a path to memory. On an AMD EPYC (Zen 4) the two together read 1.0 to 1.2 times
what one reads while they are in one group, and 1.6 to 2.0 times while they are in two (a line goes from one core to the
other and back in 90 ns or in 330).
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.synchronize import Barrier
    from types import TracebackType

MEGABYTES = 96
"""More than any cache holds; of two processes each reads half of it."""
TIMES = 5
SECONDS = 5


class Readers:
    """Two processes that read when they are told to."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(2)
        self._pipes, self._processes = [], []
        for _ in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_read, args=(barrier, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.send(0)
        for process in self._processes:
            process.join()

    def measure(self) -> tuple[float, float]:
        """GB/s of one process, and of two together, now: medians. Takes 30 to 50 ms."""
        return self._read_by(1), self._read_by(2)

    def _read_by(self, count: int) -> float:
        pipes = self._pipes[:count]
        for pipe in pipes:
            pipe.send(count)
        seconds: list[list[float]] = [pipe.recv() for pipe in pipes]
        slowest: list[float] = [max(together) for together in zip(*seconds, strict=True)]
        return MEGABYTES / 1e3 / statistics.median(slowest)


def _read(barrier: Barrier, pipe: Connection) -> None:
    import torch

    from warmroute_worker.layers.native import Matrix

    torch.set_num_threads(1)
    # As weights are read: a matrix of 2 MB each.
    matrices = [Matrix(torch.ones((1024, 512)), None) for _ in range(MEGABYTES // 2)]
    x = torch.ones((1, 512))
    pipe.send(None)
    while count := pipe.recv():
        times = []
        for _ in range(TIMES):
            if count > 1:
                barrier.wait()
            began = time.perf_counter()
            for matrix in matrices[: len(matrices) // count]:
                matrix(x)
            times.append(time.perf_counter() - began)
        pipe.send(times)


def main() -> None:
    ends = time.monotonic() + SECONDS
    found = []
    with Readers() as readers:
        while time.monotonic() < ends:
            found.append(readers.measure())
            time.sleep(0.1)
    one, two = (statistics.median(speeds) for speeds in zip(*found, strict=True))
    ratios = sorted(two / one for one, two in found)
    tenth = len(ratios) // 10
    print(f"one core reads {one:.0f} GB/s, two at a time {two:.0f} GB/s; in {SECONDS} seconds {len(found)} times:")
    print(f"two read {statistics.median(ratios):.2f}x what one reads ({ratios[tenth]:.2f} to {ratios[-tenth - 1]:.2f})")


if __name__ == "__main__":
    main()
