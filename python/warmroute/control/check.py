"""`launch_router --check`: what a start would find, without starting. Asks each worker once."""

import asyncio
from time import monotonic_ns

from warmroute.config import RouterConfig
from warmroute.control.worker_client import WorkerClient, WorkerUnreachable
from warmroute.control.worker_spec import WorkerSpec
from warmroute.control.workers import Worker
from warmroute.directory import WorkerAddress, parse_worker_url


async def check_workers(config: RouterConfig) -> list[tuple[bool, str]]:
    """(whether it can be used, a line for the user) for each of `config.worker_urls`."""
    client = WorkerClient(config.health_check_timeout_secs)
    try:
        return await asyncio.gather(*(_check(client, config, parse_worker_url(url)) for url in config.worker_urls))
    finally:
        await client.close()


async def _check(client: WorkerClient, config: RouterConfig, url: str) -> tuple[bool, str]:
    spec = WorkerSpec(url, api_key=config.api_key)
    worker = Worker("check", spec, WorkerAddress.of("check", url, spec.api_key), monotonic_ns(), 0)
    begin_ns = monotonic_ns()
    try:
        if not config.disable_health_check:
            await client.check(worker, config.health_check_endpoint)
        facts = await client.identify(worker)
    except WorkerUnreachable as error:
        return False, f"{url}: cannot be used now: {error}"
    capacity = f"{facts.kv_capacity_tokens:,} KV tokens" if facts.kv_capacity_tokens else "an unknown KV capacity"
    ranks = f"{facts.dp_size} dp ranks, each" if facts.dp_size > 1 else "one rank"
    milliseconds = (monotonic_ns() - begin_ns) / 1e6
    models = ", ".join(facts.models)
    return True, f"{url}: {facts.runtime}, serves {models}; {ranks} with {capacity}; answered in {milliseconds:.0f} ms"
