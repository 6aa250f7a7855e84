"""What the launchers of one worker must have in common, and what is said when they have not. Imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from warmroute_worker.version import version

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from warmroute_worker.args import WorkerArgs

MAY_DIFFER = frozenset(
    {
        "model_path",  # the same files may stand elsewhere
        "served_model_name",
        "host",
        "port",
        "mem_fraction_static",  # the smallest pool of all counts
        "threads",
        "load_balance_method",
        "node_rank",
        "dist_init_addr",  # a name here, a number there
        "dist_timeout",
        "kv_events_config",
        "watchdog_timeout",
        "drain_timeout",
        "max_queued_requests",
        "log_level",
        "bucket_time_to_first_token",
        "bucket_inter_token_latency",
        "bucket_e2e_request_latency",
    }
)
"""Of the arguments: what concerns one node only, or only the first one, which serves HTTP."""


def described(args: WorkerArgs, folder: Path) -> dict[str, Any]:
    """What a node says of itself. `folder`: the model's."""
    flags = {name: value for name, value in dataclasses.asdict(args).items() if name not in MAY_DIFFER}
    return {"version": version(), "model": _digest(folder), "flags": flags}


def difference(node: int, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Why `node` cannot work with node 0, whose description is `ours`; None if it can."""
    if theirs.get("version") != ours["version"]:
        return f"node {node} runs version {theirs.get('version')}, node 0 version {ours['version']}"
    flags = theirs.get("flags")
    flags = flags if isinstance(flags, dict) else {}
    for name, value in ours["flags"].items():
        if name not in flags or flags[name] != value:
            flag = "--" + name.replace("_", "-")
            return f"node {node} was started with {flag} {_spelled(flags.get(name))}, node 0 with {_spelled(value)}"
    if theirs.get("model") != ours["model"]:
        return f"node {node} has another model than node 0: config.json or the sizes of its weight files differ"
    return None


def _spelled(value: object) -> str:
    if value is None:
        return "unset"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _digest(folder: Path) -> str:
    """Of config.json, and of names and sizes of the weight files: reading those would take minutes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
