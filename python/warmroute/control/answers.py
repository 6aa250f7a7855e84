"""aiohttp's side of `warmroute.errors`: answers of the control app, and the middleware that makes every error JSON."""

import logging

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from warmroute.control.http_counts import HttpCounts
from warmroute.errors import ErrorCode, Headers, WorkerApiCode, http_error, worker_api_error

log = logging.getLogger(__name__)


def respond(status: int, headers: Headers, body: bytes) -> web.Response:
    return web.Response(status=status, headers=dict(headers), body=body)


def refuse(code: ErrorCode, message: str, param: str | None = None) -> web.Response:
    return respond(*http_error(code, message, param))


def refuse_worker(code: WorkerApiCode, message: str) -> web.Response:
    return respond(*worker_api_error(code, message))


def json_errors_and_counts(counts: HttpCounts) -> Middleware:
    """Turns what handlers raise into JSON, and counts by path template, so that clients cannot invent labels."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        counts.running += 1
        try:
            response = await _answer(request, handler)
        finally:
            counts.running -= 1
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else HttpCounts.OTHER
        known = path != HttpCounts.OTHER or request.method in ("GET", "POST")
        counts.count(request.method if known else HttpCounts.OTHER, path, response.status)
        return response

    return middleware


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return method_not_allowed(request.method, request.path, allowed)
    except web.HTTPNotFound:
        return refuse(ErrorCode.NOT_FOUND, f"There is nothing at {request.path}")
    except web.HTTPException as error:
        return refuse(ErrorCode.of_status(error.status), error.reason)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return refuse(ErrorCode.INTERNAL, "The router could not answer this; its log says why")


def method_not_allowed(method: str, path: str, allowed: str) -> web.Response:
    response = refuse(ErrorCode.METHOD_NOT_ALLOWED, f"{path} does not take {method}, only {allowed}")
    response.headers["allow"] = allowed
    return response
