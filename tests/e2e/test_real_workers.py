"""The whole product: openai client, router, torch workers on the demo model."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import openai
import pytest

from tests.e2e.fleet import Fleet, RouterProcess, eventually
from tests.processes import request, request_json

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

pytestmark = pytest.mark.timeout(240)

SYSTEM = "You are a patient assistant who answers in short sentences and never asks a question back. " * 3


@dataclass
class Setup:
    router: RouterProcess
    workers: list[str]
    client: openai.OpenAI


@pytest.fixture(scope="module")
def setup(shared_fleet: Fleet) -> Iterator[Setup]:
    workers = [shared_fleet.real_worker() for _ in range(2)]
    router = shared_fleet.router("--policy", "cache_aware", workers=workers)
    with openai.OpenAI(base_url=router.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield Setup(router, workers, client)


def test_conversation_stays_warm(setup: Setup) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": SYSTEM}]
    workers = set()
    for turn in range(3):
        messages.append({"role": "user", "content": f"Tell me something about the sea, part {turn}."})
        answer = setup.client.chat.completions.with_raw_response.create(
            model="demo",
            messages=messages,
            max_tokens=24,
            temperature=0,
        )
        workers.add(answer.headers["x-warmroute-worker"])
        completion = answer.parse()
        assert completion.usage is not None
        assert completion.usage.prompt_tokens_details is not None
        cached = completion.usage.prompt_tokens_details.cached_tokens or 0
        assert (cached > 0) == (turn > 0), f"turn {turn}: {cached} cached tokens"
        assert int(answer.headers["x-cached-tokens"]) == cached
        messages.append({"role": "assistant", "content": completion.choices[0].message.content or ""})
    assert len(workers) == 1


def test_stream_equals_unary(setup: Setup) -> None:
    """Greedy: the same tokens, in pieces or at once."""
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Once upon a time"}]
    unary = setup.client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=32,
        temperature=0,
    )
    stream = setup.client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == unary.choices[0].message.content
    assert unary.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == unary.usage.completion_tokens


def test_generate_and_completions(setup: Setup) -> None:
    status, answer = request_json(
        "POST",
        setup.router.url + "/generate",
        {"text": "The sea", "sampling_params": {"max_new_tokens": 8, "temperature": 0}},
        timeout=30,
    )
    assert status == 200
    assert isinstance(answer, dict)
    assert answer["meta_info"]["completion_tokens"] == 8
    completion = setup.client.completions.create(model="demo", prompt="The sea", max_tokens=8, temperature=0)
    assert completion.choices[0].text == answer["text"]


def test_disconnect_frees_the_worker(setup: Setup) -> None:
    stream = setup.client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Count forever"}],
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()

    def idle() -> bool:
        loads = [request_json("GET", url + "/get_load")[1] for url in setup.workers]
        return all(rank["num_reqs"] == 0 for load in loads if isinstance(load, list) for rank in load)

    eventually("no worker computes for a client that is gone", idle, 5)
    eventually("the router's loads are 0", lambda: set(setup.router.loads().values()) == {0}, 2)


def test_flush_forgets(setup: Setup) -> None:
    def cached() -> int:
        answer = setup.client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": SYSTEM}], max_tokens=4
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    cached()
    assert cached() > 0
    for url in setup.workers:
        assert request("POST", url + "/flush_cache")[0] == 200
    assert cached() == 0


def test_the_worker_says_what_it_is(setup: Setup) -> None:
    for url in setup.workers:
        for path in ("/server_info", "/get_server_info"):
            status, info = request_json("GET", url + path)
            assert status == 200
            assert isinstance(info, dict)
            assert info["dp_size"] == 1
            assert info["max_total_num_tokens"] > 8000
        for path in ("/model_info", "/get_model_info", "/v1/models", "/metrics", "/get_load"):
            assert request("GET", url + path)[0] == 200, path


@pytest.mark.slow
def test_keep_alive_of_the_workers_outlives_our_pool(setup: Setup) -> None:
    """Two requests with a pause on pooled connections: no error (the long version is a slow drill)."""
    for _ in range(2):
        setup.client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
        time.sleep(6)


def test_an_abort_through_the_router_ends_the_answer(fleet: Fleet) -> None:
    """By the name in the body, and by the name that the router gave it in its head."""
    url = fleet.real_worker()
    router = fleet.router(workers=[url])
    # More tokens than it makes in the time, so that nothing but the abort can end it.
    body = {"model": "m", "prompt": "once upon a time", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}
    for named, rid in (({"rid": "by-rid"}, "by-rid"), ({}, "by-header")):
        ended: list[tuple[int, object]] = []

        def ask(fields: dict[str, str] = named, name: str = rid, ended: list[tuple[int, object]] = ended) -> None:
            data = json.dumps(body | fields).encode()
            headers = {"content-type": "application/json", "x-request-id": name}
            status, answer = request("POST", router.url + "/v1/completions", data, headers, timeout=60)
            ended.append((status, json.loads(answer)["choices"][0]["finish_reason"]))

        thread = threading.Thread(target=ask)
        thread.start()
        eventually("it runs", lambda: sum(router.loads().values()) == 1)
        time.sleep(0.2)
        status, answer = router.post("/abort_request", {"rid": rid})
        assert (status, answer["told"]) == (200, [url])
        thread.join(10)
        assert ended == [(200, "abort")]
        eventually("loads are 0", lambda: set(router.loads().values()) == {0})


def test_logprobs_for_a_real_client(setup: Setup) -> None:
    answer = setup.client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        n=2,
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content
        assert "".join(token.token for token in content) == choice.message.content
        for token in content:
            assert token.logprob <= 0
            assert token.top_logprobs[0].logprob == token.logprob, "greedy takes the likeliest"
            assert len(token.top_logprobs) == 3
