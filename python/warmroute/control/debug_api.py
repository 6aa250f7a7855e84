"""`POST /debug/route`: where a request would go now, and why. `GET /debug/ledgers`: the requests of each process."""

from collections.abc import Callable
from typing import Any

from aiohttp import web

from warmroute._core import Core, RegionBusy, UnknownModel
from warmroute.control.answers import refuse
from warmroute.control.workers import Registry
from warmroute.errors import ErrorCode

DEFAULT_PATH = "/v1/chat/completions"


class DebugApi:
    """`clock`: CLOCK_MONOTONIC in ns."""

    def __init__(self, core: Core, registry: Registry, clock: Callable[[], int]) -> None:
        self._core = core
        self._registry = registry
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        return [web.post("/debug/route", self.route), web.get("/debug/ledgers", self.ledgers)]

    async def ledgers(self, request: web.Request) -> web.Response:
        """Each is one snapshot: accepted == answered + in_flight. The first: this process and all that are gone."""
        names = ("accepted", "answered", "in_flight", "lost")
        return web.json_response([dict(zip(names, ledger, strict=True)) for ledger in self._core.ledgers()])

    async def route(self, request: web.Request) -> web.Response:
        """Body, headers and `?path=` are those of the request in question. Nothing is sent anywhere."""
        path = request.query.get("path", DEFAULT_PATH)
        headers = "".join(f"{name.lower()}: {value}\r\n" for name, value in request.headers.items())
        try:
            explained = self._core.explain(path.encode(), headers.encode(), await request.read(), self._clock())
        except UnknownModel as error:
            return refuse(ErrorCode.MODEL_NOT_FOUND, f"No worker serves {error.args[0]!r}")
        except RegionBusy:
            return refuse(ErrorCode.ROUTER_BUSY, "The router is overloaded; try again")
        except ValueError as error:
            return refuse(ErrorCode.INVALID_REQUEST, str(error))
        chosen = explained.chosen
        return web.json_response(
            {
                "policy": explained.policy,
                "chosen": None if chosen is None else self._name(chosen),
                "reason": explained.reason,
                "prompt_bytes": explained.prompt_bytes,
                "candidates": [
                    self._name(slot)
                    | {
                        "match_bytes": match_bytes,
                        "load": load,
                        "outstanding_tokens": outstanding_tokens,
                        "cost_seconds": cost,
                    }
                    for slot, match_bytes, load, outstanding_tokens, cost in explained.candidates
                ],
            }
        )

    def _name(self, slot: int) -> dict[str, Any]:
        worker = next((worker for worker in self._registry if slot in worker.slots), None)
        if worker is None:
            return {"worker_id": None, "url": None, "dp_rank": None}
        return {"worker_id": worker.worker_id, "url": worker.spec.url, "dp_rank": worker.slots.index(slot)}
