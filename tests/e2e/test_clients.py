"""The clients people use, against a real router and fake workers."""

import http.client
import json
import subprocess
import time
from dataclasses import dataclass

import openai
import pytest

from tests.e2e.fleet import FakeWorkerProcess, Fleet, RouterProcess, chat, eventually, sse_events, words


@dataclass
class Setup:
    router: RouterProcess
    workers: list[FakeWorkerProcess]


@pytest.fixture(scope="module")
def setup(shared_fleet: Fleet) -> Setup:
    workers = shared_fleet.fake_workers(2)
    return Setup(shared_fleet.router(workers=workers), workers)


def client_of(router: RouterProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=router.url + "/v1", api_key="unused", max_retries=0, timeout=20)


def test_openai_chat_unary(setup: Setup) -> None:
    with client_of(setup.router) as client:
        answer = client.chat.completions.create(
            model="fake-model", messages=[{"role": "user", "content": "unary"}], max_tokens=8
        )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 0


def test_openai_chat_stream_with_usage(setup: Setup) -> None:
    with client_of(setup.router) as client:
        stream = client.chat.completions.create(
            model="fake-model",
            messages=[{"role": "user", "content": words(40, 1)}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text) == 4 * 16
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens > 40


def test_openai_completions_and_models(setup: Setup) -> None:
    with client_of(setup.router) as client:
        assert client.completions.create(model="fake-model", prompt="once upon").choices[0].text
        pieces = [c.choices[0].text for c in client.completions.create(model="fake-model", prompt="once", stream=True)]
        assert "".join(pieces)
        assert [model.id for model in client.models.list()] == ["fake-model"]


def test_openai_errors_are_its_own_exceptions(setup: Setup) -> None:
    for worker in setup.workers:
        worker.script(status=400)
    try:
        with client_of(setup.router) as client, pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="fake-model", messages=[{"role": "user", "content": "x"}])
    finally:
        for worker in setup.workers:
            worker.script()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_curl_streams(setup: Setup, path: str) -> None:
    """Chunks arrive as they are made, not at the end."""
    for worker in setup.workers:
        worker.script(chunks=5, chunk_seconds=0.1)
    body = chat("You are brief.", "go", stream=True) | {"prompt": "go", "text": "go"}
    if path != "/v1/chat/completions":
        del body["messages"]
    command = ["curl", "-sN", setup.router.url + path, "-d", json.dumps(body)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
            assert curl.stdout is not None
            start = time.monotonic()
            first = curl.stdout.readline()
            first_after = time.monotonic() - start
            rest = curl.stdout.read()
            all_after = time.monotonic() - start
    finally:
        for worker in setup.workers:
            worker.script()
    assert first_after < all_after - 0.3, "the last chunk comes 0.4 s after the first"
    events = sse_events(first + rest)
    assert len(events) == 6
    assert events[-1] == "[DONE]"


def test_one_connection_alternates_between_both_sides(setup: Setup) -> None:
    """Routed and control requests take turns on one keep-alive connection."""
    connection = http.client.HTTPConnection("127.0.0.1", setup.router.port, timeout=10)
    try:
        connection.connect()
        opened = connection.sock
        for turn in range(6):
            connection.request("GET", "/v1/models")
            models = connection.getresponse()
            assert models.status == 200
            assert json.loads(models.read())["data"][0]["id"] == "fake-model"
            body = json.dumps(chat("system", f"turn {turn}", stream=turn % 2 == 1))
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200
            assert answer.getheader("x-fake-worker")
            assert answer.read()
            connection.request("GET", "/health")
            health = connection.getresponse()
            assert health.status == 200
            health.read()
            assert connection.sock is opened
    finally:
        connection.close()


def test_body_with_unknown_fields_arrives_byte_for_byte(setup: Setup) -> None:
    body = (
        b'{ "x_unknown":{"deep":[1,2.50,1e-7,null]},\r\n\t"messages" : [{"content":"caf\xc3\xa9 \\u00e9"'
        b',"name":"\\ud83d\\ude00","role":"user","cache_control":{"type":"ephemeral"}}],"model":"m","x_unknown":1 }\n'
    )
    for worker in setup.workers:
        worker.reset()
    status, _ = setup.router.post_bytes("/v1/chat/completions", body)
    assert status == 200
    received = [request for worker in setup.workers for request in worker.requests()]
    assert [request.body for request in received] == [body]
    assert received[0].header("content-length") == str(len(body))


def test_headers_between_client_and_worker(setup: Setup) -> None:
    for worker in setup.workers:
        worker.reset()
    connection = http.client.HTTPConnection("127.0.0.1", setup.router.port, timeout=10)
    sent = {
        "content-type": "application/json",
        "x-request-id": "my-id-1",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "x-warmroute-worker": "forged",
        "connection": "x-hop",
        "x-hop": "dropped",
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(chat("s", "headers")), sent)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.getheader("x-request-id") == "my-id-1"
    ids = {worker["id"] for worker in setup.router.workers()}
    assert answer.getheader("x-warmroute-worker") in ids
    seen = next(request for worker in setup.workers for request in worker.requests())
    assert seen.header("x-request-id") == "my-id-1"
    assert seen.header("traceparent") == sent["traceparent"]
    assert seen.header("x-warmroute-worker") is None
    assert seen.header("x-hop") is None


def test_client_that_leaves_cancels_at_the_worker(setup: Setup) -> None:
    for worker in setup.workers:
        worker.script(chunks=1000, chunk_seconds=0.01)
        worker.reset()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", setup.router.port, timeout=10)
        connection.request("POST", "/v1/chat/completions", json.dumps(chat("s", "leave", stream=True)))
        response = connection.getresponse()
        assert response.read(20)
        response.close()
        connection.close()
        eventually("the worker sees the cancel", lambda: sum(w.counts()["cancelled"] for w in setup.workers) == 1, 2)
        eventually("loads are 0", lambda: set(setup.router.loads().values()) == {0}, 2)
    finally:
        for worker in setup.workers:
            worker.script()
