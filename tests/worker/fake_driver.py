"""A scripted driver: the other end of the HTTP process's socket, without an engine.

It answers a prompt with that prompt (of a chat: the last user message), one token per step and then the end token, and
counts cached tokens as a prefix cache with pages of 16 tokens and no limit would. In a test it is a thread; as a
process (`python -m tests.worker.fake_driver`) it takes the place of `warmroute_worker.engine_process`.

Some prompts make it misbehave: `!error` ends with an error, `!exit` ends the driver, `!hang` never gets a token.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.worker.byte_model import END, USER, VOCAB_SIZE
from warmroute_worker import messages
from warmroute_worker.args import WorkerArgs
from warmroute_worker.child_process import die_with_parent

PAGE = 16


@dataclass
class _Request:
    generate: messages.Generate
    script: list[int]
    cached_tokens: int
    sent: int = 0


@dataclass
class FakeDriver:
    """`step_seconds`: pause before each step. While `paused` is set, requests are taken in and nothing is generated."""

    sock: socket.socket
    step_seconds: float = 0.0
    start_seconds: float = 0.0
    fails_with: str | None = None
    context_length: int = 512
    max_running_requests: int = 256
    tokens_per_step: int = 1
    paused: threading.Event = field(default_factory=threading.Event)
    received: list[Any] = field(default_factory=list)
    running: dict[str, _Request] = field(default_factory=dict)
    _seen: list[list[int]] = field(default_factory=list)
    _totals: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "cached": 0, "generated": 0})

    def run(self) -> int:
        time.sleep(self.start_seconds)
        if self.fails_with is not None:
            self._send(messages.Failed(message=self.fails_with))
            return 1
        self._send(self.facts())
        reader = messages.FrameReader()
        while True:
            idle = not self.running or self.paused.is_set()
            readable, _, _ = select.select([self.sock], [], [], 0.01 if idle else 0)
            if readable:
                data = self.sock.recv(1 << 20)
                if not data:
                    return 1
                for message in reader.feed(data):
                    self.received.append(message)
                    if isinstance(message, messages.Shutdown):
                        return 0
                    self._take(message)
            if self.running and not self.paused.is_set():
                time.sleep(self.step_seconds)
                self._step()

    def facts(self) -> messages.Ready:
        return messages.Ready(
            context_length=self.context_length,
            vocab_size=VOCAB_SIZE,
            max_total_tokens=4096,
            page_size=PAGE,
            max_running_requests=self.max_running_requests,
            eos_token_ids=[END],
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            dtype="float32",
            device="cpu",
            weight_bytes=0,
            kv_pool_bytes=0,
            load_seconds=0.5,
            attention_backend="torch_native",
            layout="",
            collectives="none",
        )

    def _take(self, message: Any) -> None:
        match message:
            case messages.Generate():
                prompt = list(message.token_ids)
                cached = max((_common_pages(prompt[:-1], seen) for seen in self._seen), default=0)
                self.running[message.rid] = _Request(message, _answer(prompt), cached)
                self._seen.append(prompt)
                self._totals["prompt"] += len(prompt)
                self._totals["cached"] += cached
            case messages.Abort():
                self.running.pop(message.rid, None)
                self._send(messages.StepOutput(rows=[], load=self._load()))
            case messages.Flush():
                if self.running:
                    text = f"{len(self.running)} requests are running"
                    self._send(messages.Reply(id=message.id, ok=False, message=text))
                else:
                    self._seen.clear()
                    self._send(messages.Reply(id=message.id, ok=True, message=""))

    def _step(self) -> None:
        rows = []
        for rid, request in list(self.running.items()):
            text = bytes(i for i in request.generate.token_ids if i < 256)
            if b"!hang" in text:
                continue
            if b"!exit" in text and request.sent >= 3:
                os._exit(9)
            if b"!error" in text and request.sent >= (0 if b"!error at once" in text else 3):
                del self.running[rid]
                rows.append(messages.Row(rid, [], "error", request.cached_tokens, "the page burst"))
                continue
            ids: list[int] = []
            finish = None
            while finish is None and len(ids) < self.tokens_per_step:
                ids.append(request.script[request.sent % len(request.script)])
                request.sent += 1
                stops = [*request.generate.stop_token_ids, *([] if request.generate.ignore_eos else [END])]
                if ids[-1] in stops:
                    finish = "stop"
                elif request.sent >= request.generate.max_new_tokens:
                    finish = "length"
            self._totals["generated"] += len(ids)
            if finish is not None:
                del self.running[rid]
            told = request.generate.sampling.logprobs
            logprobs = None
            if told is not None:  # as the engine does, of one token at a time
                assert len(ids) == 1
                logprobs = messages.TokenLogprobs(-0.5, [(ids[0], -0.5), (ord("z"), -1.5)][:told])
            first = request.generate.sampling.prompt_logprobs_from
            of_prompt = None
            if first is not None and request.sent == 1:
                prompt = request.generate.token_ids
                of_prompt = [
                    messages.TokenLogprobs(-float(place), [(ord("y"), -0.25), (prompt[place], -float(place))][:told])
                    for place in range(first, len(prompt))
                ]
            times = messages.Times(0.25, 0.5) if request.sent == len(ids) else None
            rows.append(messages.Row(rid, ids, finish, request.cached_tokens, None, logprobs, of_prompt, times))
        if rows:
            self._send(messages.StepOutput(rows=rows, load=self._load()))

    def _load(self) -> messages.Load:
        return messages.Load(
            running=len(self.running),
            waiting=0,
            used_tokens=sum(len(r.generate.token_ids) + r.sent for r in self.running.values()),
            total_tokens=4096,
            cached_tokens_total=self._totals["cached"],
            prompt_tokens_total=self._totals["prompt"],
            generation_tokens_total=self._totals["generated"],
            evicted_tokens_total=0,
            retractions_total=0,
            new_token_ratio=0.7,
            waiting_uncached_tokens=0,
            retracted=0,
            prefill_passes_total=0,
            decode_passes_total=0,
            prefilled_tokens_total=self._totals["prompt"] - self._totals["cached"],
            reused_tokens_total=self._totals["cached"],
            decoded_tokens_total=self._totals["generated"],
        )

    def _send(self, message: Any) -> None:
        self.sock.sendall(messages.encode(message))


def _answer(prompt: list[int]) -> list[int]:
    if USER in prompt and END in prompt:
        start = len(prompt) - prompt[::-1].index(USER)
        return [*prompt[start : prompt.index(END, start)], END]
    return [*prompt, END]


def _common_pages(one: list[int], other: list[int]) -> int:
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return common // PAGE * PAGE


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent-pid", type=int)
    parser.add_argument("--engine-fds", type=int)
    parser.add_argument("--ranks-fd", type=int)
    parser.add_argument("--worker-args", type=WorkerArgs.from_json)
    options = parser.parse_args()
    die_with_parent(options.parent_pid)
    driver = FakeDriver(
        socket.socket(fileno=options.engine_fds),
        fails_with=os.environ.get("FAKE_FAILS_WITH"),
        start_seconds=float(os.environ.get("FAKE_START_SECONDS", "0")),
        step_seconds=float(os.environ.get("FAKE_STEP_SECONDS", "0")),
    )
    try:
        return driver.run()
    except OSError:
        return 1  # the HTTP process is gone


if __name__ == "__main__":
    sys.exit(main())
