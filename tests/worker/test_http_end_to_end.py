"""`launch_worker` with its real engine on a random Llama, against transformers: nothing is scripted here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.worker.byte_model import END, USER, VOCAB_SIZE, chat_ids, write_tokenizer
from tests.worker.worker_process import WorkerProcess, children, health, lives, until, worker_process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Importing torch, twice, on a busy machine.
pytestmark = pytest.mark.timeout(180)

DRIVER = "warmroute_worker.engine_process"
PROMPT_LENGTHS = [1, 2, 15, 16, 17, 40, 77, 130]
NEW_TOKENS = 32


@dataclass(frozen=True)
class Model:
    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]
    logprobs: list[list[float]]
    """Of each prompt's tokens but the first."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Made in a process of its own: transformers and torch would stay in this one."""
    folder = tmp_path_factory.mktemp("llama")
    write_tokenizer(folder)
    script = f"""
import json, random, torch, warnings
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(7); torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size={VOCAB_SIZE}, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, tie_word_embeddings=False,
    bos_token_id=256, eos_token_id={END}, pad_token_id=0,
)
model = LlamaForCausalLM(config).float().eval()
model.save_pretrained({str(folder)!r})
draw = random.Random(3)
prompts = [[draw.randrange(256) for _ in range(length)] for length in {PROMPT_LENGTHS}]
answers, logprobs = [], []
for prompt in prompts:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        shares = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
    logprobs.append(shares.gather(1, ids[0, 1:, None])[:, 0].tolist())
    for _ in range({NEW_TOKENS}):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    answers.append(ids[0, len(prompt):].tolist())
print(json.dumps([prompts, answers, logprobs]))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    prompts, expected, logprobs = json.loads(output.splitlines()[-1])
    assert len({tuple(answer) for answer in expected}) == len(expected), "the answers depend on the prompts"
    assert all(len(set(answer)) > 5 for answer in expected), "and are not one token over and over"
    return Model(folder, prompts, expected, logprobs)


@pytest.fixture(scope="module")
def worker(model: Model) -> Iterator[WorkerProcess]:
    with worker_process(*arguments(model)) as process:
        process.url(120)
        yield process


@pytest.fixture
def client(worker: WorkerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=worker.url(), timeout=60) as client:
        client.post("/flush_cache").raise_for_status()
        yield client


def arguments(model: Model, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--max-total-tokens", "8192", "--port", "0"]
    return ["--model-path", str(model.folder), "--served-model-name", "tiny", *fixed, *more]


def greedy(client: httpx.Client, prompt: list[int], new_tokens: int = NEW_TOKENS, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    response = client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling, **more})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_greedy_tokens_are_those_of_transformers_cold_and_warm(model: Model, client: httpx.Client) -> None:
    for prompt, expected in zip(model.prompts, model.expected, strict=True):
        cold = greedy(client, prompt)
        assert cold["output_ids"] == expected
        assert cold["meta_info"]["cached_tokens"] == 0
        warm = greedy(client, prompt)
        assert warm["output_ids"] == expected
        assert warm["meta_info"]["cached_tokens"] == (len(prompt) - 1) // 16 * 16
        following = greedy(client, [*prompt, *expected[:16]], new_tokens=16)
        assert following["output_ids"] == expected[16:], "on top of what the worker has generated itself"
        assert following["meta_info"]["cached_tokens"] == (len(prompt) + 15) // 16 * 16


def test_prompts_are_scored_as_evaluation_harnesses_do(model: Model, client: httpx.Client) -> None:
    """Context and continuation echoed with logprobs, and the one token that is generated taken off at the end; cold and
    with the prompts cached."""
    body = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "prompt": model.prompts}
    for _ in range(2):
        choices = client.post("/v1/completions", json=body).json()["choices"]
        for prompt, expected, choice in zip(model.prompts, model.logprobs, choices, strict=True):
            told, context = choice["logprobs"], max(len(prompt) // 2, 1)
            scores = told["token_logprobs"][context:-1]
            assert scores == pytest.approx(expected[context - 1 :], abs=1e-3)
            likeliest = [max(top.values()) for top in told["top_logprobs"][context:-1]]
            assert all(score <= best for score, best in zip(scores, likeliest, strict=True))
            assert len(told["tokens"]) == len(prompt) + 1
    answer = client.post("/v1/completions", json=body | {"max_tokens": 0}).json()
    assert answer["usage"]["completion_tokens"] == 0
    for one, none in zip(choices, answer["choices"], strict=True):
        assert none["finish_reason"] == "length"
        assert len(none["logprobs"]["tokens"]) == len(one["logprobs"]["tokens"]) - 1
        assert none["logprobs"]["token_logprobs"][1:] == pytest.approx(
            one["logprobs"]["token_logprobs"][1:-1], abs=1e-3
        )
    asking = {"return_logprob": True, "logprob_start_len": 0}
    for prompt, expected in zip(model.prompts, model.logprobs, strict=True):
        first, *others = greedy(client, prompt, 1, **asking)["meta_info"]["input_token_logprobs"]
        assert first == [None, prompt[0], None]
        none = greedy(client, prompt, 0, **asking)
        assert (none["output_ids"], none["text"]) == ([], "")
        assert none["meta_info"]["output_token_logprobs"] == []
        assert [logprob for logprob, _, _ in none["meta_info"]["input_token_logprobs"][1:]] == pytest.approx(
            expected, abs=1e-3
        )
        assert [token for _, token, _ in others] == prompt[1:]
        assert [logprob for logprob, _, _ in others] == pytest.approx(expected, abs=1e-3)


def test_logprobs_of_answers_without_tokens_are_empty_lists(client: httpx.Client) -> None:
    told = greedy(client, [1, 2, 3], 0, return_logprob=True)["meta_info"]
    names = ("input_token_logprobs", "input_top_logprobs", "output_token_logprobs", "output_top_logprobs")
    assert [told[name] for name in names] == [[]] * 4
    body = {"prompt": [1, 2, 3], "max_tokens": 0, "logprobs": 1}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert "output_token_logprobs" not in greedy(client, [1, 2, 3], 0)["meta_info"]


def test_queue_times_are_what_clients_see(client: httpx.Client) -> None:
    """Requests that come while the worker is paused wait until it goes on."""
    queue, stage = "sglang:queue_time_seconds", "sglang:per_stage_req_latency_seconds"

    def scrape() -> dict[str, float]:
        text = client.get("/metrics").text
        families = text_string_to_metric_families(text)
        samples = [sample for family in families for sample in family.samples if "le" not in sample.labels]
        return {f"{sample.name} {sample.labels.get('stage', '')}".strip(): sample.value for sample in samples}

    def ask(length: int) -> float:
        began = time.monotonic()
        greedy(client, list(range(length)), 1)
        return time.monotonic() - began

    before = scrape()
    client.post("/pause_generation", json={"mode": "in_place"}).raise_for_status()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, length) for length in (3, 40, 80, 120)]
        until(lambda: client.get("/get_load").json()[0]["num_reqs"] == 4, 20)
        all_there = time.monotonic()
        time.sleep(0.5)
        client.post("/continue_generation").raise_for_status()
        paused = time.monotonic() - all_there
        seen = sum(future.result() for future in asked)
    after = scrape()
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change[queue + "_count"] == change["sglang:num_requests_total"] == 4
    # The clients' count also has the way there and back, and what was computed.
    assert 4 * 0.5 <= change[queue + "_sum"] <= seen
    assert seen - change[queue + "_sum"] < 4 * paused
    assert change[f"{stage}_sum prefill_waiting"] == pytest.approx(change[queue + "_sum"])
    assert 0 < change[f"{stage}_sum prefill_forward"] <= seen - change[queue + "_sum"]


def test_all_at_once_and_streamed(model: Model, client: httpx.Client) -> None:
    def stream(prompt: list[int]) -> list[int]:
        body = {
            "input_ids": prompt,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        }
        with client.stream("POST", "/generate", json=body) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
            assert response.headers["x-prompt-tokens"] == str(len(prompt))
        assert events[-1] == "[DONE]"
        ids: list[int] = json.loads(events[-2])["output_ids"]
        return ids

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stream, model.prompts)) == model.expected
        answers = list(pool.map(lambda prompt: greedy(client, prompt)["output_ids"], model.prompts))
        assert answers == model.expected


def test_usage_is_what_an_independent_count_gives(client: httpx.Client, worker: WorkerProcess) -> None:
    question = "How many tokens has this sentence, do you think?"
    with openai.OpenAI(base_url=worker.url() + "/v1", api_key="none", max_retries=0) as chat:
        for cached in (0, (len(chat_ids((USER, question))) - 1) // 16 * 16):
            answer = chat.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=5,
                extra_body={"ignore_eos": True},
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(chat_ids((USER, question)))
            assert answer.usage.completion_tokens == 5
            assert answer.usage.prompt_tokens_details is not None
            assert answer.usage.prompt_tokens_details.cached_tokens == cached
    text = client.get("/metrics").text
    assert "sglang:cached_tokens_total" in text


def test_seeds_and_temperature(model: Model, client: httpx.Client) -> None:
    def sample(**sampling: Any) -> list[int]:
        parameters = {"max_new_tokens": 24, "ignore_eos": True, **sampling}
        body = {"input_ids": model.prompts[3], "sampling_params": parameters}
        ids: list[int] = client.post("/generate", json=body).json()["output_ids"]
        return ids

    assert sample(temperature=2.0, seed=1) == sample(temperature=2.0, seed=1)
    assert sample(temperature=2.0, seed=1) != sample(temperature=2.0, seed=2)
    assert sample(temperature=2.0, top_k=1) == model.expected[3][:24]


def test_eos_and_stop_token_ids_end_an_answer(model: Model, client: httpx.Client) -> None:
    expected = model.expected[5]
    sampling = {"temperature": 0, "max_new_tokens": 32, "stop_token_ids": [expected[4]]}
    answer = client.post("/generate", json={"input_ids": model.prompts[5], "sampling_params": sampling}).json()
    end = expected.index(expected[4]) + 1
    if END not in expected[:end]:
        assert answer["output_ids"] == expected[:end]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": expected[4]}


def test_each_event_is_an_answer_up_to_a_token(model: Model, client: httpx.Client) -> None:
    """However many tokens came together, and however late they are sent."""
    sampling = {"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
    body = {"input_ids": model.prompts[5], "sampling_params": sampling, "stream": True}
    events = sse(client.post("/generate", json=body).text)
    assert events[-1]["output_ids"] == model.expected[5]
    assert [event["output_ids"] for event in events] == [
        model.expected[5][: event["meta_info"]["completion_tokens"]] for event in events
    ]
    assert [event["text"] for event in events] == [events[-1]["text"][: len(event["text"])] for event in events]
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 32}
    counts = [event["meta_info"]["completion_tokens"] for event in events]
    assert counts == sorted(set(counts))
    body = {"model": "m", "prompt": model.prompts[5], "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    events = sse(client.post("/v1/completions", json=body | {"stream": True}).text)
    assert (
        "".join(event["choices"][0]["text"] for event in events)
        == client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    )
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]


def sse(text: str) -> list[dict[str, Any]]:
    """The events but the end mark."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert found.pop() == "[DONE]"
    return [json.loads(event) for event in found]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_sees_tokens_when_they_are_made(worker: WorkerProcess) -> None:
    body = {"prompt": "some text", "stream": True, "max_tokens": 200, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    command = ["curl", "-sN", "--fail", worker.url() + "/v1/completions", "-d", json.dumps(body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        times = [time.monotonic() for line in process.stdout if line.startswith("data: ")]
    assert process.returncode == 0
    assert len(times) > 50
    half, whole = times[len(times) // 2] - times[0], times[-1] - times[0]
    assert whole > 0.02
    assert 0.1 * whole < half < 0.9 * whole, "spread over the time that the answer took"


def test_a_client_that_leaves_frees_its_pages(client: httpx.Client) -> None:
    def load() -> tuple[int, int]:
        (load,) = client.get("/v1/loads").json()["loads"]
        return load["num_total_reqs"], load["num_used_tokens"]

    body = {"prompt": "x" * 300, "stream": True, "max_tokens": 700, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        requests, used = load()
        assert requests == 1
        assert used >= 300
    assert until(lambda: load() == (0, 0), 5) < 0.5


def test_the_cache_is_flushed_only_when_idle(model: Model, client: httpx.Client) -> None:
    prompt = model.prompts[-1]
    greedy(client, prompt)
    body = {"prompt": "x" * 30, "stream": True, "max_tokens": 900, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # dropping this iterator would close the connection
        next(lines)
        assert client.post("/flush_cache").status_code == 400
    until(lambda: client.get("/get_load").json()[0]["num_reqs"] == 0, 5)
    assert greedy(client, prompt)["meta_info"]["cached_tokens"] == 128
    assert client.get("/flush_cache").status_code == 200
    assert greedy(client, prompt)["meta_info"]["cached_tokens"] == 0


def test_too_long_prompts_are_refused_at_once(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "x" * 1024})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    answer = client.post("/v1/completions", json={"prompt": "x" * 1020, "max_tokens": 50, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 4


def test_what_was_asked_for_and_what_is_used(client: httpx.Client, model: Model) -> None:
    info = client.get("/server_info").json()
    assert info["requested"]["max_total_tokens"] == 8192
    assert info["effective"]["device"] == "cpu"
    assert info["effective"]["dtype"] == "float32"
    assert info["effective"]["context_length"] == 1024
    weights = os.path.getsize(model.folder / "model.safetensors")  # noqa: PTH202 (one line)
    assert 0.9 * weights < info["effective"]["weight_bytes"] <= weights
    assert client.get("/model_info").json()["architectures"] == ["LlamaForCausalLM"]


def test_a_killed_driver(model: Model) -> None:
    with worker_process(*arguments(model)) as worker:
        url = worker.url(120)
        driver = worker.child(DRIVER)
        pids = children(worker.process.pid)
        body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True}
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(url + "/v1/completions", json=body, timeout=60))
        )
        thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 5)
        os.kill(driver, signal.SIGKILL)
        assert until(lambda: health(url) == 503, 1) < 1
        assert worker.wait(5) == 1
        thread.join(5)
        assert answers[0].status_code == 503
    assert (
        worker.stderr[-1]
        == f"launch_worker: the engine process (pid {driver}) was killed by SIGKILL (out of memory?)\n"
    )
    assert not any(map(lives, pids))


def test_sigterm(model: Model) -> None:
    with worker_process(*arguments(model)) as worker:
        url = worker.url(120)
        # Long enough to be seen: 100 tokens were sometimes all there before the first look.
        body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True}
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(url + "/v1/completions", json=body, timeout=60))
        )
        thread.start()
        until(lambda: httpx.get(url + "/get_load").json()[0]["num_reqs"] == 1, 5)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        thread.join(5)
        assert answers[0].json()["usage"]["completion_tokens"] == 900
    assert len(worker.stderr) == 1, worker.stderr


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, [], "BertForMaskedLM"),
        ({}, ["--max-total-tokens", "1000000000000"], "memory"),
        pytest.param({"hidden_size": 128, "head_dim": 32}, [], "has shape", marks=pytest.mark.slow),
        pytest.param(None, [], "safetensors", marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_cannot_start_says_why_in_one_line(
    model: Model, tmp_path: Path, change: dict[str, Any] | None, flags: list[str], said: str
) -> None:
    shutil.copytree(model.folder, tmp_path, dirs_exist_ok=True)
    if change is None:
        (tmp_path / "model.safetensors").unlink()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with worker_process("--model-path", str(tmp_path), "--port", "0", "--device", "cpu", *flags) as worker:
        assert worker.wait(60) == 1
    assert len(worker.stderr) == 1, worker.stderr
    assert said in worker.stderr[0]


def test_the_events_of_the_cache_are_what_answers_find(model: Model, client: httpx.Client) -> None:
    """A follower that knows no more than the events predicts `cached_tokens` to the page."""
    start = client.get("/kv_events/snapshot").json()
    assert start["blocks"] == []
    prompt = model.prompts[-1]
    greedy(client, prompt)
    deadline = time.monotonic() + 5
    known: dict[tuple[int | None, tuple[int, ...]], int] = {}
    number = start["next"]
    while len(known) < (len(prompt) + NEW_TOKENS - 1) // 16:
        assert time.monotonic() < deadline
        answer = client.get(f"/kv_events?from={number}&timeout=1").json()
        number = answer["next"]
        for event in (event for batch in answer["batches"] for event in batch["events"]):
            assert event["type"] == "BlockStored"
            parent, tokens = event["parent_block_hash"], event["token_ids"]
            for index, own in enumerate(event["block_hashes"]):
                known[parent, tuple(tokens[index * 16 : (index + 1) * 16])] = own
                parent = own
    parent, found = None, 0
    while (own := known.get((parent, tuple(prompt[found : found + 16])))) is not None:
        parent, found = own, found + 16
    assert greedy(client, prompt)["meta_info"]["cached_tokens"] == min(found, (len(prompt) - 1) // 16 * 16) > 0
    client.post("/flush_cache").raise_for_status()
    [batch] = client.get(f"/kv_events?from={number}&timeout=2").json()["batches"]
    assert [event["type"] for event in batch["events"]] == ["AllBlocksCleared"]
