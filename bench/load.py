"""The load generator: raw protocols, requests built beforehand, so that it costs little beside what it measures."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast


@dataclass(slots=True)
class Reply:
    """One request's fate. Seconds count from the moment it was written; -1: did not happen."""

    index: int
    """Position in the list of requests."""
    status: int = 0
    first_byte_seconds: float = -1.0
    seconds: float = -1.0
    complete: bool = False
    """The answer arrived whole (framing, and for SSE the closing `[DONE]`)."""
    head: bytes = b""
    body: bytes = b""
    """Kept only when asked for."""

    @property
    def began(self) -> bool:
        return self.first_byte_seconds >= 0

    @property
    def ok(self) -> bool:
        return self.complete and self.status == 200

    def header(self, name: str) -> str | None:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.lower() == name.lower().encode():
                return value.strip().decode("latin-1")
        return None


@dataclass
class Load:
    """What a run of the generator saw."""

    replies: list[Reply] = field(default_factory=list)
    transit_ns: list[int] = field(default_factory=list)
    """Worker's write to client's read, per chunk (streams of the lean fake worker only)."""
    chunks: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> list[Reply]:
        return [reply for reply in self.replies if not reply.ok]

    def quantile(self, share: float, values: Sequence[float] | None = None) -> float:
        """Of the latencies in seconds, or of `values`."""
        ordered = sorted([reply.seconds for reply in self.replies] if values is None else values)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else -1.0


def post(path: str, body: bytes, host: str = "bench", headers: str = "") -> bytes:
    """A whole POST request; `headers`: further lines, each with CRLF."""
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def chat_body(prompt: str, stream: bool = False, model: str = "fake-model") -> bytes:
    """A chat of one message, without needless spaces; `stream` at the end."""
    value: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 16}
    if stream:
        value["stream"] = True
    return json.dumps(value, separators=(",", ":")).encode()


class _Client(asyncio.Protocol):
    """One connection with at most one request on it."""

    def __init__(self, run: "_Run") -> None:
        self.run = run
        self.transport: asyncio.Transport | None = None
        self.reply: Reply | None = None
        self._sent = 0.0
        self._pending = b""
        self._left = -1  # body bytes still to come; -1: chunked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, reply: Reply, data: bytes) -> None:
        assert self.transport is not None
        self.reply = reply
        self._pending = b""
        self._sent = time.perf_counter()
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        reply = self.reply
        if reply is None:
            return
        if not reply.head:
            if not reply.began:
                reply.first_byte_seconds = time.perf_counter() - self._sent
            data = self._pending + data if self._pending else data
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                self._pending = data
                return
            reply.head, data = data[:end], data[end:]
            reply.status = int(reply.head[9:12])
            lower = reply.head.lower()
            at = lower.find(b"\r\ncontent-length:")
            self._left = -1 if at < 0 else int(lower[at + 17 : lower.index(b"\r\n", at + 2)])
            self._pending = b""
        if self.run.keep_bodies:
            reply.body += data
        if self._left >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._finish(reply)
            return
        if self.run.timestamps:
            self.run.read_timestamps(data)
        tail = self._pending + data
        if tail.endswith(b"\r\n0\r\n\r\n"):
            # An SSE answer without its closing mark was broken off politely: not complete.
            self._finish(reply, complete=b"text/event-stream" not in reply.head or b"data: [DONE]" in tail)
        else:
            self._pending = tail[-64:]

    def _finish(self, reply: Reply, complete: bool = True) -> None:
        reply.complete = complete
        reply.seconds = time.perf_counter() - self._sent
        self.reply = None
        if b"\r\nconnection: close" in reply.head.lower() and self.transport is not None:
            self.transport.close()
        self.run.done(self, reply)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        reply, self.reply = self.reply, None
        if reply is not None:
            reply.seconds = time.perf_counter() - self._sent
            self.run.done(self, reply)


class _Run:
    """Hands requests to connections and collects replies."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes], keep_bodies: bool, timestamps: bool) -> None:
        self.host, self.port, self.requests = host, port, requests
        self.keep_bodies, self.timestamps = keep_bodies, timestamps
        self.load = Load()
        self.idle: asyncio.Queue[_Client] = asyncio.Queue()
        self._waiting: dict[_Client, asyncio.Future[Reply]] = {}

    async def connect(self) -> _Client:
        _, client = await asyncio.get_running_loop().create_connection(lambda: _Client(self), self.host, self.port)
        return client

    async def exchange(self, client: _Client, index: int) -> tuple[_Client, Reply]:
        """Send one request; a connection that is gone is replaced first."""
        reply = Reply(index)
        if client.transport is None or client.transport.is_closing():
            try:
                client = await self.connect()
            except OSError:
                self.load.replies.append(reply)
                return client, reply
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[client] = future
        client.send(reply, self.requests[index % len(self.requests)])
        return client, await future

    def done(self, client: _Client, reply: Reply) -> None:
        self.load.replies.append(reply)
        self._waiting.pop(client).set_result(reply)

    def read_timestamps(self, data: bytes) -> None:
        now = time.monotonic_ns()
        at = data.find(b'"content":"')
        while at >= 0:
            digits = data[at + 11 : at + 31]
            if len(digits) == 20:  # else the chunk was cut here: not worth putting together for a statistic
                self.load.chunks += 1
                self.load.transit_ns.append(now - int(digits))
            at = data.find(b'"content":"', at + 11)

    async def close(self, clients: Sequence[_Client]) -> Load:
        for client in clients:
            if client.transport is not None:
                client.transport.close()
        await asyncio.sleep(0)
        return self.load


async def closed_loop(
    host: str,
    port: int,
    requests: Sequence[bytes],
    connections: int,
    *,
    count: int | None = None,
    seconds: float | None = None,
    keep_bodies: bool = False,
    timestamps: bool = False,
) -> Load:
    """Each connection sends its next request when the last is answered, up to `count` requests or `seconds`."""
    run = _Run(host, port, requests, keep_bodies, timestamps)
    start = time.perf_counter()
    next_index = 0

    async def work() -> _Client:
        nonlocal next_index
        client = await run.connect()
        while (count is None or next_index < count) and (seconds is None or time.perf_counter() - start < seconds):
            index = next_index
            next_index += 1
            client, _ = await run.exchange(client, index)
        return client

    clients = await asyncio.gather(*(work() for _ in range(connections)))
    run.load.seconds = time.perf_counter() - start
    return await run.close(clients)


async def open_loop(
    host: str, port: int, requests: Sequence[bytes], per_second: float, seconds: float, *, connections: int = 64
) -> Load:
    """Requests leave at a fixed rate, whether or not earlier ones are answered (at most `connections` at a time)."""
    run = _Run(host, port, requests, keep_bodies=False, timestamps=False)
    for _ in range(connections):
        run.idle.put_nowait(await run.connect())
    start = time.perf_counter()
    running: set[asyncio.Task[None]] = set()

    async def one(client: _Client, index: int) -> None:
        client, _ = await run.exchange(client, index)
        run.idle.put_nowait(client)

    for index in range(int(per_second * seconds)):
        delay = start + index / per_second - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        task = asyncio.ensure_future(one(await run.idle.get(), index))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    run.load.seconds = time.perf_counter() - start
    return await run.close([run.idle.get_nowait() for _ in range(run.idle.qsize())])
