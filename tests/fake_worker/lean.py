"""The fake worker for benchmarks: answers prebuilt bytes, looks only for `"stream":true`, records nothing.

A piece of a stream carries the sender's CLOCK_MONOTONIC in ns: readers on the same host take the transit time from it.
"""

import asyncio
import time

from tests.fake_worker.answers import INFERENCE_PATHS
from tests.fake_worker.server import Connection, head

_BODY = (
    b'{"id":"fake","object":"chat.completion","created":0,"model":"fake-model","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"0123456789abcdef"},"finish_reason":"stop"}],"usage":{"prompt_tokens":25,'
    b'"completion_tokens":4,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":16}}}'
)
_TOKENS = "x-prompt-tokens: 25\r\nx-cached-tokens: 16\r\n"
UNARY = head(200, len(_BODY), _TOKENS) + _BODY
_STREAM_HEAD = head(200, None, _TOKENS, "text/event-stream")
_PIECE = (
    b'data: {"id":"fake","object":"chat.completion.chunk","created":0,"model":"fake-model","choices":[{"index":0,'
    b'"delta":{"role":"assistant","content":"%020d"},"finish_reason":null}]}\n\n'
)
_FRAME = b"%x\r\n%b\r\n" % (len(_PIECE % 0), _PIECE)
_LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class LeanConnection(Connection):
    def serve(self, method: str, target: str, request_head: bytes, body: bytes) -> None:
        if method != "POST" or target not in INFERENCE_PATHS:
            super().serve(method, target, request_head, body)
            return
        # Clients of the bench put "stream" near the end, and no router that writes the body anew puts more after it
        # than this: a long prompt cannot slow the search down.
        if body.find(b'"stream":true', max(len(body) - 4_000, 0)) < 0:
            self.worker.record.received += 1
            self.write(UNARY)
            self.finish()
            return
        self.worker.record.received += 1
        script = self.worker.script
        self.write(_STREAM_HEAD)
        self._piece(script.chunks, script.chunk_seconds, asyncio.get_running_loop())

    def _piece(self, left: int, seconds: float, loop: asyncio.AbstractEventLoop) -> None:
        if self._transport is None:
            return
        if left == 0:
            self.write(_LAST)
            self.finish()
        elif seconds == 0:
            for _ in range(left):
                self.write(_FRAME % time.monotonic_ns())
            self.write(_LAST)
            self.finish()
        else:
            self.write(_FRAME % time.monotonic_ns())
            self._step = loop.call_later(seconds, self._piece, left - 1, seconds, loop)
