"""CPU time of processes, to the nanosecond, from the scheduler's own accounts (Linux)."""

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


def cpu_ns(pid: int) -> int:
    """Time on a CPU of all threads that the process has now; 0 when it is gone."""
    total = 0
    try:
        tasks = list((PROC / str(pid) / "task").glob("*/schedstat"))
    except OSError:
        return 0
    for task in tasks:
        try:
            total += int(task.read_text().split()[0])
        except (OSError, IndexError):
            continue
    return total


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop()
        found.append(current)
        waiting += children.get(current, [])
    return found


def tree_cpu_ns(pid: int) -> int:
    return sum(cpu_ns(member) for member in tree(pid))


def resident_bytes(pid: int) -> int:
    """Proportional set size of the whole tree: shared pages are counted once."""
    total = 0
    for member in tree(pid):
        try:
            for line in (PROC / str(member) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


@dataclass(frozen=True)
class Snapshot:
    """What ran how long until now; the difference of two says who used the machine between them."""

    by_pid: dict[int, int]

    @classmethod
    def take(cls) -> "Snapshot":
        return cls({int(folder.name): cpu_ns(int(folder.name)) for folder in PROC.glob("[0-9]*")})

    def foreign_ns(self, earlier: "Snapshot", own: set[int]) -> int:
        """CPU time between the snapshots of processes that are not ours."""
        return sum(max(now - earlier.by_pid.get(pid, 0), 0) for pid, now in self.by_pid.items() if pid not in own)


def pin(pid: int, cpus: set[int]) -> None:
    """Pin every thread the process has; later ones inherit."""
    for task in (PROC / str(pid) / "task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cpus)
        except ProcessLookupError:
            continue
