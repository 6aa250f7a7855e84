"""OpenAI's endpoints against a scripted driver: shapes, streaming, stop strings, caching, refusals."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.worker.byte_model import ASSISTANT, SYSTEM, USER, byte_fallback_tokenizer, chat_ids, write_folder
from tests.worker.http_fixtures import RunningApp, running_app, sse_data
from warmroute_worker import messages
from warmroute_worker.http import logprobs
from warmroute_worker.http.app import MAX_BODY_BYTES
from warmroute_worker.messages import TokenLogprobs
from warmroute_worker.request_state import RequestState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[RunningApp]:
    async with running_app(write_folder(tmp_path)) as app:
        yield app


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def test_chat(app: RunningApp) -> None:
    response = await app.post("/v1/chat/completions", model="any name", messages=user("Grüße! 😀"), max_tokens=100)
    assert response.status_code == 200
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "any name"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"] == {"role": "assistant", "content": "Grüße! 😀"}
    assert choice["finish_reason"] == "stop"
    prompt = chat_ids((USER, "Grüße! 😀"))
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len("Grüße! 😀".encode()) + 1,
        "total_tokens": len(prompt) + len("Grüße! 😀".encode()) + 1,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert response.headers["x-prompt-tokens"] == str(len(prompt))
    assert response.headers["x-cached-tokens"] == "0"
    (generate,) = [message for message in app.driver.received if isinstance(message, messages.Generate)]
    assert list(generate.token_ids) == prompt
    assert generate.max_new_tokens == 100


async def test_what_the_engine_is_asked_for(app: RunningApp) -> None:
    await app.post(
        "/v1/chat/completions",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "c"},
        ],
        max_completion_tokens=7,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=-1,
        stop_token_ids=[65],
        ignore_eos=True,
        something_else={"unknown": [1]},
        user="me",
        n=1,
        tools=[],
        response_format={"type": "text"},
    )
    (generate,) = [message for message in app.driver.received if isinstance(message, messages.Generate)]
    assert list(generate.token_ids) == chat_ids((SYSTEM, "be brief"), (USER, "ab"), (ASSISTANT, ""), (USER, "c"))
    assert generate.max_new_tokens == 7
    assert generate.ignore_eos
    assert list(generate.stop_token_ids) == [65]
    assert generate.sampling == messages.Sampling(temperature=0.5, top_k=40, top_p=0.9, seed=(1 << 63) - 1)


async def test_defaults(app: RunningApp) -> None:
    await app.post("/v1/chat/completions", messages=user("a"))
    await app.post("/v1/completions", prompt="a")
    chat, completion = [message for message in app.driver.received if isinstance(message, messages.Generate)]
    assert chat.max_new_tokens == 512 - len(chat_ids((USER, "a")))
    assert completion.max_new_tokens == 16
    for generate in (chat, completion):
        assert generate.sampling == messages.Sampling(temperature=1.0, top_k=-1, top_p=1.0, seed=None)
        assert not generate.ignore_eos


async def test_streaming_chat(app: RunningApp) -> None:
    app.driver.step_seconds = 0.01  # or a write would hold the text of several steps
    body = {"messages": user("Grüße"), "stream": True, "stream_options": {"include_usage": True}}
    response = await app.post("/v1/chat/completions", **body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-prompt-tokens"] == str(len(chat_ids((USER, "Grüße"))))
    assert response.headers["x-cached-tokens"] == "0"
    *events, done = sse_data(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    *deltas, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len("Grüße".encode()) + 1
    assert deltas[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in deltas[1:-1]]
    assert pieces == list("Grüße"), "one chunk per character, never half of one"
    assert deltas[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


async def test_the_head_comes_with_the_first_token_and_chunks_with_their_steps(app: RunningApp) -> None:
    app.driver.step_seconds = 0.05
    app.driver.paused.set()
    request = app.client.build_request("POST", "/v1/completions", json={"prompt": "abcdef", "stream": True})
    sending = asyncio.create_task(app.client.send(request, stream=True))
    await asyncio.sleep(0.2)
    assert not sending.done(), "no head before the first token"
    app.driver.paused.clear()
    response = await sending
    times = [asyncio.get_running_loop().time() async for line in response.aiter_lines() if line]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[:6])]
    assert all(0.02 < gap < 0.5 for gap in gaps), gaps


async def test_completions_of_several_prompts(app: RunningApp) -> None:
    prompts = ["one", "three"]
    answer = (await app.post("/v1/completions", prompt=prompts)).json()
    assert answer["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "one"), (1, "three")]
    assert answer["usage"]["prompt_tokens"] == 8
    response = await app.post("/v1/completions", prompt=prompts, stream=True)
    texts = {0: "", 1: ""}
    finishes = {}
    *events, done = sse_data(response.text)
    assert done == "[DONE]"
    for choice in (json.loads(event)["choices"][0] for event in events):
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            finishes[choice["index"]] = choice["finish_reason"]
    assert texts == {0: "one", 1: "three"}
    assert finishes == {0: "stop", 1: "stop"}


async def test_completions_of_token_ids(app: RunningApp) -> None:
    answer = (await app.post("/v1/completions", prompt=[72, 105, 300])).json()
    assert answer["choices"][0]["text"] == "Hi", "an id outside the tokenizer is no text"
    assert answer["usage"]["completion_tokens"] == 4
    answer = (await app.post("/v1/completions", prompt=[[72], [105]])).json()
    assert [choice["text"] for choice in answer["choices"]] == ["H", "i"]


async def test_length_and_half_a_character(app: RunningApp) -> None:
    answer = (await app.post("/v1/completions", prompt="ab😀cd", max_tokens=4)).json()
    assert answer["choices"][0] == {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("STOP", "say S ST STO "),
        (["nothing", "TO S"], "say S ST S"),
        ([" STOP and", "STOP"], "say S ST STO "),
        ("absent", "say S ST STO STOP and STO"),
        ("STO\n", "say S ST STO STOP and STO"),
    ],
)
async def test_stop_strings(
    tmp_path: Path, tokens_per_step: int, stream: bool, stop: str | list[str], text: str
) -> None:
    async with running_app(write_folder(tmp_path), tokens_per_step=tokens_per_step) as app:
        prompt = "say S ST STO STOP and STO"
        response = await app.post("/v1/completions", prompt=prompt, stop=stop, max_tokens=100, stream=stream)
        if stream:
            chunks = [json.loads(event) for event in sse_data(response.text)[:-1]]
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        else:
            assert response.json()["choices"][0]["text"] == text
            assert response.json()["choices"][0]["finish_reason"] == "stop"
        assert not app.service.engine.live
        if text != prompt and tokens_per_step == 1:
            await app.driver_has_received(messages.Abort)


async def test_cached_tokens_of_the_second_turn(app: RunningApp) -> None:
    first = user("a question of some length, more than a page")
    await app.post("/v1/chat/completions", messages=first)
    second = [*first, {"role": "assistant", "content": "yes"}, *user("and?")]
    response = await app.post("/v1/chat/completions", messages=second)
    expected = (len(chat_ids((USER, first[0]["content"]))) - 1) // 16 * 16
    assert expected >= 32
    assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == expected
    assert response.headers["x-cached-tokens"] == str(expected)
    streamed = await app.post("/v1/chat/completions", messages=second, stream=True)
    assert int(streamed.headers["x-cached-tokens"]) >= expected


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hi"}, "messages"),
        ("chat/completions", {"messages": ["hi"]}, "messages[0]"),
        ("chat/completions", {"messages": [{"content": "hi"}]}, "messages[0]"),
        ("chat/completions", {"messages": user(None)}, "messages[0].content"),
        ("chat/completions", {"messages": user([{"type": "image_url"}])}, "messages[0].content[0]"),
        ("chat/completions", {"messages": user([{"type": "text"}])}, "messages[0].content[0].text"),
        ("chat/completions", {"messages": [{"role": "wizard", "content": "hi"}]}, "messages"),
        ("chat/completions", {"messages": user("\ud800")}, "messages"),
        ("chat/completions", {"messages": user("a"), "tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"messages": user("a"), "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"messages": user("a"), "n": 1000}, "n"),
        ("chat/completions", {"messages": user("a"), "frequency_penalty": 3}, "frequency_penalty"),
        ("chat/completions", {"messages": user("a"), "logit_bias": {"a": 1}}, "logit_bias"),
        ("chat/completions", {"messages": user("a"), "logit_bias": {"100000": 1}}, "logit_bias"),
        ("chat/completions", {"messages": user("a"), "logit_bias": {"1": 101}}, "logit_bias"),
        ("chat/completions", {"messages": user("a"), "min_tokens": -1}, "min_tokens"),
        ("chat/completions", {"messages": user("a"), "logprobs": 3}, "logprobs"),
        ("chat/completions", {"messages": user("a"), "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"messages": user("a"), "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("completions", {"prompt": "a", "logprobs": -1}, "logprobs"),
        ("chat/completions", {"messages": user("a"), "model": 3}, "model"),
        ("chat/completions", {"messages": user("a"), "max_tokens": -1}, "max_tokens"),
        ("chat/completions", {"messages": user("a"), "max_completion_tokens": "9"}, "max_completion_tokens"),
        ("chat/completions", {"messages": user("a"), "temperature": -1}, "temperature"),
        ("chat/completions", {"messages": user("a"), "temperature": True}, "temperature"),
        ("chat/completions", {"messages": user("a"), "top_p": 1.5}, "top_p"),
        ("chat/completions", {"messages": user("a"), "top_k": -2}, "top_k"),
        ("chat/completions", {"messages": user("a"), "seed": 0.5}, "seed"),
        ("chat/completions", {"messages": user("a"), "stop": ""}, "stop"),
        ("chat/completions", {"messages": user("a"), "stop": [3]}, "stop"),
        ("chat/completions", {"messages": user("a"), "stop_token_ids": "x"}, "stop_token_ids"),
        ("chat/completions", {"messages": user("a"), "ignore_eos": 1}, "ignore_eos"),
        ("chat/completions", {"messages": user("a"), "stream": "yes"}, "stream"),
        ("chat/completions", {"messages": user("a"), "stream": True, "stream_options": 1}, "stream_options"),
        ("chat/completions", {"messages": user("a"), "routed_dp_rank": 1}, "routed_dp_rank"),
        ("chat/completions", {"messages": user("a" * 600)}, "messages"),
        ("completions", {}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ["a", 3]}, "prompt[1]"),
        ("completions", {"prompt": [1, -3]}, "prompt"),
        ("completions", {"prompt": [[1], [320]]}, "prompt[1]"),
        ("completions", {"prompt": "a" * 512}, "prompt"),
        ("completions", {"prompt": "a", "echo": True, "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "echo": "yes"}, "echo"),
        ("completions", {"prompt": "a", "priority": "high"}, "priority"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ],
)
async def test_refusals_name_the_field(app: RunningApp, path: str, body: dict[str, Any], param: str) -> None:
    content = json.dumps(body)
    response = await app.client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert not app.driver.received, "nothing reached the engine"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000])
async def test_bodies_that_are_no_json_objects(app: RunningApp, content: bytes) -> None:
    response = await app.client.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the body")


async def test_bodies_that_are_too_large(app: RunningApp) -> None:
    response = await app.client.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


async def test_a_tokenizer_that_takes_its_time(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    byte_fallback_tokenizer().save(str(folder / "tokenizer.json"))
    async with running_app(folder) as app:
        answer = (await app.post("/v1/completions", prompt="ab é", max_tokens=50)).json()
        assert answer["usage"]["prompt_tokens"] == 5
        refused = await app.post("/v1/completions", prompt="ab é" * 5000)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        refused = await app.post("/v1/chat/completions", messages=user("\udfff" * 10_000))
        assert refused.json()["error"]["param"] == "messages"


async def test_a_prompt_may_fill_the_context_but_for_one_token(app: RunningApp) -> None:
    response = await app.post("/v1/completions", prompt="a" * 511, max_tokens=50, ignore_eos=True)
    assert response.json()["usage"]["completion_tokens"] == 1
    assert response.json()["choices"][0]["finish_reason"] == "length"


async def test_an_engine_error_is_500_or_the_end_of_the_stream(app: RunningApp) -> None:
    for prompt in ("!error later", "!error at once"):
        response = await app.post("/v1/completions", prompt=prompt)
        assert response.status_code == 500
        assert response.json()["error"] == {
            "message": "the page burst",
            "type": "server_error",
            "code": "generation_failed",
            "param": None,
        }
    response = await app.post("/v1/completions", prompt="!error at once", stream=True)
    assert response.status_code == 500, "not begun, so it can still be said properly"
    app.driver.step_seconds = 0.02
    client = openai.AsyncOpenAI(base_url=app.url + "/v1", api_key="none", max_retries=0)
    stream = await client.completions.create(model="tiny", prompt="!error later", stream=True)
    texts: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].text)  # noqa: PERF401 (what came before the error counts)

    with pytest.raises(openai.APIError, match="the page burst"):
        await read()
    assert "".join(texts) == "!er"
    await client.close()


async def test_the_openai_client(app: RunningApp) -> None:
    async with openai.AsyncOpenAI(base_url=app.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        answer = await client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "héé"}])
        assert answer.choices[0].message.content == "héé"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "héé"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
        assert text == "héé"
        assert usage is not None
        assert usage.prompt_tokens == len(chat_ids((USER, "héé")))
        with pytest.raises(openai.BadRequestError, match="at most 511"):
            await client.completions.create(model="tiny", prompt="a" * 1000)


async def test_several_answers_to_one_prompt(app: RunningApp) -> None:
    body = {"messages": user("ab"), "n": 3, "seed": 5, "temperature": 1, "stream_options": {"include_usage": True}}
    answer = (await app.post("/v1/chat/completions", **body)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    asked = [message for message in app.driver.received if isinstance(message, messages.Generate)]
    assert [message.sampling.seed for message in asked] == [5, 6, 7]
    assert len({message.rid for message in asked}) == 3
    assert answer["usage"]["prompt_tokens"] == len(asked[0].token_ids), "a prompt counts once"
    assert answer["usage"]["completion_tokens"] == sum(3 for _ in range(3))

    response = await app.post("/v1/completions", prompt=["ab", "cd"], n=2, stream=True)
    events = [json.loads(event) for event in sse_data(response.text)[:-1]]
    texts = dict.fromkeys(range(4), "")
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "ab", 1: "ab", 2: "cd", 3: "cd"}


async def test_penalties_reach_the_engine(app: RunningApp) -> None:
    fields = {"min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.2}
    await app.post("/v1/completions", prompt="a", min_tokens=1, logit_bias={"7": 1, "8": -2.5}, **fields)
    (asked,) = [message for message in app.driver.received if isinstance(message, messages.Generate)]
    given = asked.sampling
    assert (given.min_p, given.frequency_penalty, given.presence_penalty, given.repetition_penalty) == (
        *(0.1, 0.5, -0.5),
        1.2,
    )
    assert (given.logit_bias, given.min_new_tokens) == (((7, 1.0), (8, -2.5)), 1)


async def test_logprobs_of_a_chat(app: RunningApp) -> None:
    app.driver.tokens_per_step = 1
    body = {"messages": user("aé"), "logprobs": True, "top_logprobs": 2}
    choice = (await app.post("/v1/chat/completions", **body)).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == choice["message"]["content"]
    assert [token["logprob"] for token in content] == [-0.5] * len(content), "the token that ended it is not told"
    assert content[0]["top_logprobs"] == [
        {"token": content[0]["token"], "logprob": -0.5, "bytes": content[0]["bytes"]},
        {"token": "z", "logprob": -1.5, "bytes": [122]},
    ]
    silent = (await app.post("/v1/chat/completions", messages=user("aé"))).json()["choices"][0]
    assert silent["logprobs"] is None

    response = await app.post("/v1/chat/completions", **body, stream=True)
    events = [json.loads(event) for event in sse_data(response.text)[:-1]]
    told = [
        entry for event in events for c in event["choices"] for entry in (c["logprobs"] or {"content": []})["content"]
    ]
    assert told == content, "the same tokens, each once, also where a character takes two"


async def test_logprobs_of_a_completion(app: RunningApp) -> None:
    app.driver.tokens_per_step = 1
    choice = (await app.post("/v1/completions", prompt="abc", logprobs=1)).json()["choices"][0]
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == choice["text"] == "abc"
    assert told["text_offset"] == [0, 1, 2]
    assert told["token_logprobs"] == [-0.5] * 3
    assert told["top_logprobs"] == [{"a": -0.5}, {"b": -0.5}, {"c": -0.5}]
    response = await app.post("/v1/completions", prompt="abc", logprobs=1, stream=True)
    events = [json.loads(event)["choices"][0] for event in sse_data(response.text)[:-1]]
    assert [offset for event in events if event["logprobs"] for offset in event["logprobs"]["text_offset"]] == [0, 1, 2]


async def test_logprobs_of_an_echoed_prompt(app: RunningApp) -> None:
    """Prompt and answer together, the token that ended it included: who scores a prompt takes off what is new."""
    app.driver.tokens_per_step = 1
    app.driver.step_seconds = 0.01
    body = {"prompt": "aéb", "echo": True, "logprobs": 1}
    answer = (await app.post("/v1/completions", **body)).json()
    choice, usage = answer["choices"][0], answer["usage"]
    told = choice["logprobs"]
    assert choice["text"] == "aébaéb"
    assert told["token_logprobs"] == [None, -1.0, -2.0, -3.0, *[-0.5] * 5]
    assert len(told["tokens"]) == usage["prompt_tokens"] + usage["completion_tokens"]
    half = "\ufffd"
    assert told["tokens"] == [*["a", half, half, "b"] * 2, ""]
    assert told["top_logprobs"] == [
        None,
        *[{"y": -0.25}] * 3,
        {"a": -0.5},
        *[{half: -0.5}] * 2,
        {"b": -0.5},
        {"": -0.5},
    ]
    assert told["text_offset"][:5] == [0, 1, 1, 2, 3], "of the prompt also where a character takes two tokens"
    [first, *_] = (await app.post("/v1/completions", **body | {"logprobs": 2, "max_tokens": 1})).json()["choices"]
    assert first["logprobs"]["top_logprobs"][1] == {"y": -0.25, half: -1.0}

    response = await app.post("/v1/completions", **body, stream=True)
    events = [json.loads(event)["choices"][0] for event in sse_data(response.text)[:-1]]
    assert "".join(event["text"] for event in events) == choice["text"]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert [value for event in events if event["logprobs"] for value in event["logprobs"][name]] == told[name]
    assert events[0]["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]
    silent = (await app.post("/v1/completions", prompt="ab", echo=True)).json()["choices"][0]
    assert silent["logprobs"] is None


async def test_of_tokens_with_the_same_text_the_likeliest_is_told(app: RunningApp) -> None:
    state = RequestState("r", "r", 1, app.service.tokenizer.detokenizer([]), (), frozenset(), asyncio.Event(), True, 0)
    state.tells_logprobs = True
    state.advance([97], "length", 0, None, TokenLogprobs(-0.5, [(0xC3, -0.5), (0xA9, -1.0), (97, -2.0)]))
    told = logprobs.of_completion(app.service.tokenizer, state, 0, 0)
    assert told is not None
    assert told["top_logprobs"] == [{"\ufffd": -0.5, "a": -2.0}]


@pytest.mark.parametrize("stops", [("cd",), ("bx", "c"), ("d", "cdef"), ("nothing",), ("f",), ()])
@pytest.mark.parametrize("at_a_time", [1, 2, 3, 7])
@pytest.mark.parametrize("streams", [False, True])
async def test_a_stop_string_ends_the_tokens_however_many_come_at_a_time(
    app: RunningApp, stops: tuple[str, ...], at_a_time: int, streams: bool
) -> None:
    """What the engine has computed behind it is neither told nor counted."""

    def state() -> RequestState:
        detokenizer = app.service.tokenizer.detokenizer([])
        return RequestState("r", "r", 1, detokenizer, stops, frozenset(), asyncio.Event(), streams, 0)

    tokens, one, other = list(b"abcdefg"), state(), state()
    for token in tokens:
        if one.finish is None:
            one.advance([token], "length" if token == tokens[-1] else None, 0, None)
    pieces = []
    for at in range(0, len(tokens), at_a_time):
        if other.finish is None:
            some = tokens[at : at + at_a_time]
            other.advance(some, "length" if some[-1] == tokens[-1] else None, 0, None)
            pieces += other.take_pieces()
    assert (other.output_ids, other.finish) == (one.output_ids, one.finish)
    assert "".join(piece.text for piece in pieces) == one.take_text()
    if streams and not stops:
        assert pieces == [(chr(token), number) for number, token in enumerate(tokens, 1)]


async def test_what_a_slow_reader_missed_comes_in_one_piece(app: RunningApp) -> None:
    detokenizer = app.service.tokenizer.detokenizer([])
    state = RequestState("r", "r", 1, detokenizer, (), frozenset(), asyncio.Event(), True, 0)
    state.advance(list(b"ab"), None, 0, None)
    state.advance(list(b"cde"), None, 0, None)
    assert state.take_pieces() == [("abcde", 5)]
    state.advance(list(b"fg"), "length", 0, None)
    assert state.take_pieces() == [("f", 6), ("g", 7)]


async def test_echo_puts_the_prompt_before_the_answer(tmp_path: Path) -> None:
    async with running_app(write_folder(tmp_path)) as app:
        answer = (await app.post("/v1/completions", prompt=["ab", [99, 100]], max_tokens=9, echo=True)).json()
        assert [choice["text"] for choice in answer["choices"]] == ["abab", "cdcd"]
        assert answer["usage"]["prompt_tokens"] == 4
        stream = await app.post("/v1/completions", prompt="ab", max_tokens=9, echo=True, stream=True, stop="b")
        texts = [json.loads(data)["choices"][0]["text"] for data in sse_data(stream.text)[:-1]]
        assert "".join(texts) == "aba"
