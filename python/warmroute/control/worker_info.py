"""How the worker API shows a worker: sglang-router's fields, and the core's view of each target."""

from dataclasses import asdict
from typing import Any

from warmroute._core import TargetInfo
from warmroute.control.kv_feeds import KvFeeds
from warmroute.control.load_monitor import LoadMonitor
from warmroute.control.worker_facts import RankLoad
from warmroute.control.workers import Registry, Worker


def worker_info(registry: Registry, loads: LoadMonitor, feeds: KvFeeds, worker: Worker) -> dict[str, Any]:
    """One element of `GET /workers`. Credentials are never shown."""
    facts, spec = worker.facts, worker.spec
    return {
        "id": worker.worker_id,
        "url": spec.url,
        "model_id": facts.models[0] if facts else spec.model_id,
        "models": list(facts.models) if facts else [],
        "worker_type": "regular",
        "connection_mode": "http",
        "runtime_type": facts.runtime if facts else None,
        "priority": spec.priority,
        "cost": spec.cost,
        "labels": dict(spec.labels),
        "policy": registry.policy(worker),
        "disable_health_check": spec.disable_health_check,
        "is_healthy": registry.health(worker) == "ready",
        "status": registry.status(worker),
        "load": registry.load(worker),
        "dp_size": facts.dp_size if facts else None,
        "kv_capacity_tokens": facts.kv_capacity_tokens if facts else None,
        "last_failure": worker.failure,
        "job_status": _job_status(worker),
        "targets": [
            _target(target, loads.load(worker, target.rank)) | {"kv_events": feeds.view(worker, target.rank)}
            for target in registry.targets(worker)
        ],
    }


def _job_status(worker: Worker) -> dict[str, Any] | None:
    """The registration as a job, while it goes on: sglang-router runs one, we just keep asking the worker."""
    if worker.facts is not None:
        return None
    return {
        "job_type": "AddWorker",
        "worker_url": worker.spec.url,
        "status": "failed" if worker.overdue else "processing",
        "message": worker.failure,
        "timestamp": worker.registered_unix_ms // 1000,
    }


def _target(target: TargetInfo, load: RankLoad | None) -> dict[str, Any]:
    """`engine`: what the worker said last of this rank; None: it does not say, or has not for a while."""
    prompt = target.prompt_tokens
    return {
        "dp_rank": target.rank,
        "health": target.health,
        "breaker": target.breaker,
        "available": target.available,
        "load": target.load,
        "outstanding_tokens": target.outstanding_tokens,
        "selections": target.selections,
        "failures": target.failures,
        "prompt_tokens": target.prompt_tokens,
        "predicted_cached_tokens": target.predicted_cached_tokens,
        "reported_cached_tokens": target.reported_cached_tokens,
        "cache_hit_rate": target.reported_cached_tokens / prompt if prompt else None,
        "completion_tokens": target.completion_tokens,
        "kv_capacity_tokens": target.kv_capacity_tokens,
        "index_characters": target.index_characters,
        "sticky_keys": target.sticky_keys,
        "engine": None if load is None else asdict(load),
    }
