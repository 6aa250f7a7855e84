//! Request heads that must be refused, and near misses that must not: one row each.

use router_core::http1::{HeadParser, RequestHead};

const MAX_HEAD_BYTES: u32 = 8192;

fn parser() -> HeadParser {
    HeadParser::new(vec!["x-request-id".into()], MAX_HEAD_BYTES).unwrap()
}

/// The refusal's status; 0 for a head that is taken, -1 for one that is not complete.
fn status_of(head: &[u8]) -> i32 {
    match parser().request(head) {
        Ok(Some(_)) => 0,
        Ok(None) => -1,
        Err(refusal) => {
            assert!(!refusal.message.is_empty());
            i32::from(refusal.status)
        }
    }
}

/// Rows of (expected status, what stands behind `POST /generate HTTP/1.1\r\nHost: h\r\n`, without the empty line).
const FIELDS: &[(i32, &[u8])] = &[
    // Two lengths (RFC 9112 6.1, 6.3; CL.TE, TE.CL)
    (400, b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"),
    (400, b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"),
    (400, b"transfer-encoding: CHUNKED\r\ncontent-length: 0\r\n"),
    (400, b"Content-Length: 5\r\nContent-Length: 6\r\n"),
    (400, b"Content-Length: 5\r\nContent-Length: 5\r\n"),
    (400, b"Content-Length: 5\r\ncontent-length: 6\r\n"),
    (400, b"Content-Length: 5\r\nX: y\r\nCONTENT-LENGTH: 0\r\n"),
    // Content-Length that is not 1*DIGIT
    (400, b"Content-Length: 5, 5\r\n"),
    (400, b"Content-Length: 5,6\r\n"),
    (400, b"Content-Length: +5\r\n"),
    (400, b"Content-Length: -5\r\n"),
    (400, b"Content-Length: -0\r\n"),
    (400, b"Content-Length: 5 5\r\n"),
    (400, b"Content-Length: 5\t5\r\n"),
    (400, b"Content-Length:\r\n"),
    (400, b"Content-Length:  \t \r\n"),
    (400, b"Content-Length: 0x5\r\n"),
    (400, b"Content-Length: 5e1\r\n"),
    (400, b"Content-Length: 5.0\r\n"),
    (400, b"Content-Length: 1_000\r\n"),
    (400, b"Content-Length: \"5\"\r\n"),
    (400, b"Content-Length: 5;\r\n"),
    (400, b"Content-Length: five\r\n"),
    (400, b"Content-Length: 5a\r\n"),
    (400, b"Content-Length: \xd9\xa5\r\n"),
    (400, b"Content-Length: \xef\xbc\x95\r\n"),
    (400, b"Content-Length: 9223372036854775808\r\n"),
    (400, b"Content-Length: 18446744073709551615\r\n"),
    (400, b"Content-Length: 18446744073709551616\r\n"),
    (400, b"Content-Length: 18446744073709551621\r\n"),
    (400, b"Content-Length: 99999999999999999999999999999999999999\r\n"),
    // Transfer-Encoding that is not exactly chunked (TE.TE and its disguises)
    (400, b"Transfer-Encoding: identity\r\n"),
    (400, b"Transfer-Encoding: gzip\r\n"),
    (400, b"Transfer-Encoding: gzip, chunked\r\n"),
    (400, b"Transfer-Encoding: chunked, gzip\r\n"),
    (400, b"Transfer-Encoding: chunked, identity\r\n"),
    (400, b"Transfer-Encoding: chunked, chunked\r\n"),
    (400, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"),
    (400, b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n"),
    (400, b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n"),
    (400, b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n"),
    (400, b"Transfer-Encoding: xchunked\r\n"),
    (400, b"Transfer-Encoding: chunkedx\r\n"),
    (400, b"Transfer-Encoding: chunke\r\n"),
    (400, b"Transfer-Encoding: chunked;q=1\r\n"),
    (400, b"Transfer-Encoding: \"chunked\"\r\n"),
    (400, b"Transfer-Encoding: 'chunked'\r\n"),
    (400, b"Transfer-Encoding: ,chunked\r\n"),
    (400, b"Transfer-Encoding: chunked,\r\n"),
    (400, b"Transfer-Encoding: chu nked\r\n"),
    (400, b"Transfer-Encoding: \x0bchunked\r\n"),
    (400, b"Transfer-Encoding: \x0cchunked\r\n"),
    (400, b"Transfer-Encoding: chunked\x00\r\n"),
    (400, b"Transfer-Encoding: \xa0chunked\r\n"),
    (400, b"Transfer-Encoding: chunked\x85\r\n"),
    (400, b"Transfer-Encoding:\r\n"),
    (400, b"Transfer-Encoding: cow\r\n"),
    // Names: spaces, controls, nothing, other scripts
    (400, b"Transfer-Encoding : chunked\r\n"),
    (400, b"Transfer-Encoding\t: chunked\r\n"),
    (400, b"Content-Length : 5\r\n"),
    (400, b" Transfer-Encoding: chunked\r\n"),
    (400, b"\tContent-Length: 5\r\n"),
    (400, b"Transfer Encoding: chunked\r\n"),
    (400, b"Transfer-Encoding\r\n : chunked\r\n"),
    (400, b"\x00Transfer-Encoding: chunked\r\n"),
    (400, b"Transfer-\x00Encoding: chunked\r\n"),
    (400, b"Transfer-Encoding\x00: chunked\r\n"),
    (400, b"\x0bTransfer-Encoding: chunked\r\n"),
    (400, b"Content-Length\x0b: 5\r\n"),
    (400, b"Content\x7fLength: 5\r\n"),
    (400, b": value\r\n"),
    (400, b"NoColon\r\n"),
    (400, b"NoColon\r\nX: y\r\n"),
    (400, b"X(Y): z\r\n"),
    (400, b"X\"Y\": z\r\n"),
    (400, b"X,Y: z\r\n"),
    (400, b"X/Y: z\r\n"),
    (400, b"X@Y: z\r\n"),
    (400, b"X[Y]: z\r\n"),
    (400, b"X{Y}: z\r\n"),
    (400, b"X=Y: z\r\n"),
    (400, b"X;Y: z\r\n"),
    (400, b"X\\Y: z\r\n"),
    (400, b"\xc3\xa4: z\r\n"),
    (400, b"Content-Length\xe2\x80\x8b: 5\r\n"),
    (400, b"\xef\xbb\xbfContent-Length: 5\r\n"),
    // Values: NUL and other controls, bare CR and LF, folding
    (400, b"X: a\x00b\r\n"),
    (400, b"X: a\x01b\r\n"),
    (400, b"X: a\x08b\r\n"),
    (400, b"X: a\x0bb\r\n"),
    (400, b"X: a\x1bb\r\n"),
    (400, b"X: a\x7fb\r\n"),
    (400, b"X: a\rb\r\n"),
    (400, b"X: a\r\r\n"),
    (400, b"X: a\rContent-Length: 5\r\n"),
    (400, b"X: a\n"),
    (400, b"X: a\nContent-Length: 5\r\n"),
    (400, b"X: a\nTransfer-Encoding: chunked\r\n"),
    (400, b"X: a\n\n"),
    (400, b"X:\n"),
    (400, b"X:\r\r\n"),
    (400, b"X: a\r\n b\r\n"),
    (400, b"X: a\r\n\tb\r\n"),
    (400, b"X:\r\n a\r\n"),
    (400, b"X: a\r\n \r\n"),
    (400, b"Transfer-Encoding:\r\n chunked\r\n"),
    (400, b"Transfer-Encoding: chunked\r\n , identity\r\n"),
    (400, b"Content-Length: 5\r\n 6\r\n"),
    // Host
    (400, b"Host: h\r\n"),
    (400, b"Host: other\r\n"),
    (400, b"HOST: other\r\n"),
    (400, b"Host:\r\n"),
    // Upgrade, credentials, Connection without end
    (400, b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
    (400, b"Upgrade: websocket\r\n"),
    (400, b"Upgrade: h2c, websocket\r\n"),
    (400, b"Connection: upgrade\r\nUpgrade: TLS/1.0\r\n"),
    (400, b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"),
    (400, b"Authorization: Bearer a\r\nauthorization: Bearer a\r\n"),
    (400, b"Connection: a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q,r,s\r\n"),
    // Near misses: legal, or harmless since they are not passed on
    (0, b""),
    (0, b"Content-Length: 0\r\n"),
    (0, b"Content-Length: 5\r\n"),
    (0, b"Content-Length:5\r\n"),
    (0, b"Content-Length: \t 5 \t \r\n"),
    (0, b"CONTENT-LENGTH: 005\r\n"),
    (0, b"Content-Length: 9223372036854775807\r\n"),
    (0, b"Transfer-Encoding: chunked\r\n"),
    (0, b"TRANSFER-ENCODING:\tChunked \r\n"),
    (0, b"Transfer_Encoding: chunked\r\nContent-Length: 5\r\n"),
    (0, b"Content_Length: 6\r\nContent-Length: 5\r\n"),
    (0, b"Content-Lengt: 6\r\nContent-Length: 5\r\n"),
    (0, b"X: a\tb\r\n"),
    (0, b"X: \xc3\xa4\xff\r\n"),
    (0, b"X:\r\nY: \r\n"),
    (0, b"X: a: b\r\n"),
    (0, b"!#$%&'*+-.^_`|~09azAZ: x\r\n"),
    (0, b"TE: trailers, chunked\r\n"),
    (0, b"Trailer: Content-Length\r\n"),
    (0, b"Expect: 200-ok\r\n"),
    (0, b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"),
    (0, b"Connection: content-length, transfer-encoding, host\r\nContent-Length: 5\r\n"),
    (0, b"Connection: ,,\r\n"),
    (0, b"Connection:\r\n"),
];

#[test]
fn fields() {
    for (expected, fields) in FIELDS {
        let head = [b"POST /generate HTTP/1.1\r\nHost: h\r\n", *fields, b"\r\n"].concat();
        assert_eq!(status_of(&head), *expected, "{}", head.escape_ascii());
    }
}

/// Rows of (expected status, whole input).
const HEADS: &[(i32, &[u8])] = &[
    // Request line
    (400, b"GET  / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /  HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET\t/ HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /\tHTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET / HTTP/1.1 \r\nHost: h\r\n\r\n"),
    (400, b" GET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET / HTTP/1.1\nHost: h\n\n"),
    (400, b"GET / HTTP/1.1\nHost: h\r\n\r\n"),
    (400, b"GET / HTTP/1.1\rHost: h\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: h\r\n\n"),
    (400, b"GET / HTTP/1.1\r\nHost: h\n\r\n"),
    (400, b"GET /\r\nHost: h\r\n\r\n"),
    (400, b"GET / \r\nHost: h\r\n\r\n"),
    (400, b"GET\r\n\r\n"),
    (400, b"/ HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"G\x00T / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"G(T) / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET: / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\xc3\xa4 / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\"GET\" / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /\x00 HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /\x7f HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /\xc3\xa4 HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /a#b HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET /generate HTTP/1.1 HTTP/1.1\r\nHost: h\r\n\r\n"),
    // Versions
    (505, b"GET / HTTP/2.0\r\nHost: h\r\n\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (505, b"GET / HTTP/1.2\r\nHost: h\r\n\r\n"),
    (505, b"GET / HTTP/0.9\r\nHost: h\r\n\r\n"),
    (505, b"GET / HTTP/3.0\r\nHost: h\r\n\r\n"),
    (505, b"GET / HTTP/9.9\r\n"),
    (400, b"GET / http/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET / HTTP/1.10\r\nHost: h\r\n\r\n"),
    (505, b"GET / HTTP/1,1\r\nHost: h\r\n\r\n"),
    (400, b"GET / HTTP/ 1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET / HTTPS/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET / ICY/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET / XTTP/1.1\r\nHost: h\r\n\r\n"),
    // Targets
    (400, b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"CONNECT / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET * HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"POST * HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"OPTIONS ** HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET generate HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET h:80 HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET ?a=b HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET http:///generate HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET http:/generate HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET http://user:pw@h/ HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET http://h\\@evil/ HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET http://h?a=b HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET ftp://h/ HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET file:///etc/passwd HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"GET http://h/a#b HTTP/1.1\r\nHost: h\r\n\r\n"),
    (0, b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n"),
    (0, b"GET http://h HTTP/1.1\r\nHost: h\r\n\r\n"),
    (0, b"GET HTTP://h:80/a?b HTTP/1.1\r\nHost: h\r\n\r\n"),
    (0, b"GET https://[::1]:80/a HTTP/1.1\r\nHost: h\r\n\r\n"),
    (0, b"GET //a/../b?%00 HTTP/1.1\r\nHost: h\r\n\r\n"),
    // Host
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nX-Host: h\r\n\r\n"),
    (400, b"GET http://h/ HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\\b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a?b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a#b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\tb\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: <script>\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: \xc3\xa4\r\n\r\n"),
    (400, b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n"),
    (0, b"GET / HTTP/1.1\r\nHost: \r\n\r\n"),
    (0, b"GET / HTTP/1.1\r\nhOST:h:80\r\n\r\n"),
    (0, b"GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]:8000\r\n\r\n"),
    (0, b"GET / HTTP/1.0\r\n\r\n"),
    // HTTP/1.0 knows no transfer coding
    (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (400, b"POST / HTTP/1.0\r\nHost: h\r\nTransfer-Encoding: identity\r\n\r\n"),
    // Empty lines before the request line
    (0, b"\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (0, b"\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\r\n\r\n\r\n\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\rGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\r\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\r\n\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    (400, b"\r\n GET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    // Other protocols are refused at once, not waited for
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    (400, b"\x00"),
    (400, b"\x05\x01\x00"),
    (400, b"{\"model\": \"m\"}"),
    (400, b"\r\n\r\n\r\n\r\n\r\n"),
    // Incomplete
    (-1, b""),
    (-1, b"\r"),
    (-1, b"\r\n"),
    (-1, b"P"),
    (-1, b"POST /generate HTTP/1."),
    (-1, b"POST /generate HTTP/1.1\r\nHost: h\r\n"),
    (-1, b"POST /generate HTTP/1.1\r\nHost: h\r\n\r"),
];

#[test]
fn heads() {
    for (expected, head) in HEADS {
        assert_eq!(status_of(head), *expected, "{}", head.escape_ascii());
    }
}

#[test]
fn there_are_enough_rows() {
    let refused = FIELDS.iter().chain(HEADS).filter(|(status, _)| *status > 0).count();
    assert!(refused >= 150, "{refused}");
}

/// Wherever a hostile head is cut into two reads, it meets the same end.
#[test]
fn a_refusal_does_not_depend_on_the_reads() {
    let whole_fields =
        FIELDS.iter().map(|(_, fields)| [b"POST /generate HTTP/1.1\r\nHost: h\r\n", *fields, b"\r\n"].concat());
    for head in HEADS.iter().map(|(_, head)| head.to_vec()).chain(whole_fields) {
        let whole = status_of(&head);
        for cut in 0..head.len() {
            let part = status_of(&head[..cut]);
            assert!(part == -1 || part == whole, "{part} != {whole} at {cut} of {}", head.escape_ascii());
        }
    }
}

fn head_of_size(size: usize) -> Vec<u8> {
    let mut head = b"GET / HTTP/1.1\r\nHost: h\r\nX: ".to_vec();
    head.resize(size - 4, b'a');
    head.extend_from_slice(b"\r\n\r\n");
    head
}

#[test]
fn size_is_bounded() {
    let limit = MAX_HEAD_BYTES as usize;
    assert_eq!(status_of(&head_of_size(limit)), 0);
    assert_eq!(status_of(&head_of_size(limit + 1)), 431);
    assert_eq!(status_of(&head_of_size(2 * limit)), 431);
    assert_eq!(status_of(&head_of_size(2 * limit)[..limit - 1]), -1);
    assert_eq!(status_of(&head_of_size(2 * limit)[..limit]), 431);
    // What follows the head is not counted.
    assert_eq!(status_of(&[head_of_size(limit), vec![b'b'; 3 * limit]].concat()), 0);
    // Too long a line of each kind.
    assert_eq!(status_of(&vec![b'G'; limit]), 431);
    assert_eq!(status_of(&[b"GET /".to_vec(), vec![b'a'; limit]].concat()), 431);
    assert_eq!(status_of(&[b"GET / HTTP/1.1\r\n".to_vec(), vec![b'a'; limit]].concat()), 431);
}

#[test]
fn the_number_of_fields_is_bounded() {
    let head = |count: usize| ["GET / HTTP/1.1\r\nHost: h\r\n", &"X: y\r\n".repeat(count - 1), "\r\n"].concat();
    assert_eq!(status_of(head(100).as_bytes()), 0);
    assert_eq!(status_of(head(101).as_bytes()), 431);
}

/// Nothing that was refused or dropped comes back in the heads that are written.
#[test]
fn accepted_rows_carry_no_framing_of_the_client() {
    for (_, fields) in FIELDS.iter().filter(|(status, _)| *status == 0) {
        let head = [b"POST /generate HTTP/1.1\r\nHost: h\r\n", *fields, b"\r\n"].concat();
        let request: RequestHead = parser().request(&head).unwrap().unwrap();
        for written in [request.to_worker(b"w", None, b"id", Some(7), Some(1)), request.to_control(Some(7))] {
            let again = parser().request(&written).unwrap().unwrap();
            assert_eq!((again.content_length(), again.chunked()), (Some(7), false), "{}", written.escape_ascii());
            assert_eq!(again.size(), written.len());
        }
    }
}
