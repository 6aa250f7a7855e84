"""The bodies of the worker contract: inference answers in three dialects, and what a worker says about itself."""

import json
import time
import zlib
from dataclasses import dataclass
from typing import Any

from tests.fake_worker.prefix_cache import BYTES_PER_TOKEN, token_count

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
INFERENCE_PATHS = frozenset((CHAT, COMPLETIONS, GENERATE))


@dataclass(frozen=True, slots=True)
class Ask:
    """The fields of an inference request that the fake worker reads."""

    path: str
    model: str
    prompt: bytes
    stream: bool
    include_usage: bool
    rank: int

    @classmethod
    def parse(cls, path: str, head: bytes, body: bytes, default_model: str) -> "Ask":
        """Raises ValueError when the body is not a JSON object."""
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise ValueError("the body must be a JSON object")
        options = fields.get("stream_options") or {}
        return cls(
            path=path,
            model=str(fields.get("model") or default_model),
            prompt=_prompt(path, fields),
            stream=fields.get("stream") is True,
            include_usage=bool(options.get("include_usage")),
            rank=_rank(head, fields),
        )


def _rank(head: bytes, fields: dict[str, Any]) -> int:
    """As SGLang reads it: the header before the body, the new name before the old one."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"x-data-parallel-rank:"):
            return int(line.partition(b":")[2])
    named = (fields.get(name) for name in ("routed_dp_rank", "data_parallel_rank"))
    return next((rank for rank in named if rank is not None), 0)


def _prompt(path: str, fields: dict[str, Any]) -> bytes:
    if path == CHAT:
        rendered = "".join(f"<|{m.get('role')}|>{_text(m.get('content'))}<|end|>" for m in fields.get("messages") or [])
        return (rendered + "<|assistant|>").encode()
    prompt = fields.get("prompt") if path == COMPLETIONS else fields.get("text") or fields.get("input_ids")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list):
        return b"".join(token.to_bytes(BYTES_PER_TOKEN, "little") for token in prompt)
    return str(prompt or "").encode()


def _text(content: object) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def answer_text(prompt: bytes, chunks: int, chunk_bytes: int) -> list[str]:
    """Pieces that depend on the prompt, so that two conversations never share an answer."""
    word = f"{zlib.crc32(prompt):08x} "
    return [(f"{i} {word}" * (chunk_bytes // len(word) + 1))[:chunk_bytes] for i in range(chunks)]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that can be given whole or in pieces."""

    ask: Ask
    answer_id: str
    worker: str
    pieces: list[str]
    cached_tokens: int

    @property
    def prompt_tokens(self) -> int:
        return token_count(self.ask.prompt)

    def usage(self) -> dict[str, Any]:
        completion = token_count("".join(self.pieces).encode())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def unary(self) -> bytes:
        text = "".join(self.pieces)
        if self.ask.path == GENERATE:
            return _dump(self._generate(text, {"type": "stop"}))
        if self.ask.path == CHAT:
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        else:
            choice = {"index": 0, "text": text, "finish_reason": "stop"}
        return _dump(self._shape([choice], streamed=False) | {"usage": self.usage()})

    def events(self) -> list[bytes]:
        """One SSE event per piece, then the end. Each is a `data:` line with its blank line."""
        if self.ask.path == GENERATE:
            last = len(self.pieces) - 1
            events = [
                _event(self._generate("".join(self.pieces[: i + 1]), {"type": "stop"} if i == last else None))
                for i in range(len(self.pieces))
            ]
        else:
            events = [_event(self._shape([self._delta(i)], streamed=True)) for i in range(len(self.pieces))]
            if self.ask.include_usage:
                events.append(_event(self._shape([], streamed=True) | {"usage": self.usage()}))
        events.append(b"data: [DONE]\n\n")
        return events

    def _delta(self, i: int) -> dict[str, Any]:
        finish = "stop" if i == len(self.pieces) - 1 else None
        if self.ask.path == COMPLETIONS:
            return {"index": 0, "text": self.pieces[i], "finish_reason": finish}
        return {"index": 0, "delta": {"role": "assistant", "content": self.pieces[i]}, "finish_reason": finish}

    def _shape(self, choices: list[dict[str, Any]], streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if self.ask.path == COMPLETIONS else "chat.completion"
        return {
            "id": self.answer_id,
            "object": kind + ".chunk" if streamed and self.ask.path == CHAT else kind,
            "created": int(time.time()),
            "model": self.ask.model,
            "system_fingerprint": self.worker,
            "choices": choices,
        }

    def _generate(self, text: str, finish: dict[str, str] | None) -> dict[str, Any]:
        usage = self.usage()
        meta = {
            "id": self.answer_id,
            "finish_reason": finish,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": token_count(text.encode()),
            "cached_tokens": self.cached_tokens,
        }
        return {"text": text, "meta_info": meta}


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(value: object) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the worker says about itself. `dialect` vllm has no /server_info, /model_info, /get_load, /v1/loads."""

    models: tuple[str, ...]
    dp_size: int
    kv_tokens: int
    """Per dp rank."""
    dialect: str = "sglang"
    rank_kv_tokens: tuple[int, ...] = ()
    """What /v1/loads says instead of `kv_tokens`, by rank."""

    def info(self, path: str, running: list[int], used_tokens: list[int], hit_rates: list[float]) -> bytes | None:
        """Body of one of the GETs, None when this dialect has no such path. Lists: by rank."""
        if path == "/v1/models":
            entry = {"object": "model", "created": 0, "owned_by": self.dialect, "max_model_len": 131072}
            return _dump({"object": "list", "data": [{"id": m, "root": m} | entry for m in self.models]})
        if path == "/version":
            return _dump({"version": "0.0.0"})
        if self.dialect != "sglang":
            return None
        if path in ("/server_info", "/get_server_info"):
            return _dump(
                {
                    "model_path": self.models[0],
                    "served_model_name": self.models[0],
                    "tp_size": 1,
                    "dp_size": self.dp_size,
                    "version": "0.0.0",
                    "max_running_requests": 256,
                    "max_total_num_tokens": self.kv_tokens,
                    "disaggregation_mode": "null",
                }
            )
        if path in ("/model_info", "/get_model_info"):
            return _dump({"model_path": self.models[0], "tokenizer_path": self.models[0], "is_generation": True})
        ranks = range(self.dp_size)
        if path == "/get_load":
            return _dump(
                [
                    {"dp_rank": r, "num_reqs": running[r], "num_waiting_reqs": 0, "num_tokens": used_tokens[r]}
                    for r in ranks
                ]
            )
        if path == "/v1/loads":
            loads = [
                {
                    "dp_rank": r,
                    "num_running_reqs": running[r],
                    "num_waiting_reqs": 0,
                    "num_waiting_uncached_tokens": 0,
                    "num_total_reqs": running[r],
                    "num_used_tokens": used_tokens[r],
                    "max_total_num_tokens": self.rank_kv_tokens[r] if self.rank_kv_tokens else self.kv_tokens,
                    "token_usage": used_tokens[r] / self.kv_tokens,
                    "gen_throughput": 0.0,
                    "cache_hit_rate": hit_rates[r],
                    "max_running_requests": 256,
                }
                for r in ranks
            ]
            return _dump({"timestamp": time.time(), "dp_rank_count": self.dp_size, "loads": loads})
        return None

    def metrics(self, running: int, prompt_tokens: int, cached_tokens: int) -> bytes:
        rate = cached_tokens / prompt_tokens if prompt_tokens else 0.0
        return (
            f"# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs {running}\n"
            f"# TYPE sglang:cache_hit_rate gauge\nsglang:cache_hit_rate {rate}\n"
        ).encode()
