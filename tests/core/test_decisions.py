"""The seeds' flags: another value makes another decision. And the decisions that are promised."""

from __future__ import annotations

import pytest

from tests.core.fleet import CHAT, NOW, SECOND, add, chat, core, read, release, route, select


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
    assert explained.reason == "nobody holds enough: most room among short queues"
    holder = route(made, body)
    for explained in (made.explain(CHAT, b"", body, NOW), made.explain_request(read(made, body), NOW)):
        assert (explained.policy, explained.chosen) == ("cache_aware", holder)
        assert explained.reason == "holds most of the prompt"
        assert [slot for slot, *_ in explained.candidates] == [0, 1, 2]
        held = [explained.prompt_bytes if slot == holder else 0 for slot in range(3)]
        assert [match_bytes for _, match_bytes, *_ in explained.candidates] == held
        assert {cost for *_, cost in explained.candidates} == {None}
    assert made.explain(CHAT, b"", chat("x"), NOW).chosen is not None
    nobody = core(0).explain(CHAT, b"", chat("x"), NOW)
    assert (nobody.chosen, nobody.reason) == (None, "nobody is available")


def test_what_is_explained_is_what_is_selected() -> None:
    made = core(8, policy="random")
    for _ in range(50):
        request = read(made, chat("x"))
        explained = made.explain_request(request, NOW)
        lease = made.select(request, NOW, False)
        assert lease is not None
        assert lease.slot == explained.chosen


def test_a_routing_key_is_sticky_and_fails_over() -> None:
    made = core(4, policy="manual")

    def of_key(key: str, now: int = NOW) -> int:
        request = made.read(CHAT, f"x-smg-routing-key: {key}\r\n".encode(), chat("x"), now)
        lease = made.select(request, now, False)
        assert lease is not None
        release(lease)
        return lease.slot

    first = of_key("a")
    assert {of_key("a") for _ in range(20)} == {first}
    for _ in range(3):
        made.observe_probe(first, False, NOW)
    second = of_key("a")
    assert {of_key("a") for _ in range(20)} == {second} != {first}
    made.observe_probe(first, True, NOW)
    assert of_key("a") == first
    assert len({of_key(f"key {number}") for number in range(64)}) == 4
    assert sum(target.sticky_keys for target in made.targets()) == 66
    made.evict(NOW + 4 * 3600 * SECOND + 1, 1 << 20)
    assert sum(target.sticky_keys for target in made.targets()) == 0
    made.check_integrity()


@pytest.mark.parametrize("assignment_mode", ["min_load", "min_group"])
def test_assignment_mode(assignment_mode: str) -> None:
    made = core(2, policy="manual", assignment_mode=assignment_mode)
    lease = made.select(made.read(CHAT, b"x-smg-routing-key: 1\r\n", chat("x"), NOW), NOW, False)
    assert lease is not None
    has_a_key, other = lease.slot, 1 - lease.slot
    release(lease)
    in_flight = []
    while made.load(other) <= made.load(has_a_key):
        in_flight.append(select(made, chat("y")))  # without a key: anywhere, and not remembered
    chosen = made.explain(CHAT, b"x-smg-routing-key: 2\r\n", chat("x"), NOW).chosen
    assert chosen == (has_a_key if assignment_mode == "min_load" else other)


def test_max_idle() -> None:
    made = core(32, policy="manual", max_idle_ns=10 * SECOND)

    def at(now: int) -> int:
        lease = made.select(made.read(CHAT, b"x-session-id: s\r\n", chat("x"), now), now, False)
        assert lease is not None
        release(lease)
        return lease.slot

    assert len({at(NOW + second * SECOND) for second in range(0, 100, 10)}) == 1
    assert len({at(NOW + second * SECOND) for second in range(200, 300, 11)}) > 1


def test_a_model_has_the_policy_of_its_first_worker() -> None:
    made = core(0)
    add(made, ("plain",))
    for policy in ("round_robin", "manual"):  # the second worker's word does not count
        made.observe_probe(made.add_worker(("turns",), 1, 0, policy, NOW)[0], True, NOW)
    assert made.policy_of_model("plain") == "cache_aware"
    assert made.policy_of_model("turns") == "round_robin"
    slots = [route(made, chat("the same", model="turns")) for _ in range(6)]
    assert slots in ([1, 2] * 3, [2, 1] * 3)
    made.remove_worker(1)
    assert made.policy_of_model("turns") == "round_robin"
    made.remove_worker(2)
    made.add_worker(("turns",), 1, 0, None, NOW)
    assert made.policy_of_model("turns") == "cache_aware"
    with pytest.raises(ValueError, match='no policy is called "sticky", only cache_aware'):
        made.add_worker(("turns",), 1, 0, "sticky", NOW)


def test_blocks_are_counted_per_target() -> None:
    made = core(3)
    assert made.index_entries() == [0, 0, 0]
    holder = route(made, chat("k" * 1_000))
    blocks = len(read(made, chat("k" * 1_000)).blocks())
    assert blocks > 3
    assert made.index_entries() == [blocks if slot == holder else 0 for slot in range(3)]
    made.restart_worker(holder, NOW)
    assert made.index_entries() == [0, 0, 0]
