"""What every router begins with, however many processes it is: seeds, the core, complaints, a word in the log."""

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from warmroute._core import Core
from warmroute.command_line import Settings
from warmroute.config import RouterConfig, indexed_text_bytes
from warmroute.engine import build_core
from warmroute.listening import shown
from warmroute.process import CannotStart

log = logging.getLogger(__name__)


def with_seeds(settings: Settings) -> Settings:
    """With seeds where nobody gave any. 63 bits, so that they survive a JSON reader with signed integers."""
    unset = [name for name in ("seed", "hash_seed") if getattr(settings.config, name) is None]
    return settings.with_drawn(**{name: int.from_bytes(os.urandom(8), "big") >> 1 for name in unset})


def new_core(settings: Settings, processes: int = 1) -> Core:
    """Of process 0 of a region of its own, or of that in the file. Raises CannotStart."""
    config = settings.config
    drawn = settings.origins["hash_seed"] == "drawn at start"
    try:
        core = build_core(config, any_hash_seed=drawn, processes=processes)
    except OSError as error:
        reason = error.strerror or error
        raise CannotStart(f"cannot use {config.region_file}: {reason} (--region-file)") from None
    if core.region_found == "kept":
        log.info("%s: goes on with what the last router knew", config.region_file)
    elif core.region_found not in (None, "new"):
        log.warning("%s: begins empty: %s", config.region_file, core.region_found)
    return core


def check_files(config: RouterConfig) -> None:
    """That what is written for the user can be. Raises CannotStart."""
    for path, flag in ((config.record_decisions, "--record-decisions"), (config.access_log, "--access-log")):
        if path in (None, "-"):
            continue
        try:
            with Path(path).open("a"):
                pass
        except OSError as error:
            raise CannotStart(f"cannot write {path}: {error.strerror or error} ({flag})") from None


def log_start(config: RouterConfig, sockets: Sequence[socket.socket], processes: int) -> None:
    workers = ", ".join(config.worker_urls) or "none yet (POST /workers)"
    served = f"; {processes} processes" if processes > 1 else ""
    log.info("listening on %s; policy %s; workers: %s%s", shown(sockets), config.policy, workers, served)
    log.info("metrics on http://%s:%d/metrics", config.prometheus_host, config.prometheus_port)
    log.info(
        "prefix index: %.0f MiB know about %d MB of distinct prompts; at most %d characters are credited to one worker",
        config.index_memory / (1 << 20),
        indexed_text_bytes(config.index_memory) // 1_000_000,
        config.max_tree_size,
    )
