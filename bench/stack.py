"""Two workers on the demo model and a router before them, for `make demo` and `make serve`."""

from dataclasses import dataclass

from tests.processes import REPOSITORY, Process, Processes, free_port, request

LOGS = REPOSITORY / ".run" / "demo"
WORKERS = 2
WORKER_READY_SECONDS = 120.0
"""Importing torch on a cold disk dominates; 5 s is usual."""
ROUTER_READY_SECONDS = 30.0


@dataclass(frozen=True)
class Worker:
    name: str
    url: str
    process: Process


@dataclass(frozen=True)
class Router:
    url: str
    process: Process


def start_workers(processes: Processes) -> list[Worker]:
    """Started at the same time; ready when this returns."""
    workers = []
    for number in range(1, WORKERS + 1):
        port = free_port()
        process = processes.start_module(
            f"worker-{number}",
            "warmroute_worker.launch_worker",
            *("--model-path", "demo", "--host", "127.0.0.1", "--port", str(port)),
        )
        workers.append(Worker(f"worker-{number}", f"http://127.0.0.1:{port}", process))
    for worker in workers:
        worker.process.wait_until_ready(worker.url + "/health", WORKER_READY_SECONDS)
    return workers


def start_router(processes: Processes, workers: list[Worker], policy: str, port: int | None = None) -> Router:
    """Ready, with all workers, when this returns."""
    port = port or free_port()
    process = processes.start_module(
        f"router-{policy}",
        "warmroute.launch_router",
        *("--policy", policy, "--host", "127.0.0.1", "--port", str(port), "--expose-worker"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        *("--worker-urls", *(worker.url for worker in workers)),
    )
    router = Router(f"http://127.0.0.1:{port}", process)
    process.wait_until_ready(router.url + "/readiness", ROUTER_READY_SECONDS)
    return router


def flush(workers: list[Worker]) -> None:
    """Empty the workers' caches. Raises ProcessError when one refuses."""
    for worker in workers:
        status, answer = request("POST", worker.url + "/flush_cache")
        if status != 200:
            raise worker.process.error(f"refused to flush its cache ({status}: {answer.decode(errors='replace')})")
