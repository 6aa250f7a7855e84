"""Real workers tell the router what they hold: prompts that it never saw are credited, over HTTP and over ZeroMQ."""

import json
import random
from typing import Any

import pytest

from tests.e2e.fleet import Fleet, RouterProcess, eventually
from tests.processes import free_port, request, request_json

pytestmark = pytest.mark.timeout(240)


def generate(url: str, ids: list[int]) -> dict[str, Any]:
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    status, answer = request_json("POST", url + "/generate", body)
    assert status == 200, answer
    assert isinstance(answer, dict)
    return dict(answer["meta_info"])


def credited(router: RouterProcess, ids: list[int]) -> dict[str, int]:
    """Tokens of the prompt that each worker is taken to hold, by its URL."""
    status, answer = router.post("/debug/route?path=/generate", {"input_ids": ids})
    assert status == 200, answer
    return {candidate["url"]: candidate["match_bytes"] // 4 for candidate in answer["candidates"]}


@pytest.mark.parametrize("source", ["http", "zmq"])
def test_what_a_worker_holds_is_known_whoever_sent_it(fleet: Fleet, source: str) -> None:
    port = free_port()
    config = json.dumps({"publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{port}"})
    warm = fleet.real_worker(*(("--kv-events-config", config) if source == "zmq" else ()))
    cold = fleet.real_worker()
    router = fleet.router("--kv-events", workers=[cold])
    labels = {"kv_events_endpoint": f"tcp://127.0.0.1:{port}"} if source == "zmq" else {}
    assert router.post("/workers", {"url": warm, "labels": labels})[0] == 202

    def followed() -> bool:
        rows = {w["url"]: w["targets"][0]["kv_events"] for w in router.workers() if w["targets"]}
        return (rows.get(warm) or {}).get("source") == source and (rows.get(cold) or {}).get("source") == "http"

    eventually("both are followed", followed, 20)
    dice = random.Random(1)
    ids = [dice.randrange(5, 250) for _ in range(300)]

    def is_known() -> bool:
        generate(warm, ids)  # a subscriber takes a moment to be known to its publisher
        return credited(router, [*ids, 7])[warm] == 256

    assert credited(router, [*ids, 7]) == {warm: 0, cold: 0}
    if source == "zmq":
        # What was published before anybody listened is lost without a replay, and nothing is made up from what follows.
        eventually("it is known", lambda: request("POST", warm + "/flush_cache")[0] == 200 and is_known(), 20)
    else:
        eventually("it is known", is_known, 20)
    assert credited(router, [*ids, 7])[cold] == 0

    meta = generate(router.url, [*ids, 7])
    assert meta["cached_tokens"] >= 256
    assert router.metrics().total("warmroute_kv_cache_tokens", worker=warm) >= 256
    assert request("POST", warm + "/flush_cache")[0] == 200
    eventually("it is forgotten", lambda: credited(router, [*ids, 7])[warm] == 0, 20)
