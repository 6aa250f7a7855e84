//! What a good head says, and the heads that are written from it.

use proptest::prelude::*;
use router_core::http1::{BadHeaderName, HeadParser, RequestHead, ResponseHead, Route};

fn parser() -> HeadParser {
    HeadParser::new(vec!["x-request-id".into(), "X-Correlation-Id".into()], 65536).unwrap()
}

fn request(head: &str) -> RequestHead {
    parser().request(head.as_bytes()).unwrap().expect("a whole head")
}

fn response(head: &str) -> ResponseHead {
    parser().response(head.as_bytes(), false).unwrap().expect("a whole head")
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

const OPENAI_CLIENT: &str = "POST /v1/chat/completions HTTP/1.1\r\n\
    Host: 127.0.0.1:30000\r\n\
    Accept-Encoding: gzip, deflate\r\n\
    Connection: keep-alive\r\n\
    Accept: application/json\r\n\
    Content-Type: application/json\r\n\
    User-Agent: OpenAI/Python 2.8.1\r\n\
    X-Stainless-Lang: python\r\n\
    Authorization: Bearer sk-1\r\n\
    X-SMG-Routing-Key: alice\r\n\
    x-warmroute-worker: forged\r\n\
    X-Request-ID: mine\r\n\
    traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\
    Content-Length: 135\r\n\r\n";

#[test]
fn a_client_head_is_read() {
    let head = request(&[OPENAI_CLIENT, "{\"model\""].concat());
    assert_eq!(head.method(), "POST");
    assert_eq!(head.path(), b"/v1/chat/completions");
    assert_eq!(head.route(), Route::Chat);
    assert_eq!(head.size(), OPENAI_CLIENT.len());
    assert_eq!(head.content_length(), Some(135));
    assert!(!head.chunked() && head.keep_alive() && !head.http_1_0() && !head.expect_continue());
    assert_eq!(head.request_id(), Some(&b"mine"[..]));
    assert_eq!(head.authorization(), Some(&b"Bearer sk-1"[..]));
    assert_eq!(text(head.routing_headers()), "x-smg-routing-key: alice\r\n");
}

#[test]
fn a_worker_is_told_what_it_needs() {
    let head = request(OPENAI_CLIENT);
    let expected = |authorization: &str| {
        format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: w:1\r\ncontent-length: 140\r\nx-request-id: ours\r\n\
             {authorization}Accept: application/json\r\nContent-Type: application/json\r\n\
             User-Agent: OpenAI/Python 2.8.1\r\nX-SMG-Routing-Key: alice\r\n\
             traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n"
        )
    };
    let rows: &[(Option<&[u8]>, &str)] = &[
        (None, "authorization: Bearer sk-1\r\n"),
        (Some(b"Bearer worker"), "authorization: Bearer worker\r\n"),
        (Some(b""), ""),
    ];
    for (authorization, line) in rows {
        assert_eq!(text(head.to_worker(b"w:1", *authorization, b"ours", Some(140), None)), expected(line));
    }
}

#[test]
fn a_chosen_rank_stands_in_for_the_clients() {
    let head = request("POST /generate HTTP/1.1\r\nHost: h\r\nX-Data-Parallel-Rank: 7\r\nAccept: */*\r\n\r\n");
    let ranks = |rank| {
        let written = text(head.to_worker(b"w", None, b"id", Some(2), rank)).to_lowercase();
        let lines = written.lines().filter(|line| line.starts_with("x-data-parallel-rank"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(ranks(None), ["x-data-parallel-rank: 7"]);
    assert_eq!(ranks(Some(3)), ["x-data-parallel-rank: 3"]);
}

#[test]
fn the_control_app_gets_everything_end_to_end() {
    let head = request(OPENAI_CLIENT);
    let written = text(head.to_control(None));
    let kept = OPENAI_CLIENT
        .replace("Host: ", "host: ")
        .replace("Connection: keep-alive\r\n", "")
        .replace("x-warmroute-worker: forged\r\n", "")
        .replace("Content-Length: 135\r\n", "");
    assert_eq!(written, kept);
    assert!(text(head.to_control(Some(3))).contains("\r\ncontent-length: 3\r\n"));
}

#[test]
fn routes() {
    let rows = [
        ("POST", "/v1/chat/completions", Route::Chat),
        ("POST", "/v1/chat/completions?a=b", Route::Chat),
        ("POST", "http://h/v1/chat/completions", Route::Chat),
        ("POST", "/v1/completions", Route::Completions),
        ("POST", "/generate", Route::Generate),
        ("GET", "/health", Route::Health),
        ("GET", "/liveness", Route::Liveness),
        ("GET", "/readiness", Route::Readiness),
        ("GET", "/v1/chat/completions", Route::Control),
        ("OPTIONS", "/v1/chat/completions", Route::Control),
        ("post", "/generate", Route::Control),
        ("POST", "/generate/", Route::Control),
        ("POST", "//generate", Route::Control),
        ("POST", "/Generate", Route::Control),
        ("POST", "/%67enerate", Route::Control),
        ("HEAD", "/health", Route::Control),
        ("POST", "/health", Route::Control),
        ("GET", "/v1/models", Route::Control),
        ("OPTIONS", "*", Route::Control),
    ];
    for (method, target, route) in rows {
        let head = request(&format!("{method} {target} HTTP/1.1\r\nHost: h\r\n\r\n"));
        assert_eq!(head.route(), route, "{method} {target}");
        let routed = matches!(route, Route::Chat | Route::Completions | Route::Generate);
        assert_eq!(head.route().is_routed(), routed);
    }
}

#[test]
fn an_absolute_target_becomes_a_path_and_a_host() {
    let rows = [
        ("http://other:81/a?b=c", "GET /a?b=c HTTP/1.1\r\nhost: other:81\r\n\r\n", "/a"),
        ("HTTPS://other", "GET / HTTP/1.1\r\nhost: other\r\n\r\n", "/"),
        ("/a?b=http://c/d", "GET /a?b=http://c/d HTTP/1.1\r\nhost: h\r\n\r\n", "/a"),
    ];
    for (target, written, path) in rows {
        let head = request(&format!("GET {target} HTTP/1.1\r\nHost: h\r\n\r\n"));
        assert_eq!(text(head.to_control(None)), written);
        assert_eq!(head.path(), path.as_bytes());
    }
}

#[test]
fn connection_options_are_honoured() {
    let rows = [
        ("HTTP/1.1", "", true),
        ("HTTP/1.1", "Connection: close\r\n", false),
        ("HTTP/1.1", "Connection: CLOSE\r\n", false),
        ("HTTP/1.1", "Connection: keep-alive, close\r\n", false),
        ("HTTP/1.1", "Connection: keep-alive\r\nConnection: close\r\n", false),
        ("HTTP/1.1", "Connection: x-y ,\tclose\r\n", false),
        ("HTTP/1.1", "Connection: closed\r\n", true),
        ("HTTP/1.0", "", false),
        ("HTTP/1.0", "Connection: keep-alive\r\n", true),
        ("HTTP/1.0", "Connection: Keep-Alive, close\r\n", false),
    ];
    for (version, line, keep_alive) in rows {
        let head = request(&format!("GET / {version}\r\nHost: h\r\n{line}\r\n"));
        assert_eq!(head.keep_alive(), keep_alive, "{version} {line}");
        assert_eq!(head.http_1_0(), version == "HTTP/1.0");
    }
}

#[test]
fn hop_by_hop_fields_go_no_further() {
    let head = request(
        "GET / HTTP/1.1\r\nHost: h\r\nConnection: x-a, X-B\r\nX-A: 1\r\nx-b: 2\r\nX-C: 3\r\nconnection: accept\r\n\
         Accept: */*\r\nKeep-Alive: timeout=5\r\nTE: trailers\r\nTrailer: x\r\nProxy-Connection: close\r\n\
         Proxy-Authorization: Basic x\r\nProxy-Authenticate: x\r\nUpgrade: h2c\r\nExpect: 100-continue\r\n\
         X-WarmRoute-Slot: 1\r\nX-Warmroute-: 1\r\nX-Warmrouted: kept\r\n\r\n",
    );
    assert!(head.keep_alive() && head.expect_continue());
    assert_eq!(text(head.to_control(None)), "GET / HTTP/1.1\r\nhost: h\r\nX-C: 3\r\nX-Warmrouted: kept\r\n\r\n");
}

#[test]
fn credentials_named_hop_by_hop_are_not_seen_at_all() {
    let head = request("GET / HTTP/1.1\r\nHost: h\r\nConnection: authorization\r\nAuthorization: Bearer a\r\n\r\n");
    assert_eq!(head.authorization(), None);
    assert!(!text(head.to_control(None)).contains("Bearer"));
}

#[test]
fn request_ids() {
    let longest = "a".repeat(128);
    let too_long = "a".repeat(129);
    let rows: &[(String, Option<&str>)] = &[
        ("".into(), None),
        ("X-Request-Id: a\r\n".into(), Some("a")),
        ("X-Correlation-Id: b\r\n".into(), Some("b")),
        ("X-Correlation-Id: b\r\nX-Request-Id: a\r\n".into(), Some("a")),
        ("X-Request-Id: a\r\nX-Request-Id: b\r\n".into(), Some("a")),
        ("X-Request-Id: \r\nX-Correlation-Id: b\r\n".into(), Some("b")),
        ("X-Request-Id: a b\r\n".into(), None),
        ("X-Request-Id: a\tb\r\n".into(), None),
        ("X-Request-Id: \u{e4}\r\nX-Correlation-Id: b\r\n".into(), Some("b")),
        (format!("X-Request-Id: {longest}\r\n"), Some(&longest)),
        (format!("X-Request-Id: {too_long}\r\n"), None),
    ];
    for (lines, expected) in rows {
        let head = request(&format!("GET / HTTP/1.1\r\nHost: h\r\n{lines}\r\n"));
        assert_eq!(head.request_id(), expected.map(str::as_bytes), "{lines}");
    }
}

#[test]
fn configured_names_are_checked() {
    for name in ["", "a b", "a:", "\u{e4}", "a\r\n"] {
        assert_eq!(HeadParser::new(vec![name.into()], 1).unwrap_err(), BadHeaderName(name.into()));
    }
}

#[test]
fn leading_empty_lines_count_into_the_size() {
    let head = request("\r\n\r\nGET /a HTTP/1.1\r\nHost: h\r\n\r\nGET /b");
    assert_eq!((head.path(), head.size()), (&b"/a"[..], 32));
}

#[test]
fn worker_framing() {
    // (status line and fields, answers HEAD, content length, chunked, keep-alive)
    let rows: &[(&str, bool, Option<u64>, bool, bool)] = &[
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", false, Some(5), false, true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n", false, Some(5), false, false),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", false, None, true, true),
        ("HTTP/1.1 200 OK\r\n", false, None, false, false),
        ("HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n", false, None, false, false),
        ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\n", false, Some(5), false, false),
        ("HTTP/1.0 200 OK\r\nContent-Length: 5\r\nConnection: keep-alive\r\n", false, Some(5), false, true),
        ("HTTP/1.1 100 Continue\r\n", false, Some(0), false, true),
        ("HTTP/1.1 103 Early Hints\r\nLink: x\r\n", false, Some(0), false, true),
        ("HTTP/1.1 204 No Content\r\n", false, Some(0), false, true),
        ("HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n", false, Some(0), false, true),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n", false, Some(0), false, true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n", true, Some(0), false, true),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", true, Some(0), false, true),
        ("HTTP/1.1 200 OK\r\n", true, Some(0), false, true),
    ];
    for (lines, head_request, content_length, chunked, keep_alive) in rows {
        let head = parser().response(format!("{lines}\r\nbody").as_bytes(), *head_request).unwrap().unwrap();
        assert_eq!(head.size(), lines.len() + 2, "{lines}");
        assert_eq!(head.content_length(), *content_length, "{lines}");
        assert_eq!(head.chunked(), *chunked, "{lines}");
        assert_eq!(head.keep_alive(), *keep_alive, "{lines}");
    }
}

#[test]
fn worker_numbers() {
    let rows = [("0", Some(0)), ("17", Some(17)), ("", None), ("-1", None), ("1.5", None), ("soon", None)];
    for (value, expected) in rows {
        let head = response(&format!(
            "HTTP/1.1 503 Busy\r\nX-Prompt-Tokens: {value}\r\nx-cached-tokens: {value}\r\nRetry-After: {value}\r\n\r\n"
        ));
        assert_eq!(head.status(), 503);
        assert_eq!([head.prompt_tokens(), head.cached_tokens(), head.retry_after_seconds()], [expected; 3], "{value}");
    }
    assert_eq!(response("HTTP/1.1 200 OK\r\n\r\n").retry_after_seconds(), None);
}

#[test]
fn a_client_gets_the_workers_head() {
    let worker = "HTTP/1.1 200 Very OK\r\nContent-Type: text/event-stream\r\nX-Request-Id: theirs\r\nX-Cached-Tokens: 1\r\n\
        X-SMG-Error-Code: e\r\nX-Warmroute-Worker: forged\r\nServer:  s \r\nKeep-Alive: x\r\nConnection: X-Hop\r\n\
        X-Hop: 1\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 5\r\n\r\n";
    let common = "HTTP/1.1 200 Very OK\r\nContent-Type: text/event-stream\r\nX-Cached-Tokens: 1\r\n\
        X-SMG-Error-Code: e\r\nServer:  s\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n";
    let head = response(worker);
    let rows = [
        (true, false, "Content-Length: 5\r\nx-request-id: ours\r\n\r\n"),
        (false, false, "Content-Length: 5\r\nconnection: close\r\nx-request-id: ours\r\n\r\n"),
        (true, true, "transfer-encoding: chunked\r\nx-request-id: ours\r\n\r\n"),
    ];
    for (keep_alive, chunked, rest) in rows {
        let written = text(head.to_client(b"x-request-id: ours\r\n", keep_alive, chunked));
        assert_eq!(written, [common, rest].concat());
    }
}

#[test]
fn a_bodiless_answer_keeps_the_length_it_may_state() {
    let rows = [
        ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", true, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"),
        ("HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n", false, "HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n"),
        ("HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\n", false, "HTTP/1.1 204 None\r\n\r\n"),
        ("HTTP/1.0 200 OK\r\n\r\n", true, "HTTP/1.1 200 OK\r\n\r\n"),
        ("HTTP/1.1 200\r\n\r\n", true, "HTTP/1.1 200 \r\n\r\n"),
        ("HTTP/1.1 200 \r\n\r\n", true, "HTTP/1.1 200 \r\n\r\n"),
    ];
    for (worker, head_request, expected) in rows {
        let head = parser().response(worker.as_bytes(), head_request).unwrap().unwrap();
        assert_eq!(text(head.to_client(b"", true, false)), expected);
    }
}

#[test]
fn garbage_of_a_worker_is_its_own_fault() {
    let rows: &[&[u8]] = &[
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"{\"error\": 1}",
        b"\x15\x03\x01",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 200 OK\r\nX: y\n\r\n",
        b"HTTP/1.1 200 O\x00K\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    ];
    for head in rows {
        let refusal = parser().response(head, false).expect_err(&head.escape_ascii().to_string());
        assert_eq!(refusal.status, 502, "{}", head.escape_ascii());
    }
    let endless = HeadParser::new(vec![], 64).unwrap().response(&[b"HTTP/1.1 200 ", &[b'a'; 64][..]].concat(), false);
    assert_eq!(endless.unwrap_err().status, 502);
}

/// Heads made of plausible and implausible pieces, so that a good part of them is whole.
fn any_head() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop::sample::select(vec![
        "GET ",
        "POST ",
        "/",
        "/generate",
        " HTTP/1.1",
        " HTTP/1.0",
        "HTTP/1.1 200 OK",
        "HTTP/1.1 ",
        "304 ",
        "\r\n",
        "\r\n",
        "\r\n",
        "\r\n\r\n",
        "\n",
        "\r",
        " ",
        ":",
        "Host: h\r\n",
        "Connection: close, x\r\n",
        "X: y\r\n",
        "Content-Length: ",
        "5",
        "Transfer-Encoding: chunked\r\n",
        "\0",
        "\u{e4}",
        "http://h",
        "*",
        "?",
        "#",
    ]);
    let pieces = prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat().into_bytes());
    let well_begun = pieces.clone().prop_map(|rest| [b"POST /generate HTTP/1.1\r\nHost: h\r\n", &rest[..]].concat());
    prop_oneof![pieces, well_begun, prop::collection::vec(any::<u8>(), 0..200)]
}

proptest! {
    #[test]
    fn any_bytes_are_answered_and_cuts_do_not_matter(data in any_head(), head_request: bool) {
        let parser = HeadParser::new(vec!["x".into()], 128).unwrap();
        let status = |data: &[u8]| parser.request(data).map(|head| head.map(|head| {
            (head.size(), head.path().to_vec(), head.content_length(), head.chunked(), head.to_control(None))
        })).map_err(|refusal| refusal.status);
        let answer = |data: &[u8]| parser.response(data, head_request).map(|head| head.map(|head| {
            (head.size(), head.status(), head.content_length(), head.to_client(b"", true, false))
        })).map_err(|refusal| refusal.status);
        let (whole_request, whole_response) = (status(&data), answer(&data));
        for cut in 0..data.len() {
            let (part_request, part_response) = (status(&data[..cut]), answer(&data[..cut]));
            prop_assert!(part_request == Ok(None) || part_request == whole_request, "request cut at {cut}");
            prop_assert!(part_response == Ok(None) || part_response == whole_response, "response cut at {cut}");
        }
    }

    #[test]
    fn what_is_written_is_read_the_same_again(data in any_head()) {
        if let Ok(Some(head)) = parser().request(&data) {
            let written = head.to_control(head.content_length());
            let again = parser().request(&written).unwrap().unwrap();
            prop_assert_eq!(again.size(), written.len());
            prop_assert_eq!(again.path(), head.path());
            prop_assert_eq!(again.content_length(), head.content_length());
            prop_assert_eq!(again.to_control(again.content_length()), written);
        }
    }
}
