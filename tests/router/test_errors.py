"""The table of errors and the addresses of workers."""

import json

import pytest

from warmroute.directory import Directory, WorkerAddress, parse_worker_url
from warmroute.errors import ErrorCode, WorkerApiCode, http_error, stream_error, worker_api_error


def test_codes_are_unique() -> None:
    codes = [member.code for member in ErrorCode]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_is_shaped_as_openai_does(code: ErrorCode) -> None:
    status, headers, body = http_error(code, "what happened", param="model", request_id="r1")
    named = dict(headers)
    assert status == code.status
    assert named["x-smg-error-code"] == code.code
    assert named["x-request-id"] == "r1"
    error = json.loads(body)["error"]
    assert error == {"message": "what happened", "type": code.openai_type, "code": code.code, "param": "model"}
    # A client that is told to come back must be told when; one at fault must not come back with the same.
    assert ("retry-after" in named) == (status in (429, 503) or code is ErrorCode.QUEUE_TIMEOUT)
    assert code.retryable == (status in (408, 429) or (status >= 500 and status not in (501, 505)))


def test_of_status() -> None:
    assert ErrorCode.of_status(413) is ErrorCode.PAYLOAD_TOO_LARGE
    assert ErrorCode.of_status(418) is ErrorCode.INVALID_REQUEST
    assert ErrorCode.of_status(599) is ErrorCode.INTERNAL


def test_stream_error_is_one_event() -> None:
    event = stream_error(ErrorCode.UPSTREAM_STREAM_BROKEN, "line\nbreak")
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2


def test_worker_api_error() -> None:
    status, headers, body = worker_api_error(WorkerApiCode.WORKER_NOT_FOUND, "no")
    assert (status, dict(headers)["x-smg-error-code"]) == (404, "WORKER_NOT_FOUND")
    assert json.loads(body) == {"error": "no", "code": "WORKER_NOT_FOUND"}


GOOD_URLS = [
    ("http://worker:8000", "http://worker:8000", "worker", 8000, False),
    ("http://worker:8000/", "http://worker:8000", "worker", 8000, False),
    ("worker:8000", "http://worker:8000", "worker", 8000, False),
    ("https://worker", "https://worker", "worker", 443, True),
    ("http://10.0.0.1", "http://10.0.0.1", "10.0.0.1", 80, False),
    ("http://[::1]:9", "http://[::1]:9", "::1", 9, False),
    ("http://Worker:80", "http://worker:80", "worker", 80, False),
]


@pytest.mark.parametrize(("text", "url", "host", "port", "tls"), GOOD_URLS)
def test_address(text: str, url: str, host: str, port: int, tls: bool) -> None:
    address = WorkerAddress.of("id", text, api_key=None)
    assert (address.url, address.host, address.port, address.tls) == (url, host, port, tls)
    assert address.authorization is None
    assert url.endswith(address.host_header.decode())


def test_api_key_becomes_a_bearer() -> None:
    assert WorkerAddress.of("id", "w:1", api_key="k").authorization == b"Bearer k"
    assert WorkerAddress.of("id", "w:1", api_key="").authorization is None


BAD_URLS = [
    "",
    "http://",
    "ftp://w",
    "grpc://w:1",
    "HTTP://w:1",
    "http://w:0",
    "http://w:99999",
    "http://w:x",
    "http://w:1/v1",
    "http://w:1?a=b",
    "http://w:1#a",
    "http://user@w:1",
    "http://w w:1",
    "http://wörker:1",
    "http://[::1:1",
]


@pytest.mark.parametrize("text", BAD_URLS)
def test_bad_url(text: str) -> None:
    with pytest.raises(ValueError, match="is not a worker URL"):
        parse_worker_url(text)


def test_directory() -> None:
    directory = Directory()
    first, second = WorkerAddress.of("1", "a:1", None), WorkerAddress.of("2", "b:1", None)
    directory.put([4, 5], first, ("m", "alias"), [1, 1])
    directory.put([9], second, ("m",), [3])
    assert [directory.address(slot) for slot in (4, 5, 9, 6)] == [first, first, second, None]
    assert directory.models() == ["alias", "m"]
    directory.remove([4, 5])
    assert directory.address(4) is None
    assert directory.models() == ["m"]
