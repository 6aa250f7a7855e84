"""GET /kv_events: what the prefix cache gained and lost, numbered, with what is needed to come in later.

`GET /kv_events?from=N&timeout=S` answers with the batches from number N on, after at most S seconds with none. Who is
too late for N gets 410 and starts again from `GET /kv_events/snapshot`, whose `next` is where the events go on.
`dp_rank=R` asks for another data-parallel rank than 0: each has a cache, and numbers, of its own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

from warmroute_worker.http.errors import ApiError, ErrorCode, invalid
from warmroute_worker.http.service import SERVICE
from warmroute_worker.http.sse import json_bytes

if TYPE_CHECKING:
    from warmroute_worker.kv_event_log import KvEventLog

LONGEST_WAIT = 60.0

_STORED = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
_REMOVED = ("block_hashes", "medium")


async def kv_events(request: web.Request) -> web.Response:
    """See the head of this file."""
    dp_rank, log = _log(request)
    first = _number(request, "from", float(log.oldest))
    timeout = _number(request, "timeout", 0.0)
    number = int(first)
    if number < log.oldest or number > log.next:
        raise ApiError(
            ErrorCode.GONE,
            f"batch {number} is not here: {log.oldest} to {log.next} are; begin with GET /kv_events/snapshot",
        )
    await log.wait(number, min(timeout, LONGEST_WAIT))
    batches = [
        {"seq": seq, "ts": ts, "dp_rank": dp_rank, "events": [_named(event) for event in events]}
        for seq, ts, events in log.since(number)
    ]
    return _json({"epoch": log.epoch, "next": number + len(batches), "batches": batches})


async def snapshot(request: web.Request) -> web.Response:
    """Everything that is cached now, and the number from which events go on."""
    dp_rank, log = _log(request)
    head = {"epoch": log.epoch, "next": log.next, "dp_rank": dp_rank}
    cached = log.cached()

    def written() -> bytes:
        blocks = [
            {"block_hash": own, "parent_block_hash": parent, "token_ids": tokens.tolist()}
            for own, parent, tokens in cached
        ]
        return json_bytes({**head, "blocks": blocks})

    # A pool of 262,144 tokens is 2 MB of JSON: in a thread, so that streams go on meanwhile.
    return web.Response(body=await asyncio.to_thread(written), content_type="application/json")


def _log(request: web.Request) -> tuple[int, KvEventLog]:
    """The data-parallel rank that is asked for, and its log."""
    service = request.app[SERVICE]
    service.facts()
    ranks, wanted = service.engine.clients, _number(request, "dp_rank", 0)
    if wanted >= len(ranks):
        raise invalid(f"dp_rank={wanted:g} out of range [0, {len(ranks)})", "dp_rank")
    return int(wanted), ranks[int(wanted)].kv_events


def _named(event: list[Any]) -> dict[str, Any]:
    kind, *values = event
    names = {"BlockStored": _STORED, "BlockRemoved": _REMOVED}.get(kind, ())
    return {"type": kind, **dict(zip(names, values, strict=True))}


def _number(request: web.Request, name: str, default: float) -> float:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e15:
        raise invalid(f"`{name}` must be a number that is not negative, got {text!r}", name)
    return value


def _json(value: object) -> web.Response:
    return web.Response(body=json_bytes(value), content_type="application/json")
