"""How much memory there is, and how large a KV pool it makes."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path

import torch

from warmroute_worker.startup_error import StartupError

DEFAULT_FRACTION = {"cpu": 0.5, "cuda": 0.88}
"""Of the memory that is free when the worker starts. On CPU others live there too, a second worker for one."""

DEFAULT_CPU_POOL_BYTES = 1 << 30
"""Cap of a pool on CPU whose size nobody asked for: nothing on a CPU is served fast enough to fill more."""

USEFUL_TOKENS = 1024
"""A pool that is derived from memory and holds less is refused (or the context length, where that is smaller)."""


class NotEnoughMemoryError(StartupError):
    """Weights and the least useful KV pool do not fit; the message is one line for the user."""


def available_bytes(device: torch.device) -> int:
    """What this process may still allocate on the device; on Linux hosts the tighter of host and cgroup."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    candidates = [_meminfo_available(), *_cgroup_rooms()]
    return min(room for room in candidates if room is not None)


def sharers(device: torch.device, num_ranks: int) -> int:
    """How many of the worker's ranks live off the memory of `device`."""
    return num_ranks if device.type == "cpu" else -(-num_ranks // torch.cuda.device_count())


def pool_pages(
    *,
    available: int,
    weight_bytes: int,
    page_bytes: int,
    page_size: int,
    context_length: int,
    device_type: str,
    mem_fraction_static: float | None,
    max_total_tokens: int | None,
) -> int:
    """Pages of the KV pool. `available` is counted before the weights were loaded.

    Raises NotEnoughMemoryError with one line that says which flag helps.
    """
    fraction = DEFAULT_FRACTION[device_type] if mem_fraction_static is None else mem_fraction_static
    budget = int(available * fraction) - weight_bytes
    pages = max(budget, 0) // page_bytes
    if max_total_tokens is not None:
        wanted = max_total_tokens // page_size
        needed = f"--max-total-tokens {max_total_tokens} needs {_mib(wanted * page_bytes)}"
    else:
        wanted = -(-min(USEFUL_TOKENS, context_length) // page_size)
        needed = f"a KV pool of {wanted * page_size} tokens needs {_mib(wanted * page_bytes)}"
    if pages < wanted:
        raise NotEnoughMemoryError(
            f"not enough memory: {_mib(available)} available x mem-fraction-static {fraction} - weights "
            f"{_mib(weight_bytes)} leaves {_mib(max(budget, 0))}, but {needed}; raise --mem-fraction-static, lower "
            "--max-total-tokens, or divide the model among more ranks (--tp-size, --pp-size)"
        )
    if max_total_tokens is not None:
        return wanted
    if device_type == "cpu" and mem_fraction_static is None:
        two_contexts = -(-2 * context_length // page_size)
        return min(pages, max(DEFAULT_CPU_POOL_BYTES // page_bytes, two_contexts))
    return pages


def _meminfo_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_rooms() -> list[int]:
    """Limit minus use of this process's cgroup and of those above it, as far as they are visible and have a limit."""
    rooms = []
    root = Path("/sys/fs/cgroup")
    for limit_name, used_name, group in _cgroups(root):
        try:
            limit, used = (group / limit_name).read_text().strip(), (group / used_name).read_text().strip()
            cache = _reclaimable(group / "memory.stat")
        except OSError:
            continue
        # v1 writes a number near 2^63 for "no limit", which no minimum ever picks.
        if limit != "max":
            rooms.append(max(int(limit) - int(used) + cache, 0))
    return rooms


def _cgroups(root: Path) -> list[tuple[str, str, Path]]:
    groups: list[tuple[str, str, Path]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, base = ("memory.max", "memory.current"), root
        elif "memory" in controllers.split(","):
            names, base = ("memory.limit_in_bytes", "memory.usage_in_bytes"), root / "memory"
        else:
            continue
        # Inside a container the path may be the host's and absent here; then the mount itself is the container's group.
        below = base / path.lstrip("/")
        groups += [(*names, group) for group in (below, *below.parents) if group.is_relative_to(base)]
    return groups


def _reclaimable(stat: Path) -> int:
    """File cache that counts as used but makes room when it is needed."""
    fields = dict(line.split() for line in stat.read_text().splitlines())
    return int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def give_back() -> None:
    """To the system: what loading needed and nobody has any more. The C library keeps it otherwise, 60 MB beside a
    rank's 68 MB of weights."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
