"""`make serve`: the demo's router and workers, kept up until Ctrl-C."""

import argparse
import shutil
import signal
import sys
import time

from bench.stack import LOGS, start_router, start_workers
from tests.processes import REPOSITORY, ProcessError, Processes

CURL = """\
curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{{
  "model": "demo", "stream": true, "max_tokens": 64,
  "messages": [{{"role": "user", "content": "Tell me about the sea."}}]
}}'"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Router and two workers on the demo model, kept up.")
    parser.add_argument("--port", type=int, default=30000, help="the router's port (default: %(default)s)")
    parser.add_argument("--policy", default="cache_aware")
    arguments = parser.parse_args()
    shutil.rmtree(LOGS, ignore_errors=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Processes(LOGS) as processes:
            print(f"starting two workers on the demo model (logs: {LOGS.relative_to(REPOSITORY)}/)", flush=True)
            workers = start_workers(processes)
            router = start_router(processes, workers, arguments.policy, arguments.port)
            print(f"router   {router.url}   (/workers /metrics /v1/models)")
            for worker in workers:
                print(f"{worker.name} {worker.url}   (/server_info /metrics)")
            print(f"\ntry:\n\n{CURL.format(url=router.url)}\n\nCtrl-C stops everything.", flush=True)
            watched = [router.process, *(worker.process for worker in workers)]
            while True:
                time.sleep(0.5)
                for process in watched:
                    if process.exit_code is not None:
                        raise process.error(f"ended by itself with exit code {process.exit_code}")
    except ProcessError as error:
        sys.exit(f"serve: {error}")
    except KeyboardInterrupt:
        print("\nstopped")


if __name__ == "__main__":
    main()
