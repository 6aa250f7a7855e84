"""Frames between the HTTP process and the driver."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmroute_worker import messages
from warmroute_worker.messages import (
    Abort,
    Continue,
    Failed,
    Flush,
    FrameReader,
    Generate,
    KvEvents,
    Load,
    Message,
    Pause,
    Profile,
    Ready,
    Reply,
    Row,
    Sampling,
    Shutdown,
    StepOutput,
    Times,
    TokenLogprobs,
    decode,
    encode,
)

EVERY_KIND: list[Message] = [
    Generate("r1", [1, 2, 70000], 16, True, [5], Sampling(0.7, 40, 0.9, 2**63)),
    Generate("grüße", [], 1),
    Abort("r1"),
    Flush(7),
    Shutdown(),
    Pause(3, "retract"),
    Continue(4),
    Profile(5, "/tmp/x"),
    Profile(6, None),
    Ready(
        8192,
        320,
        4096,
        16,
        256,
        [257],
        "llama",
        ["LlamaForCausalLM"],
        "float32",
        "cpu",
        1 << 33,
        1 << 40,
        1.5,
        "native",
        "tp 2",
        "shared memory",
    ),
    Failed("--model-path nowhere: there is no such folder"),
    StepOutput(
        [
            Row("r1", [3, 4], None, 16, None),
            Row("r2", [], "error", 0, "too long"),
            Row("r3", [9], None, 0, None, TokenLogprobs(-0.5, [(9, -0.5), (1, -1.5)])),
            Row(
                "r4", [9], None, 0, None, TokenLogprobs(-0.5, []), [TokenLogprobs(-0.25, [(7, -0.25)])], Times(0.5, 1.5)
            ),
        ],
        Load(1, 2, 3, 4, 5, 6, 7, 8, 9, 0.5, 10, 11, 12, 13, 14, 15, 16),
    ),
    KvEvents([["BlockStored", [1 << 62], None, [1, 2], 2, None, "CPU"], ["AllBlocksCleared"]]),
    Reply(7, False, "2 requests are running"),
]


@pytest.mark.parametrize("message", EVERY_KIND, ids=lambda message: type(message).__name__)
def test_every_message_survives_the_way(message: Message) -> None:
    frame = encode(message)
    assert struct.unpack("<I", frame[:4])[0] == len(frame) - 4
    assert decode(frame[4:]) == message


@given(st.lists(st.integers(1, 50), min_size=1))
def test_pieces_of_any_size_make_the_same_messages(sizes: list[int]) -> None:
    stream = b"".join(map(encode, EVERY_KIND))
    reader, got, at, turn = FrameReader(), list[Message](), 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        got += reader.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert got == EVERY_KIND


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        b"",
        msgpack.packb([1, 2]),
        msgpack.packb({"type": "Nothing"}),
        msgpack.packb({"rid": "r"}),
        msgpack.packb({"type": "Abort"}),
        msgpack.packb({"type": "Abort", "rid": "r", "more": 1}),
    ],
)
def test_what_is_no_message_is_a_value_error(payload: bytes) -> None:
    with pytest.raises(ValueError, match="not a message of the worker"):
        decode(payload)


def test_an_absurd_length_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="longer than"):
        FrameReader().feed(struct.pack("<I", messages.MAX_FRAME_BYTES + 1))
