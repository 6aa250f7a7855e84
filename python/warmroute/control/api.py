"""The control app: everything that the data plane does not answer itself. It gets its requests from the data plane."""

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from warmroute import router_health
from warmroute._core import Core
from warmroute.command_line import Settings
from warmroute.control.answers import json_errors_and_counts, method_not_allowed
from warmroute.control.debug_api import DebugApi
from warmroute.control.fleet_api import FleetApi
from warmroute.control.http_counts import HttpCounts
from warmroute.control.worker_api import WorkerApi

# The data plane keeps the POSTs to itself and hands on only other methods.
ROUTED_PATHS = ("/v1/chat/completions", "/v1/completions", "/generate")


def control_app(
    settings: Settings,
    core: Core,
    counts: HttpCounts,
    metrics: CollectorRegistry,
    worker_api: WorkerApi,
    fleet_api: FleetApi,
    debug_api: DebugApi,
) -> web.Application:
    async def health(request: web.Request) -> web.Response:
        status, content_type, body = router_health.liveness()
        return web.Response(status=status, body=body, headers={"content-type": content_type})

    async def readiness(request: web.Request) -> web.Response:
        status, content_type, body = router_health.readiness(core, draining=False)
        return web.Response(status=status, body=body, headers={"content-type": content_type})

    async def config(request: web.Request) -> web.Response:
        """Every effective value and where it came from; a secret only as set or not."""
        return web.json_response(settings.shown())

    async def routed_path(request: web.Request) -> web.Response:
        return method_not_allowed(request.method, request.path, "POST")

    app = web.Application(middlewares=[json_errors_and_counts(counts)])
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/liveness", health),
            web.get("/readiness", readiness),
            web.get("/config", config),
            *metrics_routes(metrics),
            *worker_api.routes(),
            *fleet_api.routes(),
            *debug_api.routes(),
            *(web.route("*", path, routed_path) for path in ROUTED_PATHS),
        ]
    )
    return app


def metrics_app(metrics: CollectorRegistry) -> web.Application:
    """For `--prometheus-port`: /metrics and nothing else."""
    app = web.Application(middlewares=[json_errors_and_counts(HttpCounts())])
    app.add_routes(metrics_routes(metrics))
    return app


def metrics_routes(metrics: CollectorRegistry) -> list[web.RouteDef]:
    async def exposition(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return web.Response(body=encode(metrics), headers={"content-type": content_type})

    return [web.get("/metrics", exposition)]
