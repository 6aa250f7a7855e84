"""The process of the driver: `python -m warmroute_worker.driver_process`, started by the supervisor only."""

from __future__ import annotations

import argparse
import logging
import socket
import sys

from warmroute_worker.args import WorkerArgs
from warmroute_worker.child_process import die_with_parent, leave_signals_to_parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--engine-fd", type=int, required=True, help="the driver's end of the socket pair")
    parser.add_argument("--worker-args", type=WorkerArgs.from_json, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent_pid)
    leave_signals_to_parent()
    args: WorkerArgs = options.worker_args
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Only now: this imports torch, which takes seconds in which the supervisor may die.
    from warmroute_worker import driver

    return driver.main(socket.socket(fileno=options.engine_fd), args)


if __name__ == "__main__":
    sys.exit(main())
