"""`launch_server`, `python -m warmroute.launch_server`: workers and the router in front, with one command.

Without `--enable-dp-attention`, `--dp-size N` means N workers; with it, one worker of N dp ranks. Flags of the router
have the prefix `--router-`; what is not known here goes to the workers, who refuse what they do not know.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

import uvloop

from warmroute.app import prepare_process, serve
from warmroute.command_line import FlagParser, Settings, add_router_flags, settings_of
from warmroute.config import RouterConfig
from warmroute.launch_dry_run import describe
from warmroute.process import CannotStart
from warmroute.worker_plan import cuda_devices, nodes, plan_workers
from warmroute.worker_processes import WorkerFailed, WorkerProcesses, hold_ports

# sglang-router's; below the ephemeral range (32768 and up), so that no outgoing connection takes one.
WORKER_BASE_PORT = 31000

_PREFIX = "router-"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser()
    values, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    _check(parser, values, rest)
    # What is wrong with the flags must show before anything is started: at first with no workers yet.
    config = settings_of(parser, values, os.environ, _PREFIX, {"worker_urls": ()}).config
    prepare_process(config)
    plan = plan_workers(
        values.model_path, values.dp_size, values.enable_dp_attention, rest, _cores(), cuda_devices(os.environ)
    )
    try:
        ports = hold_ports(plan.count, values.worker_base_port, (config.port, config.prometheus_port))
        workers = WorkerProcesses(ports, plan)
    except WorkerFailed as error:
        return _fail(error)
    settings = settings_of(parser, values, os.environ, _PREFIX, {"worker_urls": tuple(workers.urls)})
    try:
        if values.dry_run:
            print("\n".join(describe(settings, workers)))
            return 0
        workers.start()
        return uvloop.run(_serve(settings, workers))
    except (CannotStart, WorkerFailed) as error:
        return _fail(error)
    finally:
        workers.stop()


async def _serve(settings: Settings, workers: WorkerProcesses) -> int:
    """The router, until it is told to stop or the workers fail. Raises CannotStart, WorkerFailed."""
    router = asyncio.create_task(serve(settings))
    watch = asyncio.create_task(workers.watch(settings.config.worker_startup_timeout_secs))
    done, unfinished = await asyncio.wait((router, watch), return_when=asyncio.FIRST_COMPLETED)
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    return router.result() if router in done else watch.result()


def make_parser() -> FlagParser:
    """All flags that are not the workers'."""
    parser = FlagParser("launch_server", "Starts workers and the router in front. Flags not listed go to the workers.")
    parser.add_argument("--model-path", "--model", required=True, metavar="PATH", help="folder of the model, or demo")
    parser.add_argument(
        "--dp-size", "--dp", "--data-parallel-size", type=int, default=1, metavar="N", help="workers (default: 1)"
    )
    parser.add_argument("--enable-dp-attention", action="store_true", help="instead, one worker of --dp-size ranks")
    host, port = RouterConfig().host, RouterConfig().port
    parser.add_argument("--host", dest="router_host", default=argparse.SUPPRESS, help=f"the router's (default: {host})")
    parser.add_argument(
        "--port", dest="router_port", type=int, default=argparse.SUPPRESS, help=f"the router's (default: {port})"
    )
    parser.add_argument(
        "--router-dp-worker-base-port",
        dest="worker_base_port",
        type=int,
        default=WORKER_BASE_PORT,
        metavar="PORT",
        help="the workers take the free ports from here on (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    # The workers stand behind the router and listen on this host only; it is the router that asks for keys.
    parser.add_argument("--api-key", dest="router_api_key", default=argparse.SUPPRESS, help="--router-api-key")
    add_router_flags(parser, _PREFIX, skip=("host", "port", "worker_urls"))
    return parser


def _check(parser: FlagParser, values: argparse.Namespace, rest: Sequence[str]) -> None:
    if values.dp_size < 1:
        parser.error(f"dp_size: {values.dp_size} must be 1 or more")
    if not 1 <= values.worker_base_port <= 65535:
        parser.error(f"router_dp_worker_base_port: {values.worker_base_port} must be between 1 and 65535")
    if nodes(rest) != "1":
        parser.error("--nnodes: start launch_worker on each node, and launch_router in front of the first")
    for flag in rest:
        if flag.startswith(f"--{_PREFIX}"):
            parser.error(f"{flag}: the router has no such flag")


def _cores() -> int:
    """Those this process may use, not those the machine has."""
    return len(os.sched_getaffinity(0))


def _fail(error: CannotStart | WorkerFailed) -> int:
    print(f"launch_server: error: {error}", file=sys.stderr)
    return error.status if isinstance(error, WorkerFailed) else 1


if __name__ == "__main__":
    sys.exit(main())
