"""The one table of errors: what goes wrong, with which status, whose fault it is, and how the client is told.

Everywhere but in the worker API the body is OpenAI's: `{"error": {"message", "type", "code", "param"}}`; the worker API
(`/workers...`) answers `{"error", "code"}` as sglang-router does. Both carry the code in `X-SMG-Error-Code`.
"""

import enum
import json
from typing import Final, Literal

Fault = Literal["client", "worker", "router"]
Headers = tuple[tuple[str, str], ...]

# A restarted worker has traffic within 2 s; a client that waits less than that before it asks again loses little.
_COME_BACK_SECONDS: Final = 1


class ErrorCode(enum.Enum):
    """A row: (code, status, OpenAI type, fault, worth retrying for the client, `Retry-After` in seconds or None)."""

    INVALID_REQUEST = ("invalid_request", 400, "invalid_request_error", "client", False, None)
    UNAUTHORIZED = ("invalid_api_key", 401, "authentication_error", "client", False, None)
    MODEL_NOT_FOUND = ("model_not_found", 404, "invalid_request_error", "client", False, None)
    NOT_FOUND = ("not_found", 404, "invalid_request_error", "client", False, None)
    METHOD_NOT_ALLOWED = ("method_not_allowed", 405, "invalid_request_error", "client", False, None)
    REQUEST_TIMEOUT = ("request_timeout", 408, "timeout_error", "client", True, None)
    BODY_TIMEOUT = ("body_timeout", 408, "timeout_error", "client", True, None)
    QUEUE_TIMEOUT = ("queue_timeout", 408, "rate_limit_error", "router", True, _COME_BACK_SECONDS)
    PAYLOAD_TOO_LARGE = ("payload_too_large", 413, "invalid_request_error", "client", False, None)
    EXPECTATION_FAILED = ("expectation_failed", 417, "invalid_request_error", "client", False, None)
    QUEUE_FULL = ("queue_full", 429, "rate_limit_error", "router", True, _COME_BACK_SECONDS)
    HEAD_TOO_LARGE = ("head_too_large", 431, "invalid_request_error", "client", False, None)
    INTERNAL = ("internal_error", 500, "server_error", "router", True, None)
    NOT_IMPLEMENTED = ("not_implemented", 501, "invalid_request_error", "client", False, None)
    UPSTREAM_CONNECT_FAILED = ("upstream_connect_failed", 502, "server_error", "worker", True, None)
    UPSTREAM_NO_ANSWER = ("upstream_no_answer", 502, "server_error", "worker", True, None)
    UPSTREAM_ERROR = ("upstream_error", 502, "server_error", "worker", True, None)
    UPSTREAM_STREAM_BROKEN = ("upstream_stream_broken", 502, "server_error", "worker", True, None)
    NO_AVAILABLE_WORKERS = ("no_available_workers", 503, "server_error", "worker", True, _COME_BACK_SECONDS)
    ROUTER_BUSY = ("router_busy", 503, "server_error", "router", True, _COME_BACK_SECONDS)
    CONTROL_UNAVAILABLE = ("control_unavailable", 503, "server_error", "router", True, _COME_BACK_SECONDS)
    SHUTTING_DOWN = ("shutting_down", 503, "server_error", "router", True, _COME_BACK_SECONDS)
    UPSTREAM_TIMEOUT = ("upstream_timeout", 504, "server_error", "worker", True, None)
    UPSTREAM_CONNECT_TIMEOUT = ("upstream_connect_timeout", 504, "server_error", "worker", True, None)
    UPSTREAM_FIRST_BYTE_TIMEOUT = ("upstream_first_byte_timeout", 504, "server_error", "worker", True, None)
    UPSTREAM_STALLED = ("upstream_stalled", 504, "server_error", "worker", True, None)
    HTTP_VERSION = ("http_version_not_supported", 505, "invalid_request_error", "client", False, None)

    def __init__(
        self, code: str, status: int, openai_type: str, fault: Fault, retryable: bool, retry_after_seconds: int | None
    ) -> None:
        self.code = code
        self.status = status
        self.openai_type = openai_type
        self.fault = fault
        self.retryable = retryable
        self.retry_after_seconds = retry_after_seconds

    @classmethod
    def of_status(cls, status: int) -> "ErrorCode":
        """The first row with this status (of a `BadHead` or an aiohttp exception), else INVALID_REQUEST or INTERNAL."""
        for member in cls:
            if member.status == status:
                return member
        return cls.INVALID_REQUEST if 400 <= status < 500 else cls.INTERNAL


class WorkerApiCode(enum.Enum):
    """Errors of the worker API: (code, status)."""

    BAD_REQUEST = ("BAD_REQUEST", 400)
    WORKER_NOT_FOUND = ("WORKER_NOT_FOUND", 404)
    WORKER_ALREADY_EXISTS = ("WORKER_ALREADY_EXISTS", 409)
    NO_ROOM = ("NO_ROOM", 507)

    def __init__(self, code: str, status: int) -> None:
        self.code = code
        self.status = status


def error_object(code: ErrorCode, message: str, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """The body as a dict."""
    return {"error": {"message": message, "type": code.openai_type, "code": code.code, "param": param}}


def http_error(
    code: ErrorCode, message: str, param: str | None = None, request_id: str | None = None
) -> tuple[int, Headers, bytes]:
    """(status, headers without framing, body) of the answer that tells a client about `code`."""
    headers: Headers = (("content-type", "application/json"), ("x-smg-error-code", code.code))
    if code.retry_after_seconds is not None:
        headers += (("retry-after", str(code.retry_after_seconds)),)
    if request_id is not None:
        headers += (("x-request-id", request_id),)
    return code.status, headers, json.dumps(error_object(code, message, param)).encode()


def stream_error(code: ErrorCode, message: str) -> bytes:
    """The SSE event that ends a stream which broke off; no `[DONE]` follows it, so that nobody takes it for whole."""
    return b"data: " + json.dumps(error_object(code, message)).encode() + b"\n\n"


def worker_api_error(code: WorkerApiCode, message: str) -> tuple[int, Headers, bytes]:
    """As `http_error`, in the shape of the worker API."""
    headers: Headers = (("content-type", "application/json"), ("x-smg-error-code", code.code))
    return code.status, headers, json.dumps({"error": message, "code": code.code}).encode()
