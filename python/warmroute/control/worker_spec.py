"""What `POST /workers` and `--worker-urls` say about a worker, parsed once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from warmroute._core import policy_names
from warmroute.directory import parse_worker_url


class BadSpec(ValueError):  # noqa: N818 (what the client sent, as BadRequest)
    """The message is for the client."""


POLICY_LABEL: Final = "policy"


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """`priority`, `cost` and `labels` are kept and shown; their defaults are sglang-router's.

    No policy reads them, and of the labels only `policy` says anything: how its models are routed.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    model_id: str | None = None
    """Name that stands for what the worker says of itself."""
    priority: int = 50
    cost: float = 1.0
    labels: Mapping[str, str] = field(default_factory=dict)
    disable_health_check: bool = False

    @property
    def policy(self) -> str | None:
        return self.labels.get(POLICY_LABEL)


def parse_spec(body: bytes) -> WorkerSpec:
    """Raises BadSpec. Fields that are not known are ignored: clients send those of several routers."""
    try:
        given: Any = json.loads(body)
    except ValueError as error:
        raise BadSpec(f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise BadSpec('the body must be an object like {"url": "http://host:port"}')
    url = _typed(given, "url", str)
    if not url:
        raise BadSpec("url: is missing")
    try:
        url = parse_worker_url(url)
    except ValueError as error:
        raise BadSpec(f"url: {error}") from None
    worker_type = _typed(given, "worker_type", str)
    if worker_type not in (None, "regular"):
        raise BadSpec(f"worker_type: {worker_type!r} is not supported, only 'regular'")
    api_key = _typed(given, "api_key", str)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise BadSpec("api_key: must be printable ASCII")
    labels = _typed(given, "labels", dict) or {}
    if not all(isinstance(value, str) for value in labels.values()):
        raise BadSpec("labels: must map names to strings")
    policy = labels.get(POLICY_LABEL)
    if policy is not None and policy not in policy_names():
        raise BadSpec(f"labels.policy: {policy!r} is not one of {', '.join(policy_names())}")
    spec = WorkerSpec(url=url, api_key=api_key or None, model_id=_typed(given, "model_id", str) or None, labels=labels)
    rest = {
        "priority": _typed(given, "priority", int),
        "cost": _typed(given, "cost", float),
        "disable_health_check": _typed(given, "disable_health_check", bool),
    }
    return _replace(spec, {name: value for name, value in rest.items() if value is not None})


def _replace(spec: WorkerSpec, values: dict[str, Any]) -> WorkerSpec:
    return WorkerSpec(**{name: getattr(spec, name) for name in WorkerSpec.__slots__} | values)


def _typed(given: dict[str, Any], name: str, kind: type) -> Any:
    value = given.get(name)
    if kind is float and type(value) is int:
        return float(value)
    if value is not None and type(value) is not kind:
        raise BadSpec(f"{name}: must be of type {kind.__name__}")
    return value
