"""What a worker's answers say about it, in the dialects of SGLang, vLLM and our own worker. Pure."""

import re
from dataclasses import dataclass, replace
from typing import Any, Final

# A worker that claims more ranks than this is misread rather than believed; slots are few (4,096).
MAX_DP_SIZE: Final = 1024


class UnusableAnswer(ValueError):  # noqa: N818
    """The worker answers, but does not say what it serves. The message names what is missing."""


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    models: tuple[str, ...]
    """The name first, then aliases (further served names, adapters)."""
    dp_size: int
    kv_capacity_tokens: int
    """Per rank; 0: unknown."""
    runtime: str
    """sglang, vllm or external."""
    max_model_len: int | None

    def as_one_rank(self) -> "WorkerFacts":
        """Of a worker that divides requests among its ranks itself."""
        return replace(self, dp_size=1, kv_capacity_tokens=self.kv_capacity_tokens * self.dp_size)


def read_facts(server_info: Any, models: Any, metrics: str | None, model_id: str | None) -> WorkerFacts:
    """Of the JSON of `/server_info`, the JSON of `/v1/models`, and the text of `/metrics`; None: the worker has none.

    `model_id`, when given, takes the place of the name. Raises UnusableAnswer when no name is found at all.
    """
    info = server_info if isinstance(server_info, dict) else {}
    cards = [card for card in _list(models, "data") if isinstance(card, dict) and isinstance(card.get("id"), str)]
    names = [model_id, info.get("served_model_name"), *(card["id"] for card in cards)]
    if not any(names):
        names = [info.get("model_path")]
    unique = tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name))
    if not unique:
        raise UnusableAnswer("neither /server_info nor /v1/models names a model")
    owner = next((card["owned_by"] for card in cards if isinstance(card.get("owned_by"), str)), "")
    runtime = owner if owner in ("sglang", "vllm") else "sglang" if info else "external"
    lengths = [_count(card.get("max_model_len")) for card in cards]
    return WorkerFacts(
        models=unique,
        dp_size=min(_count(info.get("dp_size")) or 1, MAX_DP_SIZE),
        kv_capacity_tokens=_kv_capacity(info, metrics),
        runtime=runtime,
        max_model_len=next((length for length in lengths if length), None)
        or _count(info.get("context_length"))
        or None,
    )


def read_load(answer: Any) -> int | None:
    """Tokens in use, of the JSON of `/get_load` (a list with an entry per rank) or of `/v1/loads`; None: not readable.

    SGLang changed both more than once; what is not understood must not look like an idle worker.
    """
    entries = answer if isinstance(answer, list) else _list(answer, "loads")
    if not entries and isinstance(answer, dict):
        entries = [answer]
    total = 0
    for entry in entries:
        tokens = _used_tokens(entry)
        if tokens is None:
            return None
        total += tokens
    return total if entries else None


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What a worker says of one of its dp ranks; None: it does not say."""

    rank: int
    running_requests: int
    waiting_requests: int
    used_tokens: int
    kv_capacity_tokens: int
    """0: it does not say."""
    token_usage: float | None
    generated_tokens_per_second: float | None
    cache_hit_rate: float | None


def read_rank_loads(answer: Any) -> tuple[RankLoad, ...] | None:
    """Of the JSON of `/v1/loads` or of `/get_load`, by rank; None: not readable, or two rows for one rank."""
    entries = answer if isinstance(answer, list) else _list(answer, "loads")
    loads = [_rank_load(place, entry) for place, entry in enumerate(entries)]
    by_rank = {load.rank: load for load in loads if load is not None}
    if not loads or len(by_rank) != len(loads):
        return None
    return tuple(by_rank[rank] for rank in sorted(by_rank))


def _rank_load(place: int, entry: Any) -> RankLoad | None:
    tokens = _used_tokens(entry)
    if tokens is None:
        return None
    rank = entry.get("dp_rank", place)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < MAX_DP_SIZE:
        return None
    waiting = _count(entry.get("num_waiting_reqs"))
    # /get_load counts those that wait among all.
    running = entry.get("num_running_reqs", _count(entry.get("num_reqs")) - waiting)
    return RankLoad(
        rank=rank,
        running_requests=max(_count(running), 0),
        waiting_requests=waiting,
        used_tokens=tokens,
        kv_capacity_tokens=_count(entry.get("max_total_num_tokens")),
        token_usage=_number(entry.get("token_usage")),
        generated_tokens_per_second=_number(entry.get("gen_throughput")),
        cache_hit_rate=_number(entry.get("cache_hit_rate")),
    )


def _used_tokens(entry: Any) -> int | None:
    if not isinstance(entry, dict):
        return None
    tokens = next((entry[key] for key in ("num_tokens", "num_used_tokens") if key in entry), None)
    number = _number(tokens)
    return None if number is None else int(number)


def _kv_capacity(info: dict[str, Any], metrics: str | None) -> int:
    states = [state for state in _list(info, "internal_states") if isinstance(state, dict)]
    for source in (info, *states):
        if tokens := _count(source.get("max_total_num_tokens")):
            return tokens
    # vLLM tells it nowhere but in the labels of one metric.
    for line in (metrics or "").splitlines():
        if line.startswith("vllm:cache_config_info{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            blocks, block_tokens = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            if blocks.isdecimal() and block_tokens.isdecimal():
                return int(blocks) * int(block_tokens)
    return 0


def _list(answer: Any, key: str) -> list[Any]:
    value = answer.get(key) if isinstance(answer, dict) else None
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    return float(value) if is_number else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
