"""What `launch_server` gives each worker: flags, a share of the cores, CUDA devices. Pure: nothing is started here."""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

VISIBLE_DEVICES: Final = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """Workers that differ in their ports and devices only."""

    flags: tuple[str, ...]
    """Without --host and --port."""
    ranks: int
    """Of each worker."""
    targets: int
    """Data-parallel ranks of each worker, which the router chooses among."""
    devices: tuple[tuple[str, ...], ...]
    """CUDA devices of each worker, as CUDA_VISIBLE_DEVICES names them; none: the worker is left with what there is."""

    @property
    def count(self) -> int:
        """How many workers."""
        return len(self.devices)

    def environment(self, index: int) -> dict[str, str]:
        """What worker `index` has beside our own environment."""
        return {VISIBLE_DEVICES: ",".join(self.devices[index])} if self.devices[index] else {}

    def remarks(self) -> list[str]:
        """Lines for the operator."""
        used = [device for own in self.devices for device in own]
        distinct, total = len(set(used)), self.count * self.ranks
        if 0 < distinct < total and len(used) > distinct:
            return [
                f"{total} ranks share {distinct} CUDA devices: say --mem-fraction-static, or the worker that starts "
                "first takes the memory that others need"
            ]
        return []


def plan_workers(
    model_path: str,
    dp_size: int,
    dp_attention: bool,
    rest: Sequence[str],
    cores: int,
    cuda_devices: Sequence[str] = (),
) -> WorkerPlan:
    """Without DP attention `dp_size` workers, with it one of `dp_size` ranks.

    `cores` are divided among the ranks of all workers, unless `rest` has `--threads`; devices are handed out rank by
    rank, so that no two workers have the same one while there are enough.
    """
    flags = ["--model-path", model_path, *rest]
    count = 1 if dp_attention else dp_size
    if dp_attention:
        flags += ["--dp-size", str(dp_size), "--enable-dp-attention"]
    ranks = _ranks_per_worker(rest)
    if _value(rest, "--threads") is None:
        flags += ["--threads", str(max(1, cores // (count * ranks)))]
    on_cuda = _value(rest, "--device") in (None, "auto", "cuda")
    devices = _hand_out(cuda_devices if on_cuda else (), count, ranks)
    return WorkerPlan(tuple(flags), ranks, dp_size if dp_attention else 1, devices)


def cuda_devices(environment: Mapping[str, str], device_files: Path = Path("/dev")) -> tuple[str, ...]:
    """The devices that workers may use, by the names CUDA_VISIBLE_DEVICES knows. Asks no driver: this process loads no
    CUDA. A machine's devices are /dev/nvidia0 and so on; CUDA counts those it can see from 0, whatever their files are
    called."""
    listed = environment.get(VISIBLE_DEVICES)
    if listed is not None:
        # CUDA itself takes no notice of what follows the first name that is no device.
        names = (name.strip() for name in listed.split(","))
        return tuple(itertools.takewhile(lambda name: name != "" and not name.startswith("-"), names))
    files = [path for path in device_files.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    return tuple(map(str, range(len(files))))


def nodes(rest: Sequence[str]) -> str:
    """What `--nnodes` says, unchecked."""
    return _value(rest, "--nnodes") or "1"


def _hand_out(devices: Sequence[str], count: int, ranks: int) -> tuple[tuple[str, ...], ...]:
    """The devices of each worker, none twice. With fewer devices than ranks it begins again with the first."""
    if not devices:
        return ((),) * count
    turns = itertools.cycle(devices)
    return tuple(tuple(dict.fromkeys(itertools.islice(turns, ranks))) for _ in range(count))


def _ranks_per_worker(flags: Sequence[str]) -> int:
    """What is no number is 1 here: the worker will refuse it, in its own words."""
    sizes = (
        _value(flags, "--tp-size", "--tp", "--tensor-parallel-size"),
        _value(flags, "--pp-size", "--pp", "--pipeline-parallel-size"),
    )
    return math.prod(max(1, int(size)) for size in sizes if size is not None and size.isdigit())


def _value(flags: Sequence[str], *names: str) -> str | None:
    """The value of a worker's flag: the last one given. "" if it has none; None if it is not there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*names, dest="value", nargs="?", const="")
    value = parser.parse_known_args(list(flags))[0].value
    return None if value is None else str(value)
