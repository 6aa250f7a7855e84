"""Composition root: what a router process is made of, its life from the first socket to the last request.

`run_control` and `run_data_plane` know nothing of each other but the core, the directory and `control_upstream`; here
both run in one process.
"""

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import monotonic_ns
from typing import Any

import uvloop

from warmroute._core import Core
from warmroute.command_line import Settings
from warmroute.config import RouterConfig, indexed_text_bytes
from warmroute.control.check import check_workers
from warmroute.control.control_plane import ControlPlane
from warmroute.dataplane import DataPlane
from warmroute.directory import Directory
from warmroute.http_counts import HttpCounts

log = logging.getLogger(__name__)

# Deep enough for a burst of clients that all connect at once; the kernel caps it at net.core.somaxconn.
LISTEN_BACKLOG = 4096
# Two connections per request; the usual soft limit of 1,024 would be reached by 500 clients.
WANTED_OPEN_FILES = 1 << 20

_LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


class CannotStart(Exception):  # noqa: N818
    """One line for the user: what cannot be had, and what to do."""


def run(settings: Settings) -> int:
    """A whole router, until it is told to stop; the exit status of the process."""
    prepare_process(settings.config)
    try:
        return uvloop.run(serve(settings))
    except CannotStart as error:
        print(f"launch_router: error: {error}", file=sys.stderr)
        return 1


def check(config: RouterConfig) -> int:
    """Say what a start would find; the exit status."""
    print("launch_router: the configuration is valid")
    found = uvloop.run(check_workers(config))
    for _, line in found:
        print(f"launch_router: {line}")
    if not found:
        print("launch_router: no workers to start with; they join by POST /workers")
    return 0 if all(usable for usable, _ in found) else 1


def prepare_process(config: RouterConfig) -> None:
    """What is the process's, not the router's: its log and its limits."""
    _set_up_log(config.log_level)
    _raise_open_files_limit()


async def serve(settings: Settings) -> int:
    """Start, answer until SIGTERM or SIGINT, finish what runs. Raises CannotStart."""
    settings = settings.with_drawn(**_drawn_seeds(settings.config))
    config = settings.config
    core = _core_of(settings)
    directory, counts = Directory(), HttpCounts()
    if config.record_decisions:
        _check_writable(config.record_decisions)
    sockets = listening_sockets(config.host, config.port)
    try:
        control = await run_control(settings, core, directory, counts)
    except OSError as error:
        where = f"{config.prometheus_host}:{config.prometheus_port}"
        raise CannotStart(f"cannot serve metrics on {where}: {error.strerror or error} (--prometheus-port)") from None
    data_plane = await run_data_plane(config, core, directory, sockets, control.control_upstream, counts)
    _log_start(config, sockets)
    try:
        return await _until_stopped(data_plane, config.shutdown_grace_period_secs)
    finally:
        data_plane.close()
        await control.close()


async def run_control(settings: Settings, core: Core, directory: Directory, counts: HttpCounts) -> ControlPlane:
    """Registration, probing, the control app, metrics. Raises OSError when the metrics port cannot be had."""
    control = ControlPlane(settings, core, directory, counts)
    try:
        await control.start()
    except BaseException:
        await control.close()
        raise
    return control


async def run_data_plane(
    config: RouterConfig,
    core: Core,
    directory: Directory,
    sockets: Sequence[socket.socket],
    control_upstream: Callable[[], Awaitable[socket.socket]],
    counts: HttpCounts,
) -> "RunningDataPlane":
    """Answer on `sockets`, which listen already."""
    plane = DataPlane(config, core, directory, control_upstream, counts)
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(plane.protocol_factory, sock=one, backlog=LISTEN_BACKLOG) for one in sockets]
    return RunningDataPlane(plane, servers)


class RunningDataPlane:
    """A data plane and the servers that feed it."""

    def __init__(self, plane: DataPlane, servers: Sequence[asyncio.Server]) -> None:
        self._plane = plane
        self._servers = servers

    @property
    def active_requests(self) -> int:
        return self._plane.active_requests

    async def drain(self, timeout_seconds: float) -> None:
        """Accept nobody any more, let running requests finish."""
        for server in self._servers:
            server.close()
        await self._plane.drain(timeout_seconds)

    def close(self) -> None:
        """Cut what is left."""
        for server in self._servers:
            server.close()
        self._plane.close()


def build_core(config: RouterConfig, any_hash_seed: bool = False) -> Core:
    """`config.seed` and `config.hash_seed` must be known. `any_hash_seed`: a region in a file keeps its own.

    Raises OSError when the region's file cannot be used.
    """
    assert config.seed is not None
    assert config.hash_seed is not None
    return Core(
        region_file=config.region_file,
        policy=config.policy,
        shadow_policy=config.shadow_policy,
        cache_threshold=config.cache_threshold,
        balance_abs_threshold=config.balance_abs_threshold,
        balance_rel_threshold=config.balance_rel_threshold,
        assignment_mode=config.assignment_mode,
        max_idle_ns=int(config.max_idle_secs * 1e9),
        max_tree_size=config.max_tree_size,
        eviction_interval_ns=int(config.eviction_interval_secs * 1e9),
        index_memory_bytes=config.index_memory,
        hash_seed=config.hash_seed,
        any_hash_seed=any_hash_seed,
        seed=config.seed,
        strict_model=config.strict_model,
        health_failure_threshold=config.health_failure_threshold,
        health_success_threshold=config.health_success_threshold,
        breaker_enabled=not config.disable_circuit_breaker,
        breaker_failure_threshold=config.cb_failure_threshold,
        breaker_success_threshold=config.cb_success_threshold,
        breaker_timeout_ns=int(config.cb_timeout_duration_secs * 1e9),
        breaker_window_ns=int(config.cb_window_duration_secs * 1e9),
        duration_buckets_ns=[int(seconds * 1e9) for seconds in config.prometheus_duration_buckets],
    )


def _core_of(settings: Settings) -> Core:
    """Raises CannotStart."""
    config = settings.config
    try:
        core = build_core(config, any_hash_seed=settings.origins["hash_seed"] == "drawn at start")
    except OSError as error:
        reason = error.strerror or error
        raise CannotStart(f"cannot use {config.region_file}: {reason} (--region-file)") from None
    if core.region_found == "kept":
        log.info("%s: goes on with what the last router knew", config.region_file)
    elif core.region_found not in (None, "new"):
        log.warning("%s: begins empty: %s", config.region_file, core.region_found)
    return core


def _check_writable(path: str) -> None:
    try:
        with Path(path).open("a"):
            pass
    except OSError as error:
        raise CannotStart(f"cannot write {path}: {error.strerror or error} (--record-decisions)") from None


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """One per address that the host stands for. Raises CannotStart."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise CannotStart(f"cannot listen on {host}: {getattr(error, 'strerror', None) or error} (--host)") from None
    sockets: list[socket.socket] = []
    failure: OSError | None = None
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        try:
            sockets.append(_listening_socket(family, address))
        except OSError as error:
            failure = error
            # `localhost` stands for ::1 too, which a machine without IPv6 does not have.
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    else:
        if sockets:
            return sockets
    for sock in sockets:
        sock.close()
    reason = failure.strerror if failure else "it stands for no address"
    raise CannotStart(f"cannot listen on {host}:{port}: {reason} (--host, --port)")


def _listening_socket(family: int, address: Any) -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(LISTEN_BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


async def _until_stopped(data_plane: RunningDataPlane, grace_seconds: float) -> int:
    """Wait for the first signal, drain; a second one cuts the draining short."""
    signals: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number.name)
    name = await signals.get()
    log.info("%s: finishing %d requests, at most %g s", name, data_plane.active_requests, grace_seconds)
    draining = asyncio.create_task(data_plane.drain(grace_seconds))
    second = asyncio.create_task(signals.get())
    began_ns = monotonic_ns()
    await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
        log.warning("%s again: %d requests are cut off", second.result(), data_plane.active_requests)
    for task in (draining, second):
        task.cancel()
    await asyncio.gather(draining, second, return_exceptions=True)
    log.info("stopped after %.1f s", (monotonic_ns() - began_ns) / 1e9)
    return 0


def _drawn_seeds(config: RouterConfig) -> dict[str, int]:
    """The seeds that nobody gave. 63 bits, so that they survive a JSON reader with signed integers."""
    unset = [name for name in ("seed", "hash_seed") if getattr(config, name) is None]
    return {name: int.from_bytes(os.urandom(8), "big") >> 1 for name in unset}


def _log_start(config: RouterConfig, sockets: Sequence[socket.socket]) -> None:
    shown = ", ".join("http://{}:{}".format(*_bracketed(sock)) for sock in sockets)
    workers = ", ".join(config.worker_urls) or "none yet (POST /workers)"
    log.info("listening on %s; policy %s; workers: %s", shown, config.policy, workers)
    log.info("metrics on http://%s:%d/metrics", config.prometheus_host, config.prometheus_port)
    log.info(
        "prefix index: %.0f MiB know about %d MB of distinct prompts; at most %d characters are credited to one worker",
        config.index_memory / (1 << 20),
        indexed_text_bytes(config.index_memory) // 1_000_000,
        config.max_tree_size,
    )


def _bracketed(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getsockname()[:2]
    return (f"[{host}]" if sock.family == socket.AF_INET6 else host), port


def _set_up_log(level: str) -> None:
    logging.basicConfig(
        level=_LOG_LEVELS[level], format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # It logs every request at INFO: each probe would be a line.
    logging.getLogger("httpx").setLevel(max(_LOG_LEVELS[level], logging.WARNING))


def _raise_open_files_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
