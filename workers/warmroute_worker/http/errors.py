"""What a client is told when something is wrong: the one table of the worker's errors, and their JSON shape."""

from __future__ import annotations

import enum
import json

from aiohttp import web


class ErrorCode(enum.Enum):
    """(code in the body, status, OpenAI type, Retry-After in seconds or None). 4xx: the client's fault; 5xx: ours."""

    INVALID_REQUEST = ("invalid_request", 400, "invalid_request_error", None)
    CONTEXT_LENGTH_EXCEEDED = ("context_length_exceeded", 400, "invalid_request_error", None)
    BUSY = ("busy", 400, "invalid_request_error", None)
    NOT_FOUND = ("not_found", 404, "invalid_request_error", None)
    GONE = ("gone", 410, "invalid_request_error", None)
    METHOD_NOT_ALLOWED = ("method_not_allowed", 405, "invalid_request_error", None)
    TOO_LARGE = ("too_large", 413, "invalid_request_error", None)
    INTERNAL = ("internal", 500, "server_error", None)
    GENERATION_FAILED = ("generation_failed", 500, "server_error", None)
    QUEUE_FULL = ("queue_full", 503, "server_error", 1)
    STARTING = ("starting", 503, "server_error", 1)
    DRAINING = ("draining", 503, "server_error", 5)
    ENGINE_FAILED = ("engine_failed", 503, "server_error", 5)

    def __init__(self, code: str, status: int, openai_type: str, retry_after_seconds: int | None) -> None:
        self.code = code
        self.status = status
        self.openai_type = openai_type
        self.retry_after_seconds = retry_after_seconds


class ApiError(Exception):
    """Raised anywhere below a handler; the middleware of `app.py` answers it."""

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def body(self) -> bytes:
        """OpenAI's shape."""
        error = {
            "message": self.message,
            "type": self.code.openai_type,
            "code": self.code.code,
            "param": self.param,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> web.Response:
        headers = {}
        if self.code.retry_after_seconds is not None:
            headers["Retry-After"] = str(self.code.retry_after_seconds)
        return web.Response(body=self.body(), status=self.code.status, content_type="application/json", headers=headers)


def invalid(message: str, param: str | None) -> ApiError:
    """A request that cannot be answered as it is; `param` names the field."""
    return ApiError(ErrorCode.INVALID_REQUEST, message, param)
