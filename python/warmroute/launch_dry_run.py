"""What `launch_server --dry-run` prints: processes, rank maps and commands. Starts no worker and no router.

The rank map of a worker is what its own `--dry-run` prints, since only the worker knows it.
"""

import dataclasses
import shlex
import subprocess
from collections.abc import Sequence

from warmroute.command_line import Settings
from warmroute.worker_processes import WORKER_MODULE, WorkerFailed, WorkerProcesses


def describe(settings: Settings, workers: WorkerProcesses) -> list[str]:
    """Lines for the operator. Raises WorkerFailed when a worker refuses its flags; it has said why itself."""
    plan, config = workers.plan, settings.config
    where = f"http://{config.host}:{config.port}, metrics at http://{config.prometheus_host}:{config.prometheus_port}"
    lines = [f"{_several(plan.count, 'worker')} of {_several(plan.ranks, 'rank')}, and the router in front"]
    lines += plan.remarks()
    lines.append(f"router at {where}: policy {config.policy}, {_several(plan.count * plan.targets, 'target')}")
    if config.processes:
        lines.append(f"  this process, which watches the workers too, and {_several(config.processes, 'data process')}")
    else:
        lines.append("  this process, which watches the workers too")
    lines += ["  alone it would be", f"    {shlex.join(router_command(settings))}"]
    for index, url in enumerate(workers.urls):
        devices = f", CUDA devices {', '.join(plan.devices[index])}" if plan.devices[index] else ""
        words = [f"{name}={value}" for name, value in plan.environment(index).items()]
        words += ["python", "-m", WORKER_MODULE, *workers.flags(index)]
        lines += [f"worker {index} at {url}{devices}", f"  {shlex.join(words)}"]
        lines += [f"  {line}" for line in _own_words(workers, index)]
    return lines


def router_command(settings: Settings) -> list[str]:
    """The `launch_router` that would do the same, without defaults and secrets."""
    command = ["launch_router"]
    for field in dataclasses.fields(settings.config):
        value, name = getattr(settings.config, field.name), field.name.replace("_", "-")
        if settings.origins[field.name] == "default" or value == field.default:
            continue
        if isinstance(value, bool):
            command.append(f"--{name}" if value else f"--no-{name}")
        elif field.metadata["secret"]:
            command += [f"--{name}", "***"]
        else:
            command += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return command


def _own_words(workers: WorkerProcesses, index: int) -> Sequence[str]:
    """What the worker's own dry run prints."""
    ended = subprocess.run([*workers.command(index), "--dry-run"], stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0:
        raise WorkerFailed(f"worker {index} would not start", ended.returncode)
    return ended.stdout.splitlines()


def _several(number: int, noun: str) -> str:
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{ending}"
