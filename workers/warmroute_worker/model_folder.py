"""Which folder `--model-path` means. Looks at the file system and the environment only; imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

DEMOS = {"demo": "demo_model", "demo-moe": "demo_moe_model"}
"""Embedded models. `demo` was trained for some minutes; `demo-moe` has experts, and draws its weights."""

WITHOUT_WEIGHTS = ("demo-moe",)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(model_path: str) -> Path:
    """The folder with config.json for `model_path`: one of `DEMOS`, a folder, or a hub id whose snapshot is on disk.

    Raises LookupError with one line that says what to pass instead. Nothing is ever downloaded.
    """
    if model_path in DEMOS:
        return _checked(Path(__file__).parent / DEMOS[model_path], f"the embedded model {model_path}")
    folder = Path(model_path).expanduser()
    if folder.exists():
        return _checked(folder, f"--model-path {model_path}")
    if not _HUB_ID.fullmatch(model_path):
        raise LookupError(f"--model-path {model_path}: there is no such folder")
    snapshot = _hub_snapshot(model_path)
    if snapshot is None:
        raise LookupError(
            f"--model-path {model_path}: there is no such folder, and as a hub id it is not in {_hub_cache()}; "
            f"download it first and pass the folder that holds its config.json"
        )
    return _checked(snapshot, f"--model-path {model_path}")


def _checked(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise LookupError(f"{name}: {folder} is not a folder")
    if not (folder / "config.json").is_file():
        raise LookupError(f"{name}: there is no config.json in {folder}")
    return folder


def _hub_cache() -> Path:
    """Where huggingface_hub keeps snapshots (its documented environment variables, in its order)."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface" / "hub"


def _hub_snapshot(hub_id: str) -> Path | None:
    repository = _hub_cache() / ("models--" + hub_id.replace("/", "--"))
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / revision
    return snapshot if snapshot.is_dir() else None
