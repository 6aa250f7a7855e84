"""What routers and operators ask: models, health, arguments, load, metrics; and flushing the cache.

Names of fields are those that sglang-router and smg read of a worker.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import tempfile
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from warmroute_worker.http import fields
from warmroute_worker.http.errors import ApiError, ErrorCode, invalid
from warmroute_worker.http.service import SERVICE
from warmroute_worker.http.sse import json_bytes
from warmroute_worker.metrics import cache_hit_rate
from warmroute_worker.version import version

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from warmroute_worker import messages
    from warmroute_worker.data_parallel import DataParallelController
    from warmroute_worker.engine_client import EngineClient
    from warmroute_worker.http.service import Service
    from warmroute_worker.metrics import RankMetrics


PAUSE_MODES = ("abort", "in_place", "retract")


async def health(request: web.Request) -> web.Response:
    """200 exactly when a request would be taken."""
    request.app[SERVICE].open_facts()
    return web.Response()


async def models(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    card = {
        "id": service.args.served_model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "sglang",  # routers tell the worker's dialect by this
        "root": service.args.model_path,
        "max_model_len": service.facts().context_length,
    }
    return _json({"object": "list", "data": [card]})


async def server_info(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    facts, effective = service.facts(), service.args.effective()
    info = {
        **dataclasses.asdict(service.args),
        "tokenizer_path": service.args.model_path,
        "version": version(),
        "ep_size": effective["ep_size"],
        "load_balance_method": effective["load_balance_method"],
        "disaggregation_mode": "null",
        "is_embedding": False,
        "weight_version": "default",
        "context_length": facts.context_length,
        "max_total_tokens": facts.max_total_tokens,
        "max_total_num_tokens": facts.max_total_tokens,
        "max_running_requests": facts.max_running_requests,
        "page_size": facts.page_size,
        "requested": dataclasses.asdict(service.args),
        "effective": {**dataclasses.asdict(facts), **effective, "cuda_graph": "none: not implemented"},
    }
    return _json(info)


async def model_info(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    facts = service.facts()
    return _json(
        {
            "model_path": service.args.model_path,
            "tokenizer_path": service.args.model_path,
            "is_generation": True,
            "model_type": facts.model_type,
            "architectures": list(facts.architectures),
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": False,
            "has_audio_understanding": False,
        }
    )


async def load(request: web.Request) -> web.Response:
    """SGLang's /get_load: one entry per data-parallel rank."""
    return _json(
        [
            {
                "dp_rank": load["dp_rank"],
                "num_reqs": load["num_total_reqs"],
                "num_waiting_reqs": load["num_waiting_reqs"],
                "num_tokens": load["num_used_tokens"] + load["num_waiting_uncached_tokens"],
            }
            for load in _loads(request.app[SERVICE])
        ]
    )


async def loads(request: web.Request) -> web.Response:
    """SGLang's /v1/loads."""
    now = datetime.datetime.now(datetime.UTC).isoformat()
    found = _loads(request.app[SERVICE])
    return _json({"timestamp": now, "dp_rank_count": len(found), "loads": found})


async def flush_cache(request: web.Request) -> web.Response:
    """Empties the prefix cache; 400 when requests run, whose pages it would take."""
    await _asked(request, lambda engine: engine.flush())
    return web.Response(text="Cache flushed.\n")


async def pause_generation(request: web.Request) -> web.Response:
    """`{"mode"}`: abort (the default), in_place or retract."""
    body = fields.json_object(await request.read() or b"{}")
    mode = fields.text(body, "mode", "abort")
    if mode not in PAUSE_MODES:
        raise invalid(f"`mode` must be one of {', '.join(PAUSE_MODES)}, got {mode!r}", "mode")
    await _asked(request, lambda engine: engine.pause(mode))
    return _json({"message": "Generation paused.", "mode": mode})


async def continue_generation(request: web.Request) -> web.Response:
    await _asked(request, lambda engine: engine.resume())
    return _json({"message": "Generation goes on."})


async def start_profile(request: web.Request) -> web.Response:
    """`{"output_dir"}`, else the folder that SGLANG_TORCH_PROFILER_DIR names, else the system's temporary one."""
    body = fields.json_object(await request.read() or b"{}")
    default = os.environ.get("SGLANG_TORCH_PROFILER_DIR", tempfile.gettempdir())
    folder = fields.text(body, "output_dir", default) or default
    return _json({"message": await _asked(request, lambda engine: engine.profile(folder))})


async def stop_profile(request: web.Request) -> web.Response:
    return _json({"message": await _asked(request, lambda engine: engine.profile(None))})


async def start_expert_distribution_record(request: web.Request) -> web.Response:
    """From now on every rank counts for how many rows each expert is chosen."""
    return _json({"message": await _asked(request, lambda engine: engine.count_experts("start experts"))})


async def stop_expert_distribution_record(request: web.Request) -> web.Response:
    return _json({"message": await _asked(request, lambda engine: engine.count_experts("stop experts"))})


async def dump_expert_distribution_record(request: web.Request) -> web.Response:
    """`{"output_dir"}`, else SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, else the temporary folder: a file per rank."""
    body = fields.json_object(await request.read() or b"{}")
    default = os.environ.get("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", tempfile.gettempdir())
    folder = fields.text(body, "output_dir", default) or default
    return _json({"message": await _asked(request, lambda engine: engine.count_experts(f"dump experts:{folder}"))})


async def _asked(request: web.Request, question: Callable[[DataParallelController], Awaitable[messages.Reply]]) -> str:
    """The engine's answer. Raises ApiError if it is no, or if there is no engine."""
    service = request.app[SERVICE]
    service.facts()
    try:
        result = await question(service.engine)
    except ConnectionError as error:
        raise ApiError(ErrorCode.ENGINE_FAILED, f"the engine has failed: {error}") from error
    if not result.ok:
        raise ApiError(ErrorCode.BUSY, result.message)
    return result.message


async def ranks(request: web.Request) -> web.Response:
    """What each rank says of itself: pid, coordinates, weights, pool, steps, and what its collectives moved."""
    service = request.app[SERVICE]
    service.facts()
    return _json({"ranks": service.ranks.read()})


async def metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[SERVICE].metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _loads(service: Service) -> list[dict[str, Any]]:
    """By data-parallel rank."""
    facts, now = service.facts(), time.monotonic()
    return [_load(client, facts, service.metrics.of_rank(client.dp_rank), now) for client in service.engine.clients]


def _load(client: EngineClient, facts: messages.Ready, metrics: RankMetrics, now: float) -> dict[str, Any]:
    """Of the last step, corrected by what was submitted since: `live` is exact, the driver's numbers are a step old."""
    step = client.load
    live = len(client.live)
    running = min(step.running, live) if step else 0
    total = facts.max_total_tokens
    return {
        "dp_rank": client.dp_rank,
        "num_running_reqs": running,
        "num_waiting_reqs": live - running,
        "num_waiting_uncached_tokens": step.waiting_uncached_tokens if step else 0,
        "num_total_reqs": live,
        "num_used_tokens": step.used_tokens if step else 0,
        "max_total_num_tokens": total,
        "token_usage": step.used_tokens / total if step else 0.0,
        "gen_throughput": metrics.throughput.tokens_per_second(now),
        "cache_hit_rate": cache_hit_rate(step) if step else 0.0,
        "utilization": running / facts.max_running_requests,
        "max_running_requests": facts.max_running_requests,
    }


def _json(value: object) -> web.Response:
    return web.Response(body=json_bytes(value), content_type="application/json")
