"""The `http` part of the extension through Python: what crosses the border. The parsing itself is tested in Rust."""

from __future__ import annotations

from typing import Any

import pytest

from warmroute._core import (
    BadHead,
    BadRequest,
    ChunkDecoder,
    Core,
    HeadParser,
    RequestHead,
    Response,
    Route,
    RoutedRequest,
    Upstreams,
)
from warmroute.config import RouterConfig
from warmroute.engine import build_core

CHAT = (
    b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nAuthorization: Bearer k\r\n"
    b"X-Request-Id: mine\r\nX-SMG-Routing-Key: k\r\nContent-Length: 2\r\n\r\n"
)

WHOLE = CHAT.replace(b"Length: 2", b"Length: 48") + b'{"messages":[{"role":"user","content":"Hello"}]}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"


@pytest.fixture
def parser() -> HeadParser:
    return HeadParser(
        request_id_headers=["x-request-id"],
        max_head_bytes=1024,
        max_body_bytes=100,
        authorization=b"Bearer k",
        id_prefix=b"made-",
    )


def parse_request(parser: HeadParser, data: bytes) -> RequestHead:
    head = parser.request(data)
    assert head is not None
    return head


def begin_response(parser: HeadParser, data: bytes, method: bytes = b"POST") -> Response:
    request = parse_request(parser, method + b" / HTTP/1.1\r\nHost: h\r\n\r\n")
    begun = parser.begin_response(data, request, 1)
    assert begun is not None
    return begun[0]


def core_with_a_worker(dp_size: int = 1) -> Core:
    core = build_core(RouterConfig(seed=1, hash_seed=1))
    slots = core.add_worker(["m"], dp_size, 1000, None, 1)
    for _ in range(2):
        core.observe_probe(slots[0], True, 1)
    return core


def test_a_request_head_in_python_values(parser: HeadParser) -> None:
    head = parse_request(parser, CHAT + b"{}")
    assert (head.method, head.path, head.route, head.is_routed) == ("POST", b"/v1/chat/completions", Route.CHAT, True)
    assert (head.size, head.content_length, head.chunked) == (len(CHAT), 2, False)
    assert (head.keep_alive, head.http_1_0, head.expect_continue) == (True, False, False)
    assert (head.request_id, head.authorization, head.is_authorized) == (b"mine", b"Bearer k", True)
    assert head.body_in(CHAT + b"{}") == b"{}"
    assert head.routing_headers == b"x-smg-routing-key: k\r\n"


def test_what_is_absent(parser: HeadParser) -> None:
    head = parse_request(parser, b"GET /health HTTP/1.0\r\n\r\n")
    assert (head.content_length, head.authorization, head.is_authorized, head.routing_headers) == (-1, None, False, b"")
    assert (head.route, head.is_routed, head.keep_alive, head.http_1_0) == (Route.HEALTH, False, False, True)
    answer = begin_response(parser, b"HTTP/1.1 200 OK\r\n\r\n")
    assert (answer.content_length, answer.chunked, answer.keep_alive) == (-1, False, False)
    assert (answer.tokens, answer.retry_after_seconds) == ((-1, -1, -1), -1)


def test_more_bytes_are_needed(parser: HeadParser) -> None:
    assert parser.request(CHAT[:-1]) is None
    assert core_with_a_worker().begin(parser, Upstreams(), CHAT[:-1], False, 1) is None
    assert parser.begin_response(b"HTTP/1.1 200 OK\r\n", parse_request(parser, CHAT), 1) is None


def test_who_names_no_request_gets_a_name_of_its_own(parser: HeadParser) -> None:
    unnamed = CHAT.replace(b"X-Request-Id: mine\r\n", b"")
    names = [parse_request(parser, unnamed).request_id, parser.new_request_id(), parser.new_request_id()]
    assert names == [b"made-00000001", b"made-00000002", b"made-00000003"]


NEEDS_NO_WORKER = CHAT.replace(b"/v1/chat/completions", b"/v1/models")


@pytest.mark.parametrize(
    ("data", "is_whole", "rest", "keep_alive", "is_for_worker"),
    [
        (CHAT + b"{}", True, b"", True, True),
        (CHAT + b"{}POST /next", True, b"POST /next", True, True),
        (CHAT + b"{", False, b"{", True, True),
        (CHAT, False, b"", True, True),
        (CHAT.replace(b"Length: 2", b"Length: 101") + b"x" * 101, False, b"x" * 101, True, True),
        (CHAT.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"0\r\n", False, b"0\r\n", True, True),
        (CHAT.replace(b"Bearer k", b"Bearer l") + b"{}", True, b"", True, False),
        (CHAT.replace(b"Bearer k", b"Bearer") + b"{}", True, b"", True, False),
        (CHAT.replace(b"Accept: */*", b"Connection: close") + b"{}", True, b"", False, True),
        (NEEDS_NO_WORKER + b"{}", True, b"", True, False),
    ],
)
def test_a_request_begins(
    parser: HeadParser, data: bytes, is_whole: bool, rest: bytes, keep_alive: bool, is_for_worker: bool
) -> None:
    begun = core_with_a_worker().begin(parser, Upstreams(), data, False, 1)
    assert begun is not None
    assert begun[1:] == (is_whole, rest, keep_alive, is_for_worker, *[None] * 5)
    if is_whole:
        assert begun[0].body_in(data) == b"{}"


def test_a_request_begins_and_is_routed(parser: HeadParser) -> None:
    core, upstreams = core_with_a_worker(), Upstreams()
    begun = core.begin(parser, upstreams, CHAT + b"{}" + b"GET", True, 5)
    assert begun is not None
    (head, is_whole, rest, _, _), (refusal, *others) = begun[:5], begun[5:]
    assert (head.request_id, is_whole, rest, others) == (b"mine", True, b"GET", [None] * 4)
    assert isinstance(refusal, BadRequest)
    assert refusal.args[1] == "messages"
    begun = core.begin(parser, upstreams, WHOLE, True, 5)
    assert begun is not None
    request, lease, *sent = begun[5:]
    assert isinstance(request, RoutedRequest)
    assert lease is not None
    assert (lease.selected_ns, core.load(lease.slot), sent) == (5, 1, [None] * 3)
    # A request that has not come whole, or is for nobody here, takes nothing.
    for data in (CHAT, CHAT.replace(b"/v1/chat/completions", b"/workers") + b"{}"):
        begun = core.begin(parser, upstreams, data, True, 5)
        assert begun is not None
        assert begun[5:] == (None,) * 5
    assert core.ledgers() == [(2, 1, 1, 0)]


def test_what_is_sent_to_a_worker_whose_place_is_known(parser: HeadParser) -> None:
    core, upstreams, pool = core_with_a_worker(), Upstreams(), object()

    def begin() -> tuple[Any, ...]:
        begun = core.begin(parser, upstreams, WHOLE, True, 5)
        assert begun is not None
        assert begun[6] is not None
        return begun[0], begun[6], *begun[7:]

    head, lease, *sent = begin()
    assert sent == [None] * 3
    upstreams.put(lease.slot, lease.incarnation, b"w:1", b"Bearer w", pool)
    head, lease, *sent = begin()
    assert sent == [pool, *lease.to_worker(head, b"w:1", b"Bearer w", WHOLE)]
    upstreams.put(lease.slot, lease.incarnation + 1, b"w:1", None, pool)
    assert begin()[2:] == (None,) * 3, "it is another worker's place by now"
    upstreams.put(lease.slot, lease.incarnation, b"w:1", None, pool)
    upstreams.forget(object())
    assert begin()[2] is pool
    upstreams.forget(pool)
    assert begin()[2:] == (None,) * 3


@pytest.mark.parametrize(
    ("data", "answered", "can_stay"),
    [
        (OK + b"hello", True, True),
        (OK + b"hello more", True, False),
        (EARLY + OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"hello", True, False),
        (OK + b"hell", False, False),
        (OK[:-1], False, False),
        (b"SSH-2.0-OpenSSH\r\n", False, False),
        (OK.replace(b"200 OK", b"503 Busy") + b"hello", False, False),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", False, False),
    ],
)
def test_a_whole_answer_is_dealt_with_at_once(parser: HeadParser, data: bytes, answered: bool, can_stay: bool) -> None:
    core = core_with_a_worker()
    begun = core.begin(parser, Upstreams(), WHOLE, True, 5)
    assert begun is not None
    head, lease = begun[0], begun[6]
    assert lease is not None
    slot = lease.slot
    found = lease.answer(parser, head, True, False, data, 7)
    assert core.load(slot) == (not answered)
    if answered:
        assert found == (
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx-request-id: mine\r\n\r\nhello",
            can_stay,
            None,
            None,
        )
    else:
        assert found is None


@pytest.mark.parametrize(
    ("authorization", "line"),
    [(None, b"authorization: Bearer k\r\n"), (b"Bearer w", b"authorization: Bearer w\r\n"), (b"", b"")],
)
def test_a_request_for_a_worker(parser: HeadParser, authorization: bytes | None, line: bytes) -> None:
    core = core_with_a_worker()
    body = b'{"messages":[{"role":"user","content":"hello"}]}'
    data = CHAT.replace(b"Length: 2", b"Length: %d" % len(body)) + body + b"what comes next"
    head = parse_request(parser, data)
    _, lease, slot, incarnation = core.route(head, data, 2)
    assert lease is not None
    assert (lease.slot, lease.incarnation, lease.selected_ns) == (slot, incarnation, 2)
    assert lease.to_worker(head, b"w:1", authorization, data) == (
        b"POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: w:1\r\ncontent-length: %d\r\nx-request-id: mine\r\n"
        % len(body)
        + line
        + b"Accept: */*\r\nX-SMG-Routing-Key: k\r\n\r\n"
        + body,
        None,
    )


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("length", [100, 16 * 1024, 200_000])
def test_head_and_body_for_a_worker(parser: HeadParser, length: int, dp_size: int) -> None:
    """A long body is not copied behind its head; a rank is spliced in wherever it is."""
    core = core_with_a_worker(dp_size)
    body = b'{"prompt":"%b"}' % (b"x" * (length - 13))
    data = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    head = parse_request(parser, data)
    _, lease, _, _ = core.route(head, data, 2)
    assert lease is not None
    first, rest = lease.to_worker(head, b"w:1", None, data)
    sent_head, _, sent_body = (first + (rest or b"")).partition(b"\r\n\r\n")
    expected = body
    if lease.splice is not None:
        offset, inserted = lease.splice
        expected = body[:offset] + inserted + body[offset:]
    assert (lease.splice is None) == (dp_size == 1)
    assert sent_body == expected
    assert b"content-length: %d\r\n" % len(expected) in sent_head
    assert (rest is None) == (len(expected) <= 16 * 1024)


def test_the_head_for_the_control_app(parser: HeadParser) -> None:
    head = parse_request(parser, b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: x\r\nX: 1\r\nY: 2\r\n\r\n")
    assert head.to_control(-1) == b"GET /v1/models HTTP/1.1\r\nhost: h\r\nY: 2\r\n\r\n"
    assert head.to_control(0) == b"GET /v1/models HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\nY: 2\r\n\r\n"


def test_a_response_head_in_python_values(parser: HeadParser) -> None:
    data = (
        b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\nX-Prompt-Tokens: 12\r\nX-Cached-Tokens: 8\r\nRetry-After: 3\r\n"
        b"Server: s\r\n\r\n"
    )
    head = begin_response(parser, data + b"hello")
    assert (head.status, head.content_length, head.chunked) == (503, 5, False)
    assert (head.tokens, head.retry_after_seconds, head.keep_alive) == ((12, -1, 8), 3, True)
    assert head.to_client(b"x-request-id: r\r\n", False, False) == (
        b"HTTP/1.1 503 Busy\r\nX-Prompt-Tokens: 12\r\nX-Cached-Tokens: 8\r\nRetry-After: 3\r\nServer: s\r\n"
        b"Content-Length: 5\r\nconnection: close\r\nx-request-id: r\r\n\r\n"
    )
    assert begin_response(parser, data, b"HEAD").content_length == 0


@pytest.mark.parametrize(
    ("data", "can_stay", "body"),
    [
        (OK + b"hello", True, b"hello"),
        (EARLY + EARLY + OK + b"hello", True, b"hello"),
        (OK + b"hel", None, b"hel"),
        (OK + b"hello?", False, b"hello"),
        (OK.replace(b"200 OK", b"200 OK\r\nConnection: close") + b"hello", False, b"hello"),
        (OK.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n", True, b"0\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", None, b"hello"),
    ],
)
def test_a_response_begins(parser: HeadParser, data: bytes, can_stay: bool | None, body: bytes) -> None:
    begun = parser.begin_response(data, parse_request(parser, CHAT), 7)
    assert begun is not None
    response, status, stays = begun
    assert (status, stays, response.body_in(data)) == (200, can_stay, body)
    assert (response.began_ns, response.last_ns) == (7, 7)
    response.held_until(9)
    assert response.began_ns == 9


def test_an_answer_as_it_is(parser: HeadParser) -> None:
    request = parse_request(parser, CHAT)
    answer = begin_response(parser, EARLY + OK + b"hel").as_it_is(request, False, EARLY + OK + b"hel")
    assert answer == (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nconnection: close\r\nx-request-id: mine\r\n\r\nhel")
    endless = b"HTTP/1.1 200 OK\r\n\r\nhello"
    assert begin_response(parser, endless).as_it_is(request, True, endless) is None
    old = parse_request(parser, b"GET / HTTP/1.0\r\n\r\n")
    assert begin_response(parser, OK).as_it_is(old, True, OK) is None


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET /" + b"a" * 2000, 431),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_a_refusal_has_a_status_and_a_message(parser: HeadParser, data: bytes, status: int) -> None:
    with pytest.raises(BadHead) as refusal:
        parser.request(data)
    assert refusal.value.args[0] == status
    assert isinstance(refusal.value.args[1], str)
    assert isinstance(refusal.value, ValueError)


def test_a_worker_that_speaks_garbage(parser: HeadParser) -> None:
    with pytest.raises(BadHead) as refusal:
        begin_response(parser, b"SSH-2.0-OpenSSH\r\n")
    assert refusal.value.args[0] == 502


def test_a_parser_refuses_bad_configuration() -> None:
    def configured(names: list[str], max_head_bytes: int) -> HeadParser:
        return HeadParser(
            request_id_headers=names,
            max_head_bytes=max_head_bytes,
            max_body_bytes=1,
            authorization=None,
            id_prefix=b"",
        )

    with pytest.raises(ValueError, match="not a header name"):
        configured(["x request id"], 1024)
    with pytest.raises(OverflowError):
        configured([], -1)
    assert parse_request(configured([], 1024), b"GET / HTTP/1.0\r\n\r\n").is_authorized


def test_routes_compare_and_hash(parser: HeadParser) -> None:
    routes = [
        Route.CHAT,
        Route.COMPLETIONS,
        Route.GENERATE,
        Route.HEALTH,
        Route.LIVENESS,
        Route.READINESS,
        Route.CONTROL,
    ]
    assert len(set(routes)) == 7
    assert sorted(int(route) for route in routes) == list(range(7))
    assert parse_request(parser, CHAT).route in {Route.CHAT}
    assert parse_request(parser, CHAT).route != Route.CONTROL


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_bodies_of_responses(parser: HeadParser) -> None:
    chunked = begin_response(parser, CHUNKED)
    assert (chunked.feed(b"5\r\nhel", 1), chunked.done, chunked.open_chunk_bytes) == (-1, False, 4)
    assert (chunked.feed(b"lo\r\n0\r\n\r\nnext", 2), chunked.done, chunked.open_chunk_bytes) == (9, True, -1)
    assert chunked.last_ns == 2
    sized = begin_response(parser, b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n")
    assert (sized.feed(b"ab", 1), sized.end_of_file(), sized.feed(b"cd", 2), sized.done) == (-1, False, 1, True)
    endless = begin_response(parser, b"HTTP/1.1 200 OK\r\n\r\n")
    assert (endless.feed(b"ab", 1), endless.done, endless.end_of_file(), endless.done) == (-1, False, True, True)
    with pytest.raises(BadHead) as refusal:
        begin_response(parser, CHUNKED).feed(b"-1\r\n", 1)
    assert refusal.value.args[0] == 400
    with pytest.raises(OverflowError):
        begin_response(parser, CHUNKED).feed(b"1\r\n", -1)


def test_tokens(parser: HeadParser) -> None:
    body = b'data: {"usage":{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":8}}}\n\n'
    for head, expected in (
        (CHUNKED, (12, 3, 8)),
        (CHUNKED.replace(b"OK\r\n", b"OK\r\nx-prompt-tokens: 5\r\nx-cached-tokens: 4\r\n"), (5, 3, 4)),
        (CHUNKED.replace(b"OK\r\n", b"OK\r\nx-prompt-tokens: 5\r\n"), (5, 3, -1)),
    ):
        response = begin_response(parser, head)
        for byte in body:
            response.feed(b"1\r\n%c\r\n" % byte, 1)
        assert response.tokens == expected


def test_chunk_decoder() -> None:
    decoder = ChunkDecoder(5)
    assert decoder.feed(b"3\r\nab") == (b"ab", -1)
    assert decoder.feed(b"c\r\n2\r\nde\r\n0\r\n\r\nnext") == (b"cde", 15)
    with pytest.raises(BadHead) as refusal:
        ChunkDecoder(5).feed(b"6\r\n")
    assert refusal.value.args[0] == 413
