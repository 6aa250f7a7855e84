"""/generate against a scripted driver."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.worker.byte_model import END, write_folder
from tests.worker.http_fixtures import RunningApp, running_app, sse_data
from warmroute_worker import messages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import httpx


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[RunningApp]:
    async with running_app(write_folder(tmp_path)) as app:
        yield app


async def test_text(app: RunningApp) -> None:
    response = await app.post("/generate", text="Grüße", sampling_params={"max_new_tokens": 50, "temperature": 0})
    assert response.status_code == 200
    answer = response.json()
    assert answer["text"] == "Grüße"
    assert answer["output_ids"] == [*"Grüße".encode(), END]
    meta = answer["meta_info"]
    assert meta.pop("e2e_latency") > 0
    assert meta.pop("id")
    assert meta == {
        "finish_reason": {"type": "stop", "matched": END},
        "prompt_tokens": 7,
        "completion_tokens": 8,
        "cached_tokens": 0,
        "dp_rank": 0,
        "weight_version": "default",
    }
    assert response.headers["x-prompt-tokens"] == "7"


async def test_finish_reasons(app: RunningApp) -> None:
    async def finish(**sampling: Any) -> Any:
        answer = (await app.post("/generate", text="abcdef", sampling_params=sampling)).json()
        return answer["meta_info"]["finish_reason"], answer["text"]

    assert await finish(max_new_tokens=3) == ({"type": "length", "length": 3}, "abc")
    assert await finish(stop="de") == ({"type": "stop", "matched": "de"}, "abc")
    assert await finish(stop_token_ids=[ord("e")]) == ({"type": "stop", "matched": ord("e")}, "abcd")
    assert await finish(ignore_eos=True, max_new_tokens=9) == ({"type": "length", "length": 9}, "abcdefab")


async def test_streaming_is_cumulative(app: RunningApp) -> None:
    app.driver.step_seconds = 0.01
    response = await app.post("/generate", text='a"😀b', stream=True)
    assert response.headers["x-cached-tokens"] == "0"
    *events, done = sse_data(response.text)
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert [chunk["text"] for chunk in chunks] == ["a", 'a"', 'a"😀', 'a"😀b', 'a"😀b']
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks] == [*[None] * 4, {"type": "stop", "matched": END}]
    output = [*'a"😀b'.encode(), END]
    assert [chunk["output_ids"] for chunk in chunks] == [output[:n] for n in (1, 2, 6, 7, 8)]
    assert all("index" not in chunk for chunk in chunks)


async def test_batches(app: RunningApp) -> None:
    answers = (await app.post("/generate", text=["one", "three"])).json()
    assert [answer["text"] for answer in answers] == ["one", "three"]
    answers = (await app.post("/generate", input_ids=[[72, 105]])).json()
    assert [answer["text"] for answer in answers] == ["Hi"]
    response = await app.post("/generate", input_ids=[[72], [105]], stream=True)
    last = {chunk["index"]: chunk["text"] for chunk in map(json.loads, sse_data(response.text)[:-1])}
    assert last == {0: "H", 1: "i"}
    assert "x-cached-tokens" not in response.headers


async def test_input_ids_and_defaults(app: RunningApp) -> None:
    answer = (await app.post("/generate", input_ids=[72, 105], rid="ignored", unknown=1)).json()
    assert answer["text"] == "Hi"
    await app.post("/generate", text="a", sampling_params={"sampling_seed": 5, "seed": 6, "top_k": 0})
    first, second = [message for message in app.driver.received if isinstance(message, messages.Generate)]
    assert first.max_new_tokens == 128
    assert first.sampling == messages.Sampling(temperature=1.0, top_k=-1, top_p=1.0, seed=None)
    assert second.sampling == messages.Sampling(temperature=1.0, top_k=-1, top_p=1.0, seed=5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": 3}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": [999]}, "input_ids"),
        ({"input_ids": [True]}, "input_ids[0]"),
        ({"text": "a", "sampling_params": [1]}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"text": "a", "sampling_params": {"min_p": 2}}, "sampling_params.min_p"),
        ({"text": "a", "sampling_params": {"repetition_penalty": 0}}, "sampling_params.repetition_penalty"),
        ({"text": "a", "rid": 3}, "rid"),
        ({"text": "a", "sampling_params": {"regex": "a+"}}, "sampling_params.regex"),
        ({"text": "a", "return_logprob": 1}, "return_logprob"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
        ({"text": ["abc", "a"], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "data_parallel_rank": 3}, "data_parallel_rank"),
        ({"text": "a" * 512}, "text"),
    ],
)
async def test_refusals_name_the_field(app: RunningApp, body: dict[str, Any], param: str) -> None:
    response = await app.post("/generate", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not app.driver.received


async def test_an_abort_ends_the_answer_where_it_is(app: RunningApp) -> None:
    app.driver.step_seconds = 0.01
    long = {"max_new_tokens": 2000, "ignore_eos": True}

    async def ended(path: str, headers: dict[str, str], **body: Any) -> httpx.Response:
        answer = asyncio.create_task(app.client.post(path, json=body, headers=headers))
        await app.until(lambda: len(app.service.engine.live) == 1)
        await app.until(lambda: any(len(state.output_ids) > 3 for state in app.service.engine.live.values()))
        assert (await app.post("/abort_request", rid="nobody")).json() == {"aborted": 0}
        assert (await app.post("/abort_request", rid="min")).json() == {"aborted": 1}
        return await answer

    answer = await ended("/generate", {}, text="abcdef", sampling_params=long, rid="mine-1")
    meta = answer.json()["meta_info"]
    assert meta["id"] == "mine-1"
    assert meta["finish_reason"] == {"type": "abort", "message": "aborted by request"}
    assert 3 < meta["completion_tokens"] < 2000
    assert len(answer.json()["text"]) == meta["completion_tokens"]

    fields = {"max_tokens": 2000, "ignore_eos": True, "prompt": "abcdef"}
    answer = await ended("/v1/completions", {"x-request-id": "mine-2"}, **fields)
    assert answer.json()["choices"][0]["finish_reason"] == "abort"
    answer = await ended("/v1/completions", {}, **fields, stream=True, rid="mine-3")
    *events, done = sse_data(answer.text)
    assert done == "[DONE]"
    assert json.loads(events[-1])["choices"][0]["finish_reason"] == "abort"
    await app.until(lambda: not app.service.engine.live)

    running = [asyncio.create_task(app.post("/generate", text="abc", sampling_params=long)) for _ in range(3)]
    await app.until(lambda: len(app.service.engine.live) == 3)
    assert (await app.post("/abort_request", abort_all=True)).json() == {"aborted": 3}
    assert {(await one).status_code for one in running} == {200}
    assert (await app.post("/abort_request")).status_code == 400


async def test_batches_have_names_too(app: RunningApp) -> None:
    async def names(**body: Any) -> list[str]:
        answer = await app.post("/generate", text=["ab", "cd"], sampling_params={"max_new_tokens": 1}, **body)
        assert answer.status_code == 200, answer.text
        return [one["meta_info"]["id"] for one in answer.json()]

    assert await names(rid="r") == ["r-0", "r-1"]
    assert await names(rid=["x", "y"]) == ["x", "y"]
    assert (await app.post("/generate", text=["ab", "cd"], rid=["x"])).status_code == 400


async def test_tokens_of_a_text_and_back(app: RunningApp) -> None:
    answer = (await app.post("/tokenize", prompt="Grüße")).json()
    assert answer["tokens"] == list("Grüße".encode())
    assert answer["count"] == 7
    assert answer["max_model_len"] > 0
    assert (await app.post("/detokenize", tokens=answer["tokens"])).json() == {"text": "Grüße"}
    assert (await app.post("/detokenize", tokens=[])).json() == {"text": ""}
    for wrong in ({"tokens": "text"}, {"tokens": [10**9]}, {}):
        assert (await app.post("/detokenize", **wrong)).status_code == 400
    assert (await app.post("/tokenize", prompt=[1])).status_code == 400


async def test_health_generate_makes_a_token(app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await app.client.get("/health_generate")).status_code == 200
    asked = [message for message in app.driver.received if isinstance(message, messages.Generate)]
    assert (asked[0].token_ids, asked[0].max_new_tokens) == ([0], 1)
    monkeypatch.setattr("warmroute_worker.http.native.HEALTH_SECONDS", 0.1)
    app.driver.step_seconds = 5.0
    answer = await app.client.get("/health_generate")
    assert answer.status_code == 503
    assert "no token was made within 0.1 s" in answer.json()["error"]["message"]


async def test_logprobs(app: RunningApp) -> None:
    app.driver.tokens_per_step = 1
    answer = (await app.post("/generate", text="ab", return_logprob=True, top_logprobs_num=2)).json()
    meta = answer["meta_info"]
    assert meta["output_token_logprobs"] == [[-0.5, token, None] for token in answer["output_ids"]]
    assert meta["output_top_logprobs"][0] == [[-0.5, ord("a"), None], [-1.5, ord("z"), None]]
    assert meta["input_token_logprobs"] == meta["input_top_logprobs"] == []
    silent = await app.post("/generate", text="ab", logprob_start_len=0)
    assert not [name for name in silent.json()["meta_info"] if "logprob" in name]


async def test_logprobs_of_the_prompt(app: RunningApp) -> None:
    """From `logprob_start_len` on; of the first token there nothing is said, as in SGLang."""
    app.driver.tokens_per_step = 1
    app.driver.step_seconds = 0.01
    asking: dict[str, Any] = {"text": "abcd", "return_logprob": True, "top_logprobs_num": 1}

    async def told(**changes: Any) -> Any:
        return (await app.post("/generate", **(asking | changes))).json()

    meta = (await told(logprob_start_len=0))["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 97, None], [-1.0, 98, None], [-2.0, 99, None], [-3.0, 100, None]]
    assert meta["input_top_logprobs"] == [None, *[[[-0.25, ord("y"), None]]] * 3]
    assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
    later = (await told(logprob_start_len=2))["meta_info"]
    assert later["input_token_logprobs"] == [[None, 99, None], [-3.0, 100, None]]
    for start, expected in ((3, [[None, 100, None]]), (4, [])):
        assert (await told(logprob_start_len=start))["meta_info"]["input_token_logprobs"] == expected
    both = await told(logprob_start_len=0, sampling_params={"n": 2})
    assert [answer["meta_info"]["input_token_logprobs"] for answer in both] == [meta["input_token_logprobs"]] * 2

    for batch in ("abcd", ["abcd"]):
        response = await app.post("/generate", **asking | {"text": batch}, logprob_start_len=0, stream=True)
        events = [json.loads(event)["meta_info"] for event in sse_data(response.text)[:-1]]
        assert len(events) > 1
        for event in events:
            assert event["input_token_logprobs"] == meta["input_token_logprobs"]
            assert event["input_top_logprobs"] == meta["input_top_logprobs"]
