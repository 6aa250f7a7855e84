"""Which version of the package this is."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    try:
        return importlib.metadata.version("warmroute-worker")
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        return "unknown"
