"""Engines of the simulator behind HTTP, in real time: what a fleet of GPUs would answer, and when.

    python -m bench.mock_engines --ports 8101 8102 --kv-tokens 32768 --speed 4

Tokens are counted as 4 characters each. A streamed answer is two events, the first token and the rest: what lies
between is the router's business in another bench.
"""

import argparse
import asyncio
import json
from typing import Any

from aiohttp import web

from bench.simulator.engine import PAGE_TOKENS, Engine, Job, Worker

CHARACTERS_PER_TOKEN = 4
PAGE_CHARACTERS = PAGE_TOKENS * CHARACTERS_PER_TOKEN
MODEL = "simulated"


class MockEngine:
    """One simulated worker whose events happen on the clock of the loop, `speed` times as fast."""

    def __init__(self, engine: Engine, speed: float) -> None:
        self._engine = engine
        self._speed = speed
        self._worker = Worker(engine)
        self._waiting: dict[Job, tuple[asyncio.Future[None], asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def app(self) -> web.Application:
        app = web.Application()
        facts = {
            "model_path": MODEL,
            "served_model_name": MODEL,
            "max_total_num_tokens": self._engine.kv_tokens,
            "max_total_tokens": self._engine.kv_tokens,
            "dp_size": 1,
        }
        models = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "sglang"}]}
        answers: dict[str, object] = {"/health": "OK", "/health_generate": "OK", "/v1/models": models}
        answers |= dict.fromkeys(("/server_info", "/get_server_info", "/model_info", "/get_model_info"), facts)

        async def answer(request: web.Request) -> web.Response:
            return web.json_response(answers[request.path])

        for path in answers:
            app.router.add_get(path, answer)
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body: dict[str, Any] = await request.json()
        text = "".join(f"<{message['role']}>{message['content']}" for message in body["messages"])
        tokens = max(len(text) // CHARACTERS_PER_TOKEN, 1)
        # sglang-router sends the client's max_tokens under its newer name.
        output = int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)
        now = asyncio.get_running_loop().time() * self._speed
        job = Job(page_keys(text, tokens + output), tokens, output, now)
        loop = asyncio.get_running_loop()
        first, whole = loop.create_future(), loop.create_future()
        self._waiting[job] = (first, whole)
        self._worker.submit(job, 0, now)
        self._schedule()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await first
        await response.write(_event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": "x"}}]}))
        await whole
        usage = {
            "prompt_tokens": tokens,
            "completion_tokens": output,
            "total_tokens": tokens + output,
            "prompt_tokens_details": {"cached_tokens": job.cached_tokens},
        }
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "usage": usage}
        await response.write(_event(end) + b"data: [DONE]\n\n")
        return response

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._worker.event < float("inf"):
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._worker.event / self._speed, self._step)

    def _step(self) -> None:
        now = asyncio.get_running_loop().time() * self._speed
        answered: list[Job] = []
        # Steps that are due already: the loop may be late.
        while self._worker.event <= now:
            answered += self._worker.complete()
        for job, (first, _) in self._waiting.items():
            if job.first_token >= 0 and not first.done():
                first.set_result(None)
        for job in answered:
            _, whole = self._waiting.pop(job)
            whole.set_result(None)
        self._schedule()


def page_keys(text: str, tokens: int) -> list[range]:
    """A key per page; those of the answer are nobody else's."""
    keys, chain = [], 0
    for start in range(0, len(text) - PAGE_CHARACTERS + 1, PAGE_CHARACTERS):
        chain = hash((chain, text[start : start + PAGE_CHARACTERS]))
        keys.append(range(chain, chain + 1))
    first = hash((chain, text)) & ~0xFFFFF
    keys.append(range(first, first + tokens // PAGE_TOKENS - len(keys) + 1))
    return keys


def _event(value: dict[str, Any]) -> bytes:
    head = {"id": "mock", "object": "chat.completion.chunk", "created": 0, "model": MODEL}
    return b"data: " + json.dumps(head | value).encode() + b"\n\n"


async def serve(ports: list[int], engine: Engine, speed: float) -> None:
    for port in ports:
        runner = web.AppRunner(MockEngine(engine, speed).app(), access_log=None, keepalive_timeout=3600)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=2048, reuse_address=True).start()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.mock_engines", description=__doc__)
    parser.add_argument("--ports", type=int, nargs="+", required=True)
    parser.add_argument("--kv-tokens", type=int, default=Engine().kv_tokens)
    parser.add_argument("--speed", type=float, default=1.0)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.ports, Engine(arguments.kv_tokens), arguments.speed))


if __name__ == "__main__":
    main()
