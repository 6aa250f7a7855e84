"""Ids and text: incremental detokenisation against decoding at once, stop strings against searching at once."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worker.byte_model import END, USER, byte_fallback_tokenizer, byte_tokenizer, chat_ids, write_folder
from warmroute_worker.chat import ChatTemplate
from warmroute_worker.stop_strings import StopStrings
from warmroute_worker.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

RAW = Tokenizer(byte_tokenizer().to_str())
FALLBACK = Tokenizer(byte_fallback_tokenizer().to_str())
SLOW = byte_tokenizer()

patient = settings(deadline=None)  # the machine may be busy; pytest has a time-out


def in_pieces(tokenizer: Tokenizer, ids: list[int], size: int, prompt: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt)
    return [detokenizer.feed(ids[start : start + size]) for start in range(0, len(ids), size)]


@patient
@given(st.lists(st.integers(0, 400)), st.integers(1, 5))
def test_any_bytes_decode_as_they_would_at_once(ids: list[int], size: int) -> None:
    whole = bytes(i for i in ids if i < 256).decode(errors="replace")
    text = "".join(in_pieces(RAW, ids, size, []))
    assert whole.startswith(text)
    assert whole[len(text) :] in ("", "\ufffd", "\ufffd" * 2), "only an incomplete character may be missing"
    assert RAW.decode(ids) == whole


@pytest.mark.parametrize("tokenizer", [RAW, FALLBACK])
@patient
@given(text=st.text(st.sampled_from("ab é\u2603\U0001f600\u0301\n"), max_size=20), size=st.integers(1, 7))
def test_text_comes_back_character_by_character(tokenizer: Tokenizer, text: str, size: int) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True)
    pieces = in_pieces(tokenizer, ids, size, [])
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_piece_with_a_leading_space_keeps_it_after_a_prompt() -> None:
    prompt, answer = FALLBACK.encode("a", add_special_tokens=True), FALLBACK.encode("b", add_special_tokens=True)
    assert "".join(in_pieces(FALLBACK, answer, 1, prompt)) == " b"
    assert "".join(in_pieces(FALLBACK, answer, 1, [])) == "b"


@patient
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<|end|>", "<|user|>", "<|"])))
def test_the_fast_encoder_does_what_the_tokenizer_does(parts: list[str]) -> None:
    text = "".join(parts)
    assert RAW.is_raw_bytes
    assert RAW.encode(text, add_special_tokens=True) == SLOW.encode(text).ids


def test_what_is_not_raw_bytes_is_not_taken_for_it() -> None:
    assert not FALLBACK.is_raw_bytes
    definition = json.loads(byte_tokenizer().to_str())
    definition["pre_tokenizer"]["add_prefix_space"] = True
    assert not Tokenizer(json.dumps(definition)).is_raw_bytes


def test_a_lone_surrogate_is_an_error() -> None:
    for tokenizer in (RAW, FALLBACK):
        with pytest.raises(ValueError, match="surrogate"):
            tokenizer.encode("a\ud800", add_special_tokens=True)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"there is no tokenizer\.json in"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert ChatTemplate.from_folder(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match="the chat template is not valid"):
        ChatTemplate.from_folder(tmp_path)


def test_chat_templates(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(write_folder(tmp_path))
    assert template is not None
    text = template.render([{"role": "user", "content": "hi <b>"}])
    assert text == "<|bos|><|user|>hi <b><|end|><|assistant|>"
    assert RAW.encode(text, add_special_tokens=False) == chat_ids((USER, "hi <b>"))
    with pytest.raises(ValueError, match="unknown role wizard"):
        template.render([{"role": "wizard", "content": ""}])
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}{{ tools }}"
    )
    template = ChatTemplate.from_folder(tmp_path)
    assert template is not None
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "<é>"}]
    assert template.render(messages) == '{"role": "user", "content": "<é>"}None'
    attack = ChatTemplate("{{ ''.__class__.__mro__ }}", {})
    with pytest.raises(ValueError, match="refuses"):
        attack.render([])


@patient
@given(
    st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text(st.sampled_from("abc"), max_size=4), max_size=12),
)
def test_stop_strings_do_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    whole = "".join(pieces)
    complete = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    expected = whole
    if complete:
        stop = max((stop for stop in stops if whole[: complete[0]].endswith(stop)), key=len)
        expected = whole[: complete[0] - len(stop)]
    stop_strings = StopStrings(stops)
    out = ""
    for piece in pieces:
        out += stop_strings.feed(piece)
        assert expected.startswith(out), "nothing that a stop string could still take back"
    assert out + stop_strings.finish() == expected
    assert (stop_strings.matched is not None) == bool(complete)


def test_encoding_a_long_prompt_is_fast() -> None:
    text = "The quick brown fox. " * 5000
    started = time.perf_counter()
    RAW.encode(text, add_special_tokens=True)
    assert time.perf_counter() - started < 0.03


def test_special_tokens_are_no_text() -> None:
    assert in_pieces(RAW, [72, END, USER, 105, 319, 5000], 1, []) == ["H", "", "", "i", "", ""]
