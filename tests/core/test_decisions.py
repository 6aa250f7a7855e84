"""The seeds' flags: another value makes another decision. And the decisions that are promised."""

from __future__ import annotations

import pytest

from tests.core.fleet import NOW, SECOND, add, chat, core, release, route, select


@pytest.mark.parametrize(("cache_threshold", "to_holder"), [(0.3, True), (0.6, False)])
def test_cache_threshold(cache_threshold: float, to_holder: bool) -> None:
    made = core(2, cache_threshold=cache_threshold)
    holder = select(made, chat("k" * 512))  # still in flight: the other worker has the shorter queue
    lease = select(made, chat("k" * 512 + "n" * 512))
    assert (lease.slot == holder.slot) is to_holder


@pytest.mark.parametrize(
    ("balance_abs_threshold", "balance_rel_threshold", "to_holder"),
    [(4, 1.5, True), (3, 1.5, False), (3, 5.0, True)],
)
def test_balance_abs_threshold_and_balance_rel_threshold(
    balance_abs_threshold: int, balance_rel_threshold: float, to_holder: bool
) -> None:
    made = core(
        2, balance_abs_threshold=balance_abs_threshold, balance_rel_threshold=balance_rel_threshold, cache_threshold=0
    )
    leases = [select(made, chat("the prompt that everybody sends")), select(made, chat("another"))]
    busy = leases[0].slot
    while made.load(busy) < 5:
        leases.append(select(made, chat("the prompt that everybody sends")))
        assert leases[-1].slot == busy
    # 5 in flight at the holder, 1 at the other.
    assert (select(made, chat("the prompt that everybody sends")).slot == busy) is to_holder


@pytest.mark.parametrize(("max_tree_size", "to_holder"), [(10_000, True), (2_000, False)])
def test_max_tree_size(max_tree_size: int, to_holder: bool) -> None:
    made = core(1, max_tree_size=max_tree_size)
    for letter in "abcdef":
        route(made, chat(letter * 1_000))
    (newcomer,) = add(made)  # with the emptier cache: it gets what the first worker is not credited with
    assert (route(made, chat("a" * 1_000)) != newcomer) is to_holder


@pytest.mark.parametrize(("eviction_interval_secs", "to_holder"), [(120, True), (60, False)])
def test_eviction_interval(eviction_interval_secs: int, to_holder: bool) -> None:
    made = core(1, max_tree_size=2_000, eviction_interval_ns=eviction_interval_secs * SECOND)
    made.evict(NOW, 1)
    for letter in "abc":
        route(made, chat(letter * 1_000))
    made.evict(NOW + 60 * SECOND, 1)
    (newcomer,) = add(made)
    assert (route(made, chat("a" * 1_000)) != newcomer) is to_holder


def test_turn_two_of_a_chat_goes_where_its_answer_was_made() -> None:
    made = core(4)
    for conversation in range(16):
        question = f"Conversation {conversation}: " + "why? " * 20
        first = route(made, chat(question))
        answer = "because of this, and of that. " * (len(question) * 5 // 30)
        assert route(made, chat(question, answer, "and then?")) == first


def test_twelve_equal_short_prompts_go_to_one_of_two_idle_workers() -> None:
    made = core(2)
    prompt = chat("one two three four five six seven eight nine ten")
    assert len({route(made, prompt) for _ in range(12)}) == 1


def test_distinct_prompts_use_all_idle_workers() -> None:
    made = core(8)
    assert {route(made, chat(f"prompt {i}")) for i in range(8)} == set(range(8))


def test_a_busy_fleet_gets_even_shares() -> None:
    made = core(4)
    leases = [select(made, chat(f"prompt {i}")) for i in range(40)]
    assert [made.load(slot) for slot in range(4)] == [10] * 4
    for lease in leases:
        release(lease)
    assert [made.load(slot) for slot in range(4)] == [0] * 4


def test_a_shadow_policy_is_watched_and_changes_nothing() -> None:
    def run(shadow_policy: str | None) -> tuple[list[int], tuple[int, int]]:
        made = core(4, shadow_policy=shadow_policy, policy="random")
        slots = [route(made, chat(f"prompt {number % 8} " * 40)) for number in range(64)]
        return slots, made.shadow_decisions()

    alone, watched, itself = run(None), run("cache_aware"), run("random")
    assert alone[0] == watched[0] == itself[0]
    assert alone[1] == (0, 0)
    assert sum(watched[1]) == 64
    assert 0 < watched[1][0] < 64
    assert itself[1] == (64, 0)


def test_a_decision_says_why() -> None:
    made = core(3)
    body = chat("What is a cache? " * 50)
    explained = made.explain(b"/v1/chat/completions", b"", body, NOW)
    assert explained[1] == "nobody holds enough: most room among short queues"
    holder = route(made, body)
    chosen, reason, prompt_bytes, candidates = made.explain(b"/v1/chat/completions", b"", body, NOW)
    assert (chosen, reason) == (holder, "holds most of the prompt")
    assert [slot for slot, *_ in candidates] == [0, 1, 2]
    assert [held for _, held, *_ in candidates] == [prompt_bytes if slot == holder else 0 for slot in range(3)]
    assert {cost for *_, cost in candidates} == {None}
    assert made.explain(b"/v1/chat/completions", b"", chat("x"), NOW)[0] is not None
    assert core(0).explain(b"/v1/chat/completions", b"", chat("x"), NOW)[:2] == (None, "nobody is available")
