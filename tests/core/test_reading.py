"""What the core reads of a body is what Python's `json` reads of it, whatever its spelling."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.core.fleet import core
from warmroute._core import BadRequest, RoutedRequest

CORE = core()
CHAT, COMPLETIONS, GENERATE = b"/v1/chat/completions", b"/v1/completions", b"/generate"

# Lone surrogates, too: Python's clients can send them, as escapes.
texts = st.text(st.characters(), max_size=40) | st.text('aé\ud83d\ude00\\"/\n\t\x7f', max_size=20)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
parts = st.fixed_dictionaries({"type": st.just("text"), "text": texts})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "critic"]), "content": texts | st.lists(parts)},
    optional={"name": texts, "extra": values, "tool_calls": st.lists(st.dictionaries(texts, values, max_size=3))},
)
chats = st.fixed_dictionaries(
    {"messages": st.lists(messages, min_size=1, max_size=5)},
    optional={
        "model": texts,
        "stream": st.booleans(),
        "tools": st.lists(st.dictionaries(texts, values, max_size=3), max_size=2),
        "cache_salt": texts,
        "rid": texts,
        "priority": st.integers(-(2**40), 2**40),
        "max_tokens": st.integers(0, 9),
        "anything": values,
    },
)


def read(path: bytes, body: bytes) -> RoutedRequest:
    return CORE.read(path, b"", body, 0)


def told(request: RoutedRequest) -> tuple[Any, ...]:
    return request.model, request.stream, request.rid, request.priority, request.prompt_bytes, request.blocks()


def shuffled(value: Any, draw: Any) -> Any:
    """The same, with the keys of body, messages and parts in another order; free-form values stay as they are."""

    def reorder(mapping: dict[str, Any]) -> dict[str, Any]:
        return {key: mapping[key] for key in draw(st.permutations(list(mapping)))}

    body = reorder(value)
    body["messages"] = [reorder(message) for message in body["messages"]]
    for message in body["messages"]:
        if isinstance(message["content"], list):
            message["content"] = [reorder(part) for part in message["content"]]
    return body


def utf8(text: str) -> bytes:
    """Lone surrogates stay escapes: there is no other way to send them."""
    return "".join(c if not 0xD800 <= ord(c) < 0xE000 else f"\\u{ord(c):04x}" for c in text).encode()


@settings(max_examples=60)
@given(chats, st.data())
def test_spelling_and_order_do_not_matter(body: dict[str, Any], data: st.DataObject) -> None:
    plain = read(CHAT, json.dumps(body).encode())
    assert plain.stream is body.get("stream", False)
    assert plain.priority == body.get("priority")
    if not any("\ud800" <= c <= "\udfff" for c in body.get("model", "")):
        assert plain.model == body.get("model")
    other = shuffled(body, data.draw)
    for spelled in (
        utf8(json.dumps(other, ensure_ascii=False)),
        json.dumps(other, indent=data.draw(st.integers(0, 3))).encode(),
        json.dumps(other, separators=(" ,\r\n", "\t: ")).encode(),
        json.dumps(other).replace("/", "\\/").encode(),
    ):
        assert told(read(CHAT, spelled)) == told(plain)


@settings(max_examples=50)
@given(chats, texts, texts)
def test_another_turn_extends_what_was_there(body: dict[str, Any], answer: str, question: str) -> None:
    first = read(CHAT, json.dumps(body).encode()).blocks()
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    longer = body | {"messages": body["messages"] + turns}
    second = read(CHAT, json.dumps(longer).encode()).blocks()
    assert second[: len(first)] == first
    assert len(second) > len(first)


@settings(max_examples=50)
@given(chats, chats)
def test_the_last_of_equal_keys_counts(first: dict[str, Any], last: dict[str, Any]) -> None:
    both = b"%b,%b" % (json.dumps(first).encode()[:-1], json.dumps(last).encode()[1:])
    assert told(read(CHAT, both)) == told(read(CHAT, json.dumps(json.loads(both)).encode()))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=300), st.data())
def test_token_ids(ids: list[int], data: st.DataObject) -> None:
    asked = read(GENERATE, json.dumps({"input_ids": ids}).encode())
    assert asked.prompt_bytes == 4 * len(ids)
    spaced = json.dumps({"rid": None, "input_ids": ids}, indent=1).encode()
    assert read(GENERATE, spaced).blocks() == asked.blocks()
    longer = read(GENERATE, json.dumps({"input_ids": [*ids, 1]}).encode())
    assert longer.blocks()[: len(asked.blocks()) - 1] == asked.blocks()[:-1]
    bad: Any = data.draw(st.sampled_from([-1, 0.5, 2**32, "1", None, True, {}]))
    wrong = [*ids, bad, *ids]
    with pytest.raises(BadRequest, match="'input_ids' must be"):
        read(GENERATE, json.dumps({"input_ids": wrong}).encode())


@settings(max_examples=150)
@given(chats, st.data())
@example({"messages": [{"role": "user", "content": "x"}]}, None)
def test_damage_is_refused_where_json_refuses_it(body: dict[str, Any], data: st.DataObject | None) -> None:
    text = json.dumps(body)
    if data is not None:
        at = data.draw(st.integers(0, len(text) - 1))
        damage = data.draw(st.sampled_from(["", '"', "\\", "{", "]", ",", "1", "\x00", "\n", "nul", "\\u12"]))
        text = text[:at] + damage + text[at + data.draw(st.integers(0, 2)) :]
    try:
        understood = json.loads(text, parse_constant=refuse)
    except ValueError:
        with pytest.raises(BadRequest):
            read(CHAT, text.encode())
        return
    try:
        request = read(CHAT, text.encode())
    except BadRequest:
        # It is JSON: then it is no chat.
        assert not is_chat(understood)
    else:
        assert told(request) == told(read(CHAT, json.dumps(understood).encode()))


def refuse(constant: str) -> None:
    """Python's `json` takes NaN and Infinity, which are no JSON."""
    raise ValueError(constant)


def is_chat(value: Any) -> bool:
    """As far as the core reads it."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("model"), str | None)
        and isinstance(value.get("stream"), bool | None)
        and value.get("data_parallel_rank") is None
        and isinstance(value.get("messages"), list)
        and len(value["messages"]) > 0
        and all(is_message(message) for message in value["messages"])
    )


def is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str | list | None)
        and all(isinstance(part, dict | str) for part in value.get("content") or [])
    )
