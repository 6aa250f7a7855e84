"""`/workers`: register, list, look at, drain. Errors in the shape `{"error", "code"}`."""

import json
import time
from collections.abc import Callable

from aiohttp import web

from warmroute.control.answers import refuse_worker
from warmroute.control.kv_feeds import KvFeeds
from warmroute.control.load_monitor import LoadMonitor
from warmroute.control.prober import Prober
from warmroute.control.worker_id import is_worker_id
from warmroute.control.worker_info import worker_info
from warmroute.control.worker_spec import BadSpec, parse_spec
from warmroute.control.workers import AlreadyRegistered, Registry, Worker
from warmroute.errors import WorkerApiCode


class WorkerApi:
    """`clock`: CLOCK_MONOTONIC in ns."""

    def __init__(
        self, registry: Registry, prober: Prober, loads: LoadMonitor, feeds: KvFeeds, clock: Callable[[], int]
    ) -> None:
        self._registry = registry
        self._prober = prober
        self._loads = loads
        self._feeds = feeds
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/workers", self.add),
            web.get("/workers", self.listing),
            web.get("/workers/{worker_id}", self.show),
            web.delete("/workers/{worker_id}", self.remove),
        ]

    async def add(self, request: web.Request) -> web.Response:
        """Accepted, not yet usable: the worker must answer first."""
        try:
            spec = parse_spec(await request.read())
        except BadSpec as error:
            return refuse_worker(WorkerApiCode.BAD_REQUEST, str(error))
        try:
            worker = self._registry.add(spec, self._clock(), time.time_ns() // 1_000_000)
        except AlreadyRegistered as error:
            message = f"{spec.url} is registered already, as {error.worker.worker_id}"
            return refuse_worker(WorkerApiCode.WORKER_ALREADY_EXISTS, message)
        self._prober.watch(worker)
        answer = _accepted(worker, "Worker is registered; it gets requests as soon as it has answered its probes")
        return web.json_response(answer, status=202, headers={"location": str(answer["location"])})

    async def listing(self, request: web.Request) -> web.Response:
        model = request.query.get("model")
        workers = [w for w in self._registry if model is None or (w.facts is not None and model in w.facts.models)]
        shown = [worker_info(self._registry, self._loads, self._feeds, worker) for worker in workers]
        stats = {"prefill_count": 0, "decode_count": 0, "regular_count": len(shown)}
        return web.json_response({"workers": shown, "total": len(shown), "stats": stats}, dumps=_dumps)

    async def show(self, request: web.Request) -> web.Response:
        worker = self._found(request)
        if isinstance(worker, web.Response):
            return worker
        shown = worker_info(self._registry, self._loads, self._feeds, worker)
        for target, entries in zip(shown["targets"], await self._registry.index_entries(worker), strict=False):
            target["index_entries"] = entries
        return web.json_response(shown, dumps=_dumps)

    async def remove(self, request: web.Request) -> web.Response:
        worker = self._found(request)
        if isinstance(worker, web.Response):
            return worker
        self._registry.drain(worker, self._clock())
        answer = _accepted(worker, "Worker gets no new requests; it is removed when those in flight have ended")
        return web.json_response(answer, status=202)

    def _found(self, request: web.Request) -> Worker | web.Response:
        """The worker that the path names, or the answer that says that there is none."""
        worker_id = request.match_info["worker_id"]
        if not is_worker_id(worker_id):
            return refuse_worker(WorkerApiCode.BAD_REQUEST, f"{worker_id!r} is not a worker id (a UUID)")
        worker = self._registry.worker(worker_id.lower())
        if worker is None:
            return refuse_worker(WorkerApiCode.WORKER_NOT_FOUND, f"There is no worker {worker_id}")
        return worker


def _accepted(worker: Worker, message: str) -> dict[str, str]:
    location = f"/workers/{worker.worker_id}"
    return {
        "status": "accepted",
        "worker_id": worker.worker_id,
        "url": worker.spec.url,
        "location": location,
        "message": message,
    }


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
