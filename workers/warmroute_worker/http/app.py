"""The aiohttp application: which path goes to which handler, and what every answer has in common."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiohttp import web

from warmroute_worker.http import admin, kv_events, native, openai
from warmroute_worker.http.errors import ApiError, ErrorCode
from warmroute_worker.http.service import SERVICE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from warmroute_worker.http.service import Service

_log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 120.0
"""Routers keep idle connections for 50 s; a worker that closes first makes their next request fail (sglang#20851)."""
MAX_BODY_BYTES = 64 << 20
"""A prompt of a million tokens as a JSON list is about 8 MB."""


def make_app(service: Service) -> web.Application:
    app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY_BYTES)
    app[SERVICE] = service
    app.add_routes(
        [
            web.post("/v1/chat/completions", openai.chat_completions),
            web.post("/v1/completions", openai.completions),
            web.post("/generate", native.generate),
            web.post("/abort_request", native.abort_request),
            web.post("/pause_generation", admin.pause_generation),
            web.post("/continue_generation", admin.continue_generation),
            web.post("/start_profile", admin.start_profile),
            web.post("/stop_profile", admin.stop_profile),
            web.post("/start_expert_distribution_record", admin.start_expert_distribution_record),
            web.post("/stop_expert_distribution_record", admin.stop_expert_distribution_record),
            web.post("/dump_expert_distribution_record", admin.dump_expert_distribution_record),
            web.post("/tokenize", native.tokenize),
            web.post("/detokenize", native.detokenize),
            web.get("/v1/models", admin.models),
            web.get("/health", admin.health),
            web.get("/health_generate", native.health_generate),
            web.get("/server_info", admin.server_info),
            web.get("/get_server_info", admin.server_info),
            web.get("/model_info", admin.model_info),
            web.get("/get_model_info", admin.model_info),
            web.get("/get_load", admin.load),
            web.get("/v1/loads", admin.loads),
            web.get("/flush_cache", admin.flush_cache),
            web.post("/flush_cache", admin.flush_cache),
            web.get("/metrics", admin.metrics),
            web.get("/debug/ranks", admin.ranks),
            web.get("/kv_events", kv_events.kv_events),
            web.get("/kv_events/snapshot", kv_events.snapshot),
        ]
    )
    return app


def make_runner(service: Service, shutdown_seconds: float) -> web.AppRunner:
    """How the application is served. Cancelling handlers of clients that left is what frees their pages."""
    return web.AppRunner(
        make_app(service),
        handler_cancellation=True,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        shutdown_timeout=shutdown_seconds,
        access_log=None,
    )


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error is JSON."""
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPRequestEntityTooLarge:
        return ApiError(ErrorCode.TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes").response()
    except web.HTTPNotFound:
        return ApiError(ErrorCode.NOT_FOUND, f"there is no {request.path} here").response()
    except web.HTTPMethodNotAllowed as error:
        response = ApiError(ErrorCode.METHOD_NOT_ALLOWED, f"{request.path} does not take {request.method}").response()
        response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        return response
    except ConnectionError:
        # The client left while we wrote; there is nobody to answer, and the handler has cleaned up.
        return web.Response(status=499)
    except Exception:
        _log.exception("%s %s failed", request.method, request.path)
        return ApiError(ErrorCode.INTERNAL, "the worker failed on this request; its log says why").response()
