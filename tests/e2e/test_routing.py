"""Where requests go, seen from outside."""

import itertools
import json

import pytest

from tests.e2e.fleet import Fleet, chat, words


def test_second_turn_goes_where_the_first_was_answered(fleet: Fleet) -> None:
    """The answer is five times the question: known text alone would fail the threshold of 0.5."""
    workers = fleet.fake_workers(2)
    router = fleet.router("--policy", "cache_aware", "--cache-threshold", "0.5", workers=workers)
    for worker in workers:
        worker.script(chunks=10, chunk_bytes=100)
    for conversation in range(12):  # two idle workers: by luck alone 1 in 4,096
        question = f"conversation {conversation}: " + words(16, conversation)
        assert 150 < len(question) <= 200
        first = router.chat("Be brief.", question)
        said = first["choices"][0]["message"]["content"]
        assert len(said) >= 5 * len(question)
        second = router.chat("Be brief.", question, said, "And then?")
        assert second["system_fingerprint"] == first["system_fingerprint"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > first["usage"]["prompt_tokens"]


def test_equal_short_prompts_meet(fleet: Fleet) -> None:
    workers = fleet.fake_workers(2)
    router = fleet.router(workers=workers)
    prompt = "one two three four five six seven eight nine ten"
    answers = [router.post("/v1/completions", {"model": "fake-model", "prompt": prompt})[1] for _ in range(12)]
    assert len({answer["system_fingerprint"] for answer in answers}) == 1


@pytest.mark.parametrize("count", [2, 4])
def test_distinct_prompts_use_every_idle_worker(fleet: Fleet, count: int) -> None:
    """One after the other, so that the loads are always equal: a tie broken by index would leave workers cold."""
    router = fleet.router(workers=fleet.fake_workers(count))
    answers = [router.chat("s", words(60, seed)) for seed in range(16 * count)]
    assert len({answer["system_fingerprint"] for answer in answers}) == count


def test_round_robin_alternates(fleet: Fleet) -> None:
    router = fleet.router("--policy", "round_robin", workers=fleet.fake_workers(2))
    names = [router.chat("s", "the same text")["system_fingerprint"] for _ in range(8)]
    assert len(set(names)) == 2
    assert all(one != other for one, other in itertools.pairwise(names))


def test_two_models_go_to_their_own_workers(fleet: Fleet) -> None:
    one, two = fleet.fake_worker("--model", "one"), fleet.fake_worker("--model", "two")
    router = fleet.router(workers=[one, two])
    for worker, model in ((one, "one"), (two, "two")):
        answers = [router.chat("s", words(20, i), model=model) for i in range(4)]
        assert {answer["system_fingerprint"] for answer in answers} == {worker.name}


def test_dp_ranks_are_targets_of_their_own(fleet: Fleet) -> None:
    """The chosen rank is written into the body, and nothing else is."""
    worker = fleet.fake_worker("--dp-size", "2")
    router = fleet.router(workers=[worker])
    for seed in range(24):
        router.chat("s", words(60, seed))
        router.chat("s", words(60, seed))
    requests = worker.requests()
    assert {request.rank for request in requests} == {0, 1}
    for first, again in zip(requests[::2], requests[1::2], strict=True):
        assert first.rank == again.rank
    original = chat("s", words(60, 0))
    sent = json.loads(requests[0].body)
    assert sent.pop("data_parallel_rank") == requests[0].rank
    assert sent == original
