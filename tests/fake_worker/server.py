"""The fake worker's HTTP: one raw protocol per connection, one request at a time, pipelined ones wait their turn."""

import asyncio
import json
import os
import signal
import socket
import struct
from types import TracebackType
from typing import Self, cast
from urllib.parse import parse_qsl

from tests.fake_worker.answers import INFERENCE_PATHS, Answer, Ask, Facts, answer_text
from tests.fake_worker.kv_log import KvLog
from tests.fake_worker.prefix_cache import PrefixCache
from tests.fake_worker.script import Record, Script, SeenRequest, seen

REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 429: "Too Many Requests", 503: "Service Unavailable"}


def head(status: int, length: int | None, extra: str = "", content_type: str = "application/json") -> bytes:
    """A response head; `length` None: chunked."""
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    reason = REASONS.get(status, "Status")
    return f"HTTP/1.1 {status} {reason}\r\ncontent-type: {content_type}\r\n{framing}\r\n{extra}\r\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class FakeWorker:
    """Owns the script, the record and one prefix cache per dp rank.

    `lean` trades parsing and recording for speed (benchmarks): see lean.py. `mortal`: the `die` script kills the
    process; in a test it stops the server instead.
    """

    def __init__(
        self,
        models: tuple[str, ...] = ("fake-model",),
        dp_size: int = 1,
        kv_tokens: int = 262_144,
        page_tokens: int = 16,
        dialect: str = "sglang",
        lean: bool = False,
        mortal: bool = False,
        rank_kv_tokens: tuple[int, ...] = (),
        kv_events: bool = False,
    ) -> None:
        """`kv_events`: `GET /kv_events` tells what each rank's cache gains and loses."""
        self.facts = Facts(models, dp_size, kv_tokens, dialect, rank_kv_tokens)
        self.script = Script()
        self.record = Record()
        self.caches = [PrefixCache(kv_tokens, page_tokens) for _ in range(dp_size)]
        self.kv_logs: list[KvLog] = []
        if kv_events:
            self.keep_kv_logs()
        self.host, self.port = "127.0.0.1", 0
        self._lean = lean
        self._mortal = mortal
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def name(self) -> str:
        """What answers carry as `system_fingerprint` and `x-fake-worker`."""
        return f"fake-{self.port}"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one, a stopped worker restarts on the port it had."""
        from tests.fake_worker.lean import LeanConnection  # it extends Connection, which stands below

        kind = LeanConnection if self._lean else Connection
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: kind(self), host, port or self.port, reuse_address=True, backlog=4096
        )
        self.host, self.port = host, int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """As kill -9 looks from outside: the port refuses, every connection is reset. Caches are lost."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for cache in self.caches:
            cache.clear()
        gone = [connection.gone for connection in self._connections]
        for connection in list(self._connections):
            connection.reset()
        await asyncio.gather(*gone)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- for connections

    def add(self, connection: "Connection") -> None:
        self._connections.add(connection)
        self.record.open_connections += 1
        self.record.accepted_connections += 1

    def discard(self, connection: "Connection") -> None:
        self._connections.discard(connection)
        self.record.open_connections -= 1

    def take_script(self, body: bytes) -> Script:
        """The script for this request; counts it against `times`."""
        script = self.script
        if script.only_if_body_contains is not None and script.only_if_body_contains.encode() not in body:
            return Script()
        if script.times is not None:
            if script.times <= 0:
                return Script()
            script.times -= 1
        return script

    def die(self) -> None:
        if self._mortal:
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.ensure_future(self.stop())  # noqa: RUF006  # ends with the loop at the latest

    def abort(self, given: dict[str, object]) -> None:
        """As SGLang does: by the beginning of the rid, or everything."""
        rid, everything = str(given.get("rid") or ""), given.get("abort_all") is True
        for connection in list(self._connections):
            if everything or (rid and connection.rid.startswith(rid)):
                connection.abort()

    def keep_kv_logs(self, kept: int = 10_000) -> None:
        """From now on each rank's cache logs what it gains and loses."""
        self.kv_logs = [KvLog(kept) for _ in self.caches]
        for cache, log in zip(self.caches, self.kv_logs, strict=True):
            cache.log = log

    def running(self) -> list[int]:
        counts = [0] * self.facts.dp_size
        for connection in self._connections:
            if connection.current is not None:
                counts[connection.current.rank] += 1
        return counts

    def hit_rates(self) -> list[float]:
        """Cached share of the prompt tokens of each rank."""
        rates = []
        for rank in range(self.facts.dp_size):
            seen = [request for request in self.record.requests if request.rank == rank]
            prompt = sum(request.prompt_tokens for request in seen)
            rates.append(sum(request.cached_tokens for request in seen) / prompt if prompt else 0.0)
        return rates


class Connection(asyncio.Protocol):
    """One client connection."""

    def __init__(self, worker: FakeWorker) -> None:
        self.worker = worker
        self.current: SeenRequest | None = None
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._wanted = 0
        self._closing = False
        self._serving = False
        self._streaming = False
        self._step: asyncio.TimerHandle | None = None
        self._kv_task: asyncio.Future[None] | None = None
        self._idle: asyncio.TimerHandle | None = None

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.worker.add(self)
        self._await_request()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._kv_task is not None:
            self._kv_task.cancel()
        self._cancel_timers()
        if self.current is not None:
            self._end("cancelled")
        self.worker.discard(self)
        self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if len(self._buffer) >= self._wanted:
            self._serve_buffered()

    @property
    def rid(self) -> str:
        """Of the request that is being answered: of its body, or what its head calls it."""
        if self.current is None:
            return ""
        return str(json.loads(self.current.body).get("rid") or self.current.header("x-request-id") or "")

    def abort(self) -> None:
        """End the answer as if the model had: what has been generated is all there is."""
        if self.current is None:
            return
        self._cancel_timers()
        if self._streaming:
            self.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        else:
            body = b'{"choices": [{"finish_reason": "abort"}]}'
            self.write(head(200, len(body)) + body)
        self._streaming = False
        self._end("aborted")
        self.finish()

    # -- framing

    def _serve_buffered(self) -> None:
        if self._serving:
            return
        self._serving = True
        try:
            self._serve_complete_ones()
        finally:
            self._serving = False

    def _serve_complete_ones(self) -> None:
        while self.current is None and self._buffer and not self._closing:
            end = self._buffer.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            request_head = self._buffer[:end]
            size = end + _content_length(request_head)
            if len(self._buffer) < size:
                if self._wanted == 0 and b"100-continue" in request_head.lower():
                    self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self._wanted = size
                return
            body = self._buffer[end:size]
            self._buffer = self._buffer[size:]
            self._wanted = 0
            if self._idle is not None:
                self._idle.cancel()
                self._idle = None
            self._closing = b"\r\nconnection: close\r\n" in request_head.lower()
            method, _, rest = request_head.partition(b" ")
            target = rest.partition(b" ")[0].decode("latin-1")
            self.serve(method.decode("latin-1"), target, request_head, body)

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def finish(self) -> None:
        """The response is written whole: close, or read on."""
        if self._transport is None:
            return
        if self._closing:
            self._transport.close()
        else:
            self._await_request()

    def reset(self) -> None:
        """RST instead of FIN: what the client has not read yet may be lost."""
        if self._transport is None:
            return
        raw = self._transport.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # -- requests

    def serve(self, method: str, target: str, request_head: bytes, body: bytes) -> None:
        path, _, query = target.partition("?")
        if method == "POST" and path in INFERENCE_PATHS:
            self._infer(path, request_head, body)
        elif path == "/kv_events" and self.worker.kv_logs:
            self._kv_task = asyncio.ensure_future(self._tell_kv_events(query))
        else:
            status, answer, content_type = self._about(method, path, query, body)
            self.write(head(status, len(answer), content_type=content_type) + (b"" if method == "HEAD" else answer))
            self.finish()

    def _about(self, method: str, path: str, query: str, body: bytes) -> tuple[int, bytes, str]:
        """Everything that is not inference: (status, body, content type)."""
        worker, record, kind = self.worker, self.worker.record, "application/json"
        if path == "/_script":
            if method == "POST":
                try:
                    worker.script = Script.from_json(json.loads(body))
                except (ValueError, TypeError) as error:
                    return 400, json.dumps({"error": str(error)}).encode(), kind
            return 200, json.dumps(worker.script.to_json()).encode(), kind
        if path == "/_record":
            return 200, json.dumps(record.to_json("requests=0" not in query)).encode(), kind
        if path == "/_reset":
            record.reset()
            for cache in worker.caches:
                cache.clear()
            return 200, b"{}", kind
        record.other_paths[path] = record.other_paths.get(path, 0) + 1
        if path in ("/health", "/health_generate"):
            return worker.script.health_status, b"", "text/plain"
        if path == "/kv_events/snapshot" and worker.kv_logs:
            rank = int(dict(parse_qsl(query)).get("dp_rank", 0))
            return 200, json.dumps(worker.kv_logs[rank].snapshot(rank)).encode(), kind
        if path == "/metrics":
            prompt = sum(request.prompt_tokens for request in record.requests)
            cached = sum(request.cached_tokens for request in record.requests)
            return 200, worker.facts.metrics(record.in_flight, prompt, cached), "text/plain; version=0.0.4"
        if path == "/flush_cache":
            if record.in_flight:
                return 400, b"requests are running", "text/plain"
            for cache in worker.caches:
                cache.clear()
            return 200, b"flushed", "text/plain"
        if path == "/abort_request":
            worker.abort(json.loads(body))
            return 200, b"{}", kind
        used_tokens = [cache.used_tokens for cache in worker.caches]
        answer = worker.facts.info(path, worker.running(), used_tokens, worker.hit_rates())
        return (404, b'{"error":"no such path"}', kind) if answer is None else (200, answer, kind)

    async def _tell_kv_events(self, query: str) -> None:
        asked = dict(parse_qsl(query))
        log = self.worker.kv_logs[int(asked.get("dp_rank", 0))]
        number = int(asked["from"])
        # So that a test need not wait for the end of a long poll.
        await log.wait(number, min(float(asked.get("timeout", 0)), 0.5))
        answer = log.answer(number)
        body = json.dumps(answer).encode()
        self.write(head(410 if answer is None else 200, len(body)) + body)
        self.finish()

    def _infer(self, path: str, request_head: bytes, body: bytes) -> None:
        worker = self.worker
        script = worker.take_script(body)
        try:
            ask = Ask.parse(path, request_head, body, worker.facts.models[0])
            if not 0 <= ask.rank < len(worker.caches):
                raise ValueError(f"routed_dp_rank={ask.rank} out of range [0, {len(worker.caches)})")
        except (ValueError, AttributeError) as error:
            answer = json.dumps({"error": {"message": str(error), "type": "BadRequest", "code": 400}}).encode()
            self.write(head(400, len(answer)) + answer)
            self.finish()
            return
        self.current = seen(path, request_head, body, ask.rank)
        worker.record.see(self.current)
        if script.die:
            worker.die()
        elif script.reset_before_answer:
            self._end("broken")
            self.reset()
        elif script.garbage:
            self.write(b"\x00\xffthis is not HTTP\r\n\r\n")
            self._end("broken")
            self._closing = True
            self.finish()
        elif not script.stall:
            self._later(script.first_byte_seconds, self._answer, ask, script)

    def _answer(self, ask: Ask, script: Script) -> None:
        request, worker = self.current, self.worker
        if request is None:
            return
        extra = f"x-fake-worker: {worker.name}\r\n"
        if script.status != 200:
            if script.retry_after is not None:
                extra += f"retry-after: {script.retry_after}\r\n"
            error = {"message": f"scripted {script.status}", "type": "Scripted", "code": script.status, "param": None}
            body = json.dumps({"error": error}).encode()
            self.write(head(script.status, len(body), extra) + body)
            self._complete()
            return
        cache = worker.caches[request.rank]
        answer = Answer(
            ask=ask,
            answer_id=f"fake-{worker.port}-{worker.record.received}",
            worker=worker.name,
            pieces=answer_text(ask.prompt, script.chunks, script.chunk_bytes),
            cached_tokens=cache.cached_tokens(ask.prompt),
        )
        cache.insert(ask.prompt + "".join(answer.pieces).encode() + b"<|end|>")
        request.prompt_tokens, request.cached_tokens = answer.prompt_tokens, answer.cached_tokens
        if script.token_headers:
            extra += f"x-prompt-tokens: {answer.prompt_tokens}\r\nx-cached-tokens: {answer.cached_tokens}\r\n"
        if ask.stream:
            self.write(head(200, None, extra, "text/event-stream"))
            self._streaming = True
            self._stream([chunk(event) for event in answer.events()], script, 0)
            return
        body = answer.unary()
        if script.reset_after_chunks is not None:
            self.write(head(200, len(body), extra) + body[: len(body) // 2])
            self._later(0.01, self._break_off)
            return
        self.write(head(200, len(body), extra) + body)
        self._complete()

    def _stream(self, events: list[bytes], script: Script, sent: int) -> None:
        """Send what is due and come back for the rest."""
        if self.current is None:
            return
        stop = script.reset_after_chunks
        due = len(events) if script.chunk_seconds == 0 else sent + 1
        if stop is not None:
            due = min(due, stop)
        if script.stall_after_chunks is not None:
            due = min(due, script.stall_after_chunks)
        self.write(b"".join(events[sent:due]))
        if script.stall_after_chunks is not None and due >= script.stall_after_chunks:
            return
        if due == stop:
            # The last chunk must have left before the RST overtakes it.
            self._later(0.01, self._break_off)
        elif due == len(events):
            self.write(b"0\r\n\r\n")
            self._streaming = False
            self._complete()
        else:
            self._later(script.chunk_seconds, self._stream, events, script, due)

    def _break_off(self) -> None:
        self._end("broken")
        self.reset()

    def _complete(self) -> None:
        self._end("answered")
        self.finish()
        self._serve_buffered()

    def _end(self, outcome: str) -> None:
        if self.current is not None:
            self.worker.record.end(self.current, outcome)
            self.current = None

    # -- time

    def _later(self, seconds: float, step: object, *arguments: object) -> None:
        assert callable(step)
        if seconds <= 0:
            step(*arguments)
        else:
            self._step = asyncio.get_running_loop().call_later(seconds, step, *arguments)

    def _await_request(self) -> None:
        seconds = self.worker.script.idle_close_seconds
        if seconds is not None and self._transport is not None:
            self._idle = asyncio.get_running_loop().call_later(seconds, self._transport.close)

    def _cancel_timers(self) -> None:
        for timer in (self._step, self._idle):
            if timer is not None:
                timer.cancel()


def _content_length(request_head: bytes) -> int:
    lower = request_head.lower()
    at = lower.find(b"\r\ncontent-length:")
    return 0 if at < 0 else int(lower[at + 17 : lower.index(b"\r\n", at + 2)])
