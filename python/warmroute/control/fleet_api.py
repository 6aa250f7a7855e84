"""What concerns all workers: their models, loads and caches, and questions that any of them can answer."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from warmroute.control.answers import refuse, respond
from warmroute.control.worker_client import WorkerClient, WorkerUnreachable
from warmroute.control.workers import Registry, Worker
from warmroute.errors import ErrorCode

# Newer and older name of the same question; a worker may have one of them only.
_RELAYED = {
    "/model_info": ("/model_info", "/get_model_info"),
    "/get_model_info": ("/get_model_info", "/model_info"),
    "/server_info": ("/server_info", "/get_server_info"),
    "/get_server_info": ("/get_server_info", "/server_info"),
}


FindRequest = Callable[[str], Awaitable[list[tuple[str, str]]]]
"""(worker id, the request's name there) of the running requests that the argument names."""


class FleetApi:
    """`clock`: CLOCK_MONOTONIC in ns."""

    def __init__(
        self, registry: Registry, client: WorkerClient, find_request: FindRequest, clock: Callable[[], int]
    ) -> None:
        self._registry = registry
        self._client = client
        self._find_request = find_request
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.get("/get_loads", self.loads),
            web.post("/flush_cache", self.flush),
            web.post("/abort_request", self.abort),
            *(web.get(path, self.relay) for path in _RELAYED),
        ]

    async def models(self, request: web.Request) -> web.Response:
        """From the registry, so that one dead worker cannot take the list away."""
        cards: dict[str, dict[str, Any]] = {}
        for worker in self._registry:
            if worker.facts is None or worker.is_draining:
                continue
            for name in worker.facts.models:
                card = {"id": name, "object": "model", "created": worker.registered_unix_ms // 1000}
                cards.setdefault(name, card | {"owned_by": "self_hosted", "max_model_len": worker.facts.max_model_len})
        if not cards:
            return refuse(ErrorCode.NO_AVAILABLE_WORKERS, "No worker has told yet which model it serves")
        return web.json_response({"object": "list", "data": list(cards.values())})

    async def loads(self, request: web.Request) -> web.Response:
        """Tokens in use as the workers report them; -1: unknown. What the router has in flight is in GET /workers."""
        workers = list(self._registry)
        loads = await asyncio.gather(*map(self._client.load, workers))
        answer = [{"worker": w.spec.url, "load": load} for w, load in zip(workers, loads, strict=True)]
        return web.json_response({"workers": answer})

    async def flush(self, request: web.Request) -> web.Response:
        """Empties every worker's cache, and the index of those that did."""
        workers = list(self._registry)
        failures = await asyncio.gather(*map(self._flush, workers))
        failed = [{"worker": w.spec.url, "error": text} for w, text in zip(workers, failures, strict=True) if text]
        successful = [w.spec.url for w, text in zip(workers, failures, strict=True) if not text]
        counts = {"total_http_workers": len(workers), "total_workers": len(workers), "workers_flushed": len(successful)}
        if not failed:
            message = f"The caches of {len(successful)} workers were flushed"
            return web.json_response({"status": "success", "message": message} | counts)
        message = f"The caches of {len(failed)} of {len(workers)} workers were not flushed"
        answer = {"status": "partial_success", "message": message, "successful": successful, "failed": failed}
        return web.json_response(answer | counts, status=206)

    async def abort(self, request: web.Request) -> web.Response:
        """`{"rid"}` or `{"abort_all": true}`, as SGLang takes it: to the worker that has the request; if none is known
        to, to all, since a rid may be the beginning of several there."""
        try:
            given = json.loads(await request.read())
            rid, everything = given.get("rid"), given.get("abort_all", False)
        except (ValueError, AttributeError):
            return refuse(ErrorCode.INVALID_REQUEST, 'the body must be an object like {"rid": "..."}')
        if not isinstance(everything, bool) or not isinstance(rid, str | None) or not (rid or everything):
            return refuse(ErrorCode.INVALID_REQUEST, "rid: must name a request, or abort_all must be true", "rid")
        asked: list[tuple[Worker, dict[str, Any]]] = []
        if rid and not everything:
            for worker_id, name in await self._find_request(rid):
                worker = self._registry.worker(worker_id)
                if worker is not None:
                    asked.append((worker, given | {"rid": name}))
        if not asked:
            asked = [(worker, given) for worker in self._registry]
        failures = await asyncio.gather(*(self._abort(worker, body) for worker, body in asked))
        told = [worker.spec.url for (worker, _), text in zip(asked, failures, strict=True) if text is None]
        failed = [
            {"worker": worker.spec.url, "error": text}
            for (worker, _), text in zip(asked, failures, strict=True)
            if text is not None
        ]
        if failed and not told:
            return refuse(ErrorCode.UPSTREAM_NO_ANSWER, f"No worker was told to abort: {failed[0]['error']}")
        return web.json_response({"status": "partial_success" if failed else "success", "told": told, "failed": failed})

    async def relay(self, request: web.Request) -> web.Response:
        """The answer of the first ready worker that answers at all."""
        reason = "no worker is ready"
        for worker in self._registry:
            if not self._registry.is_available(worker):
                continue
            for path in _RELAYED[request.path]:
                try:
                    answer = await self._client.relay(worker, path)
                except WorkerUnreachable as error:
                    reason = f"{worker.spec.url}: {error}"
                    break
                if answer.status_code != 404:
                    headers = (("content-type", answer.headers.get("content-type", "application/json")),)
                    return respond(answer.status_code, headers, answer.content)
                reason = f"{worker.spec.url} does not know {request.path}"
        return refuse(ErrorCode.NO_AVAILABLE_WORKERS, f"{request.path} cannot be answered: {reason}")

    async def _abort(self, worker: Worker, body: dict[str, Any]) -> str | None:
        """None: done; else why not."""
        try:
            await self._client.abort(worker, body)
        except WorkerUnreachable as error:
            return str(error)
        return None

    async def _flush(self, worker: Worker) -> str | None:
        """None: done; else why not."""
        try:
            await self._client.flush(worker)
        except WorkerUnreachable as error:
            return str(error)
        self._registry.forget_cache(worker, self._clock())
        return None
