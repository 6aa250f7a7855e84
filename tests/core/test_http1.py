"""The `http` part of the extension through Python: what crosses the border. The parsing itself is tested in Rust."""

from __future__ import annotations

import pytest

from warmroute._core import BadHead, BodyReader, ChunkDecoder, HeadParser, RequestHead, ResponseHead, Route

CHAT = (
    b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nAuthorization: Bearer k\r\n"
    b"X-Request-Id: mine\r\nX-SMG-Routing-Key: k\r\nContent-Length: 2\r\n\r\n"
)


@pytest.fixture
def parser() -> HeadParser:
    return HeadParser(request_id_headers=["x-request-id"], max_head_bytes=1024)


def parse_request(parser: HeadParser, data: bytes) -> RequestHead:
    head = parser.request(data)
    assert head is not None
    return head


def parse_response(parser: HeadParser, data: bytes, head_request: bool = False) -> ResponseHead:
    head = parser.response(data, head_request)
    assert head is not None
    return head


def test_a_request_head_in_python_values(parser: HeadParser) -> None:
    head = parse_request(parser, CHAT + b"{}")
    assert (head.method, head.path, head.route, head.is_routed) == ("POST", b"/v1/chat/completions", Route.CHAT, True)
    assert (head.size, head.content_length, head.chunked) == (len(CHAT), 2, False)
    assert (head.keep_alive, head.http_1_0, head.expect_continue) == (True, False, False)
    assert (head.request_id, head.authorization) == (b"mine", b"Bearer k")
    assert head.routing_headers == b"x-smg-routing-key: k\r\n"


def test_what_is_absent(parser: HeadParser) -> None:
    head = parse_request(parser, b"GET /health HTTP/1.0\r\n\r\n")
    assert (head.content_length, head.request_id, head.authorization, head.routing_headers) == (-1, None, None, b"")
    assert (head.route, head.is_routed, head.keep_alive, head.http_1_0) == (Route.HEALTH, False, False, True)
    answer = parse_response(parser, b"HTTP/1.1 200 OK\r\n\r\n")
    assert (answer.content_length, answer.chunked, answer.keep_alive) == (-1, False, False)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.retry_after_seconds) == (-1, -1, -1)


def test_more_bytes_are_needed(parser: HeadParser) -> None:
    assert parser.request(CHAT[:-1]) is None
    assert parser.response(b"HTTP/1.1 200 OK\r\n", False) is None


@pytest.mark.parametrize(
    ("authorization", "line"),
    [(None, b"authorization: Bearer k\r\n"), (b"Bearer w", b"authorization: Bearer w\r\n"), (b"", b"")],
)
def test_the_head_for_a_worker(parser: HeadParser, authorization: bytes | None, line: bytes) -> None:
    head = parse_request(parser, CHAT)
    assert head.to_worker(b"w:1", authorization, b"ours", 7, None) == (
        b"POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: w:1\r\ncontent-length: 7\r\nx-request-id: ours\r\n"
        + line
        + b"Accept: */*\r\nX-SMG-Routing-Key: k\r\n\r\n"
    )


def test_the_head_for_the_control_app(parser: HeadParser) -> None:
    head = parse_request(parser, b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: x\r\nX: 1\r\nY: 2\r\n\r\n")
    assert head.to_control(-1) == b"GET /v1/models HTTP/1.1\r\nhost: h\r\nY: 2\r\n\r\n"
    assert head.to_control(0) == b"GET /v1/models HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\nY: 2\r\n\r\n"


def test_a_response_head_in_python_values(parser: HeadParser) -> None:
    data = (
        b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\nX-Prompt-Tokens: 12\r\nX-Cached-Tokens: 8\r\nRetry-After: 3\r\n"
        b"Server: s\r\n\r\n"
    )
    head = parse_response(parser, data + b"hello")
    assert (head.status, head.size, head.content_length, head.chunked) == (503, len(data), 5, False)
    assert (head.prompt_tokens, head.cached_tokens, head.retry_after_seconds, head.keep_alive) == (12, 8, 3, True)
    assert head.to_client(b"x-request-id: r\r\n", False, False) == (
        b"HTTP/1.1 503 Busy\r\nX-Prompt-Tokens: 12\r\nX-Cached-Tokens: 8\r\nRetry-After: 3\r\nServer: s\r\n"
        b"Content-Length: 5\r\nconnection: close\r\nx-request-id: r\r\n\r\n"
    )
    assert parse_response(parser, data, head_request=True).content_length == 0


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
        parser.response(b"SSH-2.0-OpenSSH\r\n", False)
    assert refusal.value.args[0] == 502


def test_a_parser_refuses_bad_configuration() -> None:
    with pytest.raises(ValueError, match="not a header name"):
        HeadParser(request_id_headers=["x request id"], max_head_bytes=1024)
    with pytest.raises(OverflowError):
        HeadParser(request_id_headers=[], max_head_bytes=-1)


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


def test_body_readers() -> None:
    chunked = BodyReader.of_chunks()
    assert (chunked.feed(b"5\r\nhel", 1), chunked.done, chunked.open_chunk_bytes) == (-1, False, 4)
    assert (chunked.feed(b"lo\r\n0\r\n\r\nnext", 2), chunked.done, chunked.open_chunk_bytes) == (9, True, -1)
    of_length = BodyReader.of_length(3)
    assert (of_length.feed(b"ab", 1), of_length.end_of_file(), of_length.feed(b"cd", 2), of_length.done) == (
        -1,
        False,
        1,
        True,
    )
    until_eof = BodyReader.until_eof()
    assert (until_eof.feed(b"ab", 1), until_eof.done, until_eof.end_of_file(), until_eof.done) == (
        -1,
        False,
        True,
        True,
    )
    with pytest.raises(BadHead) as refusal:
        BodyReader.of_chunks().feed(b"-1\r\n", 1)
    assert refusal.value.args[0] == 400


def test_usage() -> None:
    reader = BodyReader.of_chunks()
    assert reader.usage() == (-1, -1, -1)
    body = b'data: {"usage":{"prompt_tokens":12,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":8}}}\n\n'
    for byte in body:
        reader.feed(b"1\r\n%c\r\n" % byte, 1)
    assert reader.usage() == (12, 3, 8)


def test_chunk_decoder() -> None:
    decoder = ChunkDecoder(5)
    assert decoder.feed(b"3\r\nab") == (b"ab", -1)
    assert decoder.feed(b"c\r\n2\r\nde\r\n0\r\n\r\nnext") == (b"cde", 15)
    with pytest.raises(BadHead) as refusal:
        ChunkDecoder(5).feed(b"6\r\n")
    assert refusal.value.args[0] == 413
