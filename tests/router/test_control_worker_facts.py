"""What is read out of workers' answers, and out of registrations."""

import json
import uuid
from typing import Any

import pytest

from warmroute.control.worker_facts import (
    MAX_DP_SIZE,
    RankLoad,
    UnusableAnswer,
    WorkerFacts,
    read_facts,
    read_load,
    read_rank_loads,
)
from warmroute.control.worker_id import is_worker_id, new_worker_id
from warmroute.control.worker_spec import BadSpec, WorkerSpec, parse_spec

CARD = {"id": "m", "object": "model", "owned_by": "sglang", "max_model_len": 8192}
VLLM_METRICS = """# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="1000",num_cpu_blocks="0"} 1.0
"""

ANSWERS: list[tuple[Any, Any, str | None, str | None, WorkerFacts]] = [
    # our worker, and SGLang: one name everywhere
    (
        {"served_model_name": "m", "model_path": "/models/m", "dp_size": 2, "max_total_num_tokens": 1000},
        {"data": [CARD]},
        None,
        None,
        WorkerFacts(("m",), 2, 1000, "sglang", 8192),
    ),
    # SGLang keeps it in the state of its schedulers
    (
        {"model_path": "/models/m", "internal_states": [{"max_total_num_tokens": 77}, {}]},
        {"data": [CARD]},
        None,
        None,
        WorkerFacts(("m",), 1, 77, "sglang", 8192),
    ),
    # several served names and an adapter
    (
        None,
        {"data": [{"id": "m", "owned_by": "vllm"}, {"id": "m-latest"}, {"id": "lora-1"}, {"id": 7}, "x"]},
        VLLM_METRICS,
        None,
        WorkerFacts(("m", "m-latest", "lora-1"), 1, 16000, "vllm", None),
    ),
    # the registration's name comes first
    ({"served_model_name": "m"}, {"data": [CARD]}, None, "mine", WorkerFacts(("mine", "m"), 1, 0, "sglang", 8192)),
    # nothing but a path
    ({"model_path": "/models/m"}, None, None, None, WorkerFacts(("/models/m",), 1, 0, "sglang", None)),
    # nothing but a list
    (None, {"data": [{"id": "m"}]}, "garbage", None, WorkerFacts(("m",), 1, 0, "external", None)),
    # nonsense in numbers is not believed
    (
        {"served_model_name": "m", "dp_size": "2", "max_total_num_tokens": -5, "internal_states": {}},
        None,
        None,
        None,
        WorkerFacts(("m",), 1, 0, "sglang", None),
    ),
    (
        {"served_model_name": "m", "dp_size": 10**9},
        None,
        None,
        None,
        WorkerFacts(("m",), MAX_DP_SIZE, 0, "sglang", None),
    ),
]


@pytest.mark.parametrize(("server_info", "models", "metrics", "model_id", "facts"), ANSWERS)
def test_read_facts(
    server_info: Any, models: Any, metrics: str | None, model_id: str | None, facts: WorkerFacts
) -> None:
    assert read_facts(server_info, models, metrics, model_id) == facts


@pytest.mark.parametrize("models", [None, {}, [], {"data": None}, {"data": [{}]}, "text"])
def test_worker_without_a_name_cannot_be_used(models: Any) -> None:
    with pytest.raises(UnusableAnswer, match="names a model"):
        read_facts({}, models, None, None)


RANK_LOADS: list[tuple[Any, tuple[RankLoad, ...] | None]] = [
    (
        {
            "timestamp": 1,
            "loads": [
                {"dp_rank": 1, "num_running_reqs": 3, "num_waiting_reqs": 1, "num_used_tokens": 7, "token_usage": 0.5},
                {
                    "dp_rank": 0,
                    "num_running_reqs": 2,
                    "num_waiting_reqs": 0,
                    "num_used_tokens": 10,
                    "max_total_num_tokens": 100,
                    "gen_throughput": 12.5,
                    "cache_hit_rate": 0.25,
                },
            ],
        },
        (RankLoad(0, 2, 0, 10, 100, None, 12.5, 0.25), RankLoad(1, 3, 1, 7, 0, 0.5, None, None)),
    ),
    # /get_load; without a rank the place counts
    ([{"num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": 5}], (RankLoad(0, 2, 1, 5, 0, None, None, None),)),
    ([{"dp_rank": 0, "num_tokens": 5}, {"dp_rank": 0, "num_tokens": 5}], None),
    ([{"dp_rank": -1, "num_tokens": 5}], None),
    ([{"dp_rank": 0, "num_tokens": 5}, {}], None),
    ({"loads": [{"num_used_tokens": float("inf")}]}, None),
    ({"loads": []}, None),
    (None, None),
    ("10", None),
]


@pytest.mark.parametrize(("answer", "loads"), RANK_LOADS)
def test_read_rank_loads(answer: Any, loads: tuple[RankLoad, ...] | None) -> None:
    assert read_rank_loads(answer) == loads


LOADS: list[tuple[Any, int | None]] = [
    ([{"dp_rank": 0, "num_reqs": 3, "num_tokens": 10}, {"dp_rank": 1, "num_tokens": 5}], 15),
    ([{"num_tokens": 0}], 0),
    ({"timestamp": 1, "loads": [{"num_used_tokens": 10}, {"num_used_tokens": 2}], "aggregate": {}}, 12),
    ({"num_tokens": 4}, 4),
    # what is not understood is unknown, never idle
    ([], None),
    ({}, None),
    ({"loads": []}, None),
    ([{"num_reqs": 3}], None),
    ([{"num_tokens": -1}], None),
    ([{"num_tokens": True}], None),
    ([{"num_tokens": 1}, 7], None),
    (None, None),
    ("10", None),
]


@pytest.mark.parametrize(("answer", "load"), LOADS)
def test_read_load(answer: Any, load: int | None) -> None:
    assert read_load(answer) == load


def test_parse_spec() -> None:
    body = {
        "url": "http://w:8000/",
        "api_key": "k",
        "model_id": "m",
        "priority": 1,
        "cost": 2,
        "labels": {"zone": "a"},
        "worker_type": "regular",
        "disable_health_check": True,
        "bootstrap_port": None,
        "something_of_another_router": {"a": 1},
    }
    spec = parse_spec(json.dumps(body).encode())
    assert spec == WorkerSpec("http://w:8000", "k", "m", 1, 2.0, {"zone": "a"}, True)
    assert "api_key" not in repr(spec)
    assert parse_spec(b'{"url": "w:1"}') == WorkerSpec("http://w:1")
    # A client that builds the body from its settings sends null or "" for what it does not have: no "Bearer None".
    assert parse_spec(b'{"url": "w:1", "api_key": null, "model_id": ""}') == WorkerSpec("http://w:1")
    assert parse_spec(b'{"url": "w:1", "api_key": ""}').api_key is None


BAD_SPECS = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[]", "must be an object"),
    (b"{}", "url: is missing"),
    (b'{"url": null}', "url: is missing"),
    (b'{"url": 7}', "url: must be of type str"),
    (b'{"url": "ftp://w"}', "url: 'ftp://w' is not a worker URL"),
    (b'{"url": "w:1", "worker_type": "prefill"}', "worker_type: 'prefill' is not supported"),
    (b'{"url": "w:1", "labels": {"a": 1}}', "labels: must map names to strings"),
    (b'{"url": "w:1", "labels": {"policy": "sticky"}}', "labels.policy: 'sticky' is not one of cache_aware, "),
    (b'{"url": "w:1", "labels": []}', "labels: must be of type dict"),
    (b'{"url": "w:1", "priority": "high"}', "priority: must be of type int"),
    (b'{"url": "w:1", "disable_health_check": 1}', "disable_health_check: must be of type bool"),
    (b'{"url": "w:1", "api_key": "a\\nb"}', "api_key: must be printable ASCII"),
]


@pytest.mark.parametrize(("body", "message"), BAD_SPECS)
def test_bad_spec(body: bytes, message: str) -> None:
    with pytest.raises(BadSpec) as caught:
        parse_spec(body)
    assert message in str(caught.value)


def test_worker_ids() -> None:
    first, second = new_worker_id(1_700_000_000_000, b"\xff" * 10), new_worker_id(1_700_000_000_001, b"\x00" * 10)
    assert first < second  # they sort by time
    for text in (first, second):
        value = uuid.UUID(text)
        assert value.version == 7
        assert value.variant == uuid.RFC_4122
        assert value.int >> 80 in (1_700_000_000_000, 1_700_000_000_001)
        assert is_worker_id(text)
        assert is_worker_id(text.upper())
    for text in ("", "1", "http://w:1", first[:-1], first.replace("-", ""), "{" + first + "}"):
        assert not is_worker_id(text)
