"""Whatever a client sends: an OpenAI-shaped answer, and a router that lives on."""

import http.client
import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.fleet import Fleet, RouterProcess, chat
from tests.processes import request

CHAT = "/v1/chat/completions"


@dataclass
class Case:
    name: str
    path: str
    body: bytes
    status: int
    code: str | None = None


CASES = [
    Case("broken json", CHAT, b'{"model": "a", "messages": [', 400),
    Case("not json", "/generate", b"hello", 400),
    Case("empty body", CHAT, b"", 400),
    Case("array", "/v1/completions", b"[1,2]", 400),
    Case("text after the end", CHAT, b'{"model":"one","messages":[]} x', 400),
    Case("control character in a string", CHAT, b'{"model":"one","messages":[{"role":"user","content":"\x01"}]}', 400),
    Case("bad escape", CHAT, b'{"model":"one","messages":[{"role":"user","content":"\\q"}]}', 400),
    Case("bad utf-8", CHAT, b'{"model":"one","messages":[{"role":"user","content":"\xff"}]}', 400),
    Case("nested without end", CHAT, b'{"model":"one","messages":' + b"[" * 60_000, 400),
    Case("unknown model", CHAT, json.dumps(chat("s", "u", model="none")).encode(), 404, "model_not_found"),
    Case("model of a wrong type", CHAT, b'{"model":7,"messages":[{"role":"user","content":"x"}]}', 400),
    Case("too large", CHAT, json.dumps(chat("s", "x" * 70_000, model="one")).encode(), 413),
]


@pytest.fixture(scope="module")
def router(shared_fleet: Fleet) -> RouterProcess:
    workers = [shared_fleet.fake_worker("--model", "one"), shared_fleet.fake_worker("--model", "two")]
    return shared_fleet.router("--max-payload-size", "65536", workers=workers)


def assert_error_shape(answer: bytes, head: http.client.HTTPResponse, code: str | None) -> dict[str, Any]:
    error = json.loads(answer)["error"]
    assert set(error) >= {"message", "type", "code", "param"}
    assert error["message"]
    assert head.getheader("content-type", "").startswith("application/json")
    assert head.getheader("x-smg-error-code") == error["code"]
    if code is not None:
        assert error["code"] == code
    return dict(error)


def send(router: RouterProcess, path: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=10)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answer(router: RouterProcess, case: Case) -> None:
    head, answer = send(router, case.path, case.body)
    assert head.status == case.status, answer
    error = assert_error_shape(answer, head, case.code)
    if case.name == "unknown model":
        assert "one" in error["message"]
        assert "two" in error["message"]
    status, _ = router.post(CHAT, chat("s", "still alive", model="one"))
    assert status == 200


def test_payload_of_exactly_the_limit_passes(router: RouterProcess) -> None:
    body = json.dumps(chat("s", "", model="one")).encode()
    body = json.dumps(chat("s", "x" * (65_536 - len(body)), model="one")).encode()
    assert len(body) == 65_536
    assert send(router, CHAT, body)[0].status == 200


def test_a_connection_outlives_a_bad_request(router: RouterProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=10)
    try:
        for body, status in ((b"{", 400), (json.dumps(chat("s", "u", model="two")).encode(), 200)):
            connection.request("POST", CHAT, body)
            response = connection.getresponse()
            response.read()
            assert response.status == status
    finally:
        connection.close()


def test_unknown_path_and_method(router: RouterProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", router.port, timeout=10)
    try:
        for method, path, expected in (
            ("GET", "/nothing/here", 404),
            ("GET", CHAT, 405),
            ("DELETE", "/v1/models", 405),
        ):
            connection.request(method, path)
            response = connection.getresponse()
            answer = response.read()
            assert response.status == expected, (method, path)
            assert_error_shape(answer, response, None)
    finally:
        connection.close()


def test_no_worker_is_503_with_retry_after(fleet: Fleet) -> None:
    router = fleet.router()
    head, answer = send(router, CHAT, json.dumps(chat("s", "u")).encode())
    assert head.status == 503
    assert int(head.getheader("retry-after", "")) >= 1
    assert_error_shape(answer, head, "no_available_workers")
    status, readiness = router.get("/readiness")
    assert (status, readiness["status"]) == (503, "not ready")
    assert request("GET", f"{router.url}/health") == (200, b"OK")


def test_single_model_fleet_takes_any_name(fleet: Fleet) -> None:
    router = fleet.router(workers=[fleet.fake_worker("--model", "only")])
    assert router.post(CHAT, chat("s", "u", model="whatever"))[0] == 200


def test_strict_model(fleet: Fleet) -> None:
    router = fleet.router("--strict-model", workers=[fleet.fake_worker("--model", "only")])
    assert router.post(CHAT, chat("s", "u", model="whatever"))[0] == 404
