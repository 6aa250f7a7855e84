//! Where bodies end, the chunked coding, and the token counts in their tails.

use proptest::prelude::*;
use router_core::http1::{BadHead, BodyReader, ChunkDecoder, Usage};

const NO_LIMIT: u64 = u64::MAX;

/// What a whole chunked body decodes to and where it ends; an error's status.
fn decode(data: &[u8], max_body_bytes: u64) -> Result<(Vec<u8>, Option<usize>), u16> {
    let mut decoded = Vec::new();
    let end = ChunkDecoder::new(max_body_bytes).feed(data, &mut decoded).map_err(|refusal| refusal.status)?;
    Ok((decoded, end))
}

/// Rows of (coded, decoded, bytes left behind the end).
const CHUNKED: &[(&[u8], &[u8], usize)] = &[
    (b"0\r\n\r\n", b"", 0),
    (b"5\r\nhello\r\n0\r\n\r\n", b"hello", 0),
    (b"5\r\nhello\r\n0\r\n\r\nGET /", b"hello", 5),
    (b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world", 0),
    (b"00000005\r\nhello\r\n000\r\n\r\n", b"hello", 0),
    (b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"01234567890123456789", 0),
    (b"5;name=value;b=\"q ; \\\" \"\r\nhello\r\n0;last\r\n\r\n", b"hello", 0),
    (b"5;\r\nhello\r\n0\r\n\r\n", b"hello", 0),
    (b"5;\ta\r\nhello\r\n0\r\n\r\n", b"hello", 0),
    (b"4\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n\r\n", 0),
    (b"0\r\nX-Trailer: a\r\ny:\r\n\r\n", b"", 0),
];

#[test]
fn chunked_bodies() {
    for (coded, decoded, left) in CHUNKED {
        let end = coded.len() - left;
        assert_eq!(decode(coded, NO_LIMIT), Ok((decoded.to_vec(), Some(end))), "{}", coded.escape_ascii());
        assert_eq!(BodyReader::of_chunks().feed(coded), Ok(Some(end)), "{}", coded.escape_ascii());
        for cut in 0..end {
            let mut reader = BodyReader::of_chunks();
            assert_eq!(reader.feed(&coded[..cut]), Ok(None));
            assert!(!reader.done());
            assert_eq!(reader.feed(&coded[cut..]), Ok(Some(end - cut)));
            assert!(reader.done());
            assert_eq!(reader.feed(b"more"), Ok(Some(0)));
        }
    }
}

const HOSTILE: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b" 5\r\nhello\r\n",
    b"5 \r\nhello\r\n",
    b"5\t;a\r\nhello\r\n",
    b"+5\r\nhello\r\n",
    b"-5\r\nhello\r\n",
    b"-0\r\n\r\n",
    b"0x5\r\nhello\r\n",
    b"5h\r\nhello\r\n",
    b"5_0\r\nhello\r\n",
    b"g\r\n",
    b";a\r\n",
    b"\xef\xbc\x95\r\nhello\r\n",
    b"5,5\r\nhello\r\n",
    b"5\nhello\r\n",
    b"5\rhello\r\n",
    b"5\r\rhello\r\n",
    b"5\r\nhello0\r\n\r\n",
    b"5\r\nhello\n0\r\n\r\n",
    b"5\r\nhello\r0\r\n\r\n",
    b"5\r\nhello\rx",
    b"5\r\nhello\r\n\r\n",
    b"5\r\nhello!\r\n0\r\n\r\n",
    b"5\r\nhell\r\n0\r\n\r\n",
    b"5;a\nb\r\nhello\r\n",
    b"5;a\rb\r\nhello\r\n",
    b"5;a\x00\r\nhello\r\n",
    b"5;\x7f\r\nhello\r\n",
    b"5;a=\"\n\"\r\nhello\r\n",
    b"10000000000000000\r\n",
    b"00000000000000005\r\nhello\r\n",
    b"fffffffffffffffff\r\n",
    b"100000000000000005\r\nhello\r\n",
    b"0\r\n\n",
    b"0\n\r\n",
    b"0\r\n\r\r",
    b"0\r\n\rx",
    b"0\r\nX: y\n\r\n",
    b"0\r\nX: y\rz\r\n\r\n",
    b"0\r\nX: y\r\n z\r\n\r\n",
    b"0\r\n X: y\r\n\r\n",
    b"0\r\nX : y\r\n\r\n",
    b"0\r\nX\r\n\r\n",
    b"0\r\n: y\r\n\r\n",
    b"0\r\nX: \x00\r\n\r\n",
    b"0\r\nGET / HTTP/1.1\r\n\r\n",
];

#[test]
fn hostile_chunks() {
    for coded in HOSTILE {
        assert_eq!(decode(coded, NO_LIMIT), Err(400), "{}", coded.escape_ascii());
        assert_eq!(feed_all(BodyReader::of_chunks(), coded.chunks(1)).err(), Some(400), "{}", coded.escape_ascii());
    }
}

fn feed_all<'d>(mut reader: BodyReader, pieces: impl Iterator<Item = &'d [u8]>) -> Result<BodyReader, u16> {
    for piece in pieces {
        reader.feed(piece).map_err(|refusal: BadHead| refusal.status)?;
    }
    Ok(reader)
}

#[test]
fn a_refused_body_stays_refused() {
    let mut reader = BodyReader::of_chunks();
    assert!(reader.feed(b"x").is_err());
    assert!(reader.feed(b"0\r\n\r\n").is_err());
    assert!(!reader.done());
}

#[test]
fn extensions_and_trailers_are_bounded() {
    let extension = [b"1;", &[b'a'; 16 * 1024][..], b"\r\nx\r\n0\r\n\r\n"].concat();
    assert!(decode(&extension, NO_LIMIT).is_ok());
    let longer = [b"1;", &[b'a'; 16 * 1024 + 1][..]].concat();
    assert_eq!(decode(&longer, NO_LIMIT), Err(400));
    assert_eq!(decode("1;aaaaaaaaa\r\nx\r\n".repeat(2000).as_bytes(), NO_LIMIT), Err(400));
    let trailers = ["0\r\n", &"x: yyyyyyyy\r\n".repeat(2000), "\r\n"].concat();
    assert_eq!(decode(trailers.as_bytes(), NO_LIMIT), Err(400));
}

#[test]
fn decoded_size_is_bounded_when_it_is_announced() {
    let rows: &[(&[u8], u64, Result<(), u16>)] = &[
        (b"5\r\nhello\r\n0\r\n\r\n", 5, Ok(())),
        (b"5\r\n", 4, Err(413)),
        (b"5\r\nhello\r\n1\r\n", 5, Err(413)),
        (b"0\r\n\r\n", 0, Ok(())),
        (b"1\r\n", 0, Err(413)),
        (b"ffffffffffffffff\r\n", 5, Err(413)),
        (b"5\r\nhello\r\nffffffffffffffff\r\n", 1 << 40, Err(413)),
    ];
    for (coded, limit, expected) in rows {
        assert_eq!(decode(coded, *limit).map(|_| ()), *expected, "{}", coded.escape_ascii());
    }
}

#[test]
fn bodies_of_a_length() {
    let mut reader = BodyReader::of_length(5);
    assert_eq!(reader.feed(b""), Ok(None));
    assert_eq!(reader.feed(b"hel"), Ok(None));
    assert!(!reader.end_of_file());
    assert_eq!(reader.feed(b"lo, world"), Ok(Some(2)));
    assert!(reader.done() && reader.end_of_file());
    assert_eq!(reader.feed(b"x"), Ok(Some(0)));
    let mut empty = BodyReader::of_length(0);
    assert!(empty.done());
    assert_eq!(empty.feed(b"x"), Ok(Some(0)));
    assert_eq!(BodyReader::of_length(u64::MAX).feed(b"x"), Ok(None));
}

#[test]
fn bodies_until_the_end_of_the_connection() {
    let mut reader = BodyReader::until_eof();
    assert_eq!(reader.feed(b"hello"), Ok(None));
    assert!(!reader.done());
    assert!(reader.end_of_file() && reader.done());
    assert_eq!(reader.feed(b"x"), Ok(Some(0)));
    let mut chunked = BodyReader::of_chunks();
    assert_eq!(chunked.feed(b"5\r\nhel"), Ok(None));
    assert!(!chunked.end_of_file());
}

#[test]
fn an_open_chunk_is_measured() {
    let rows: &[(&[u8], Option<u64>)] = &[
        (b"", Some(0)),
        (b"5", None),
        (b"5;a", None),
        (b"5\r", None),
        (b"5\r\n", Some(7)),
        (b"5\r\nhel", Some(4)),
        (b"5\r\nhello", Some(2)),
        (b"5\r\nhello\r", Some(1)),
        (b"5\r\nhello\r\n", Some(0)),
        (b"5\r\nhello\r\n0", None),
        (b"5\r\nhello\r\n0\r\n", None),
        (b"5\r\nhello\r\n0\r\n\r\n", None),
        (b"ffffffffffffffff\r\n", Some(u64::MAX)),
    ];
    for (data, expected) in rows {
        let mut reader = BodyReader::of_chunks();
        reader.feed(data).unwrap();
        assert_eq!(reader.open_chunk_bytes(), *expected, "{}", data.escape_ascii());
    }
    assert_eq!(BodyReader::of_length(5).open_chunk_bytes(), None);
    assert_eq!(BodyReader::until_eof().open_chunk_bytes(), None);
}

fn usage(prompt_tokens: i64, completion_tokens: i64, cached_tokens: i64) -> Usage {
    let known = |count: i64| u64::try_from(count).ok();
    Usage {
        prompt_tokens: known(prompt_tokens),
        completion_tokens: known(completion_tokens),
        cached_tokens: known(cached_tokens),
    }
}

const USAGE: &[(&str, [i64; 3])] = &[
    ("", [-1, -1, -1]),
    (r#"{"choices":[]}"#, [-1, -1, -1]),
    (
        r#"{"usage":{"prompt_tokens":12,"completion_tokens":3,"total_tokens":15,"prompt_tokens_details":{"cached_tokens":8}}}"#,
        [12, 3, 8],
    ),
    (
        "{\"usage\": {\n  \"prompt_tokens\" : 12,\r\n\t\"completion_tokens\":\t3, \"prompt_tokens_details\": null\n}}",
        [12, 3, -1],
    ),
    (
        r#"{"usage":{"prompt_tokens":12,"completion_tokens":null,"prompt_tokens_details":{"cached_tokens":null}}}"#,
        [12, -1, -1],
    ),
    // SGLang
    (
        r#"{"text":"x","meta_info":{"id":"a","finish_reason":{"type":"length"},"prompt_tokens":7,"completion_tokens":4,"cached_tokens":0,"e2e_latency":0.1}}"#,
        [7, 4, 0],
    ),
    // The last frame counts
    (
        "data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":1}}\n\ndata: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n",
        [7, 2, -1],
    ),
    (
        "data: {\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\ndata: {\"choices\":[],\"usage\":null}\n\ndata: [DONE]\n\n",
        [7, 2, -1],
    ),
    // Text of the model is escaped and cannot pass for a count
    (r#"{"text":"\"prompt_tokens\":99,","usage":{"prompt_tokens":1}}"#, [1, -1, -1]),
    (r#"{"usage":{"prompt_tokens":1},"text":"{\"prompt_tokens\":99,\"cached_tokens\":98}"}"#, [1, -1, -1]),
    // Not whole numbers, other keys, cut off
    (r#"{"prompt_tokens":-1,"completion_tokens":1.5,"cached_tokens":"3"}"#, [-1, -1, -1]),
    (r#"{"prompt_tokens":1e3,"completion_tokens":99999999999999999999,"cached_tokens":true}"#, [-1, -1, -1]),
    (r#"{"max_prompt_tokens":1,"completion_tokens_details":2,"cached_tokens":[3]}"#, [-1, -1, -1]),
    (r#"{"prompt_tokens":12"#, [-1, -1, -1]),
    (r#"{"prompt_tokens":"#, [-1, -1, -1]),
    (r#"{"prompt_tokens"#, [-1, -1, -1]),
];

#[test]
fn usage_is_found_in_every_framing() {
    for (body, [prompt, completion, cached]) in USAGE {
        let expected = usage(*prompt, *completion, *cached);
        let padded = ["p".repeat(3000).as_str(), body].concat();
        for text in [*body, &padded] {
            for piece_size in [1, 7, 200, 5000] {
                let pieces = || text.as_bytes().chunks(piece_size);
                let until_eof = feed_all(BodyReader::until_eof(), pieces()).unwrap();
                assert_eq!(until_eof.usage(), expected, "{text}");
                let of_length = feed_all(BodyReader::of_length(text.len() as u64), pieces()).unwrap();
                assert_eq!(of_length.usage(), expected, "{text}");
                let coded = encode(text.as_bytes(), piece_size);
                let of_chunks = feed_all(BodyReader::of_chunks(), coded.chunks(13)).unwrap();
                assert_eq!(of_chunks.usage(), expected, "{text}");
            }
        }
    }
}

#[test]
fn usage_too_far_from_the_end_is_not_seen() {
    let far = [r#"{"prompt_tokens":12,"#, &"p".repeat(1024)].concat();
    assert_eq!(feed_all(BodyReader::until_eof(), far.as_bytes().chunks(100)).unwrap().usage(), Usage::default());
}

/// The obvious encoder.
fn encode(data: &[u8], chunk_size: usize) -> Vec<u8> {
    let mut coded = Vec::new();
    for chunk in data.chunks(chunk_size) {
        coded.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
        coded.extend_from_slice(chunk);
        coded.extend_from_slice(b"\r\n");
    }
    coded.extend_from_slice(b"0\r\n\r\n");
    coded
}

/// Cuts `data` into pieces of the given sizes, in turn.
fn cut<'d>(mut data: &'d [u8], sizes: &[usize]) -> Vec<&'d [u8]> {
    let mut pieces = Vec::new();
    for size in sizes.iter().cycle() {
        if data.is_empty() {
            break;
        }
        let (piece, rest) = data.split_at((*size).min(data.len()));
        pieces.push(piece);
        data = rest;
    }
    pieces
}

proptest! {
    #[test]
    fn chunks_round_trip_under_any_cuts(
        data in prop::collection::vec(any::<u8>(), 0..2000),
        chunk_size in 1usize..600,
        sizes in prop::collection::vec(1usize..300, 1..8),
        behind in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let coded = encode(&data, chunk_size);
        let stream = [&coded[..], &behind].concat();
        let mut decoder = ChunkDecoder::new(data.len() as u64);
        let mut reader = BodyReader::of_chunks();
        let mut decoded = Vec::new();
        let mut seen = 0;
        for piece in cut(&stream, &sizes) {
            let end = decoder.feed(piece, &mut decoded).unwrap();
            prop_assert_eq!(reader.feed(piece).unwrap(), end);
            if let Some(end) = end {
                seen += end;
                break;
            }
            prop_assert!(!reader.done());
            seen += piece.len();
        }
        prop_assert!(reader.done());
        prop_assert_eq!(seen, coded.len());
        prop_assert_eq!(decoded, data);
    }

    #[test]
    fn any_bytes_are_answered_and_cuts_do_not_matter(
        data in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            prop::collection::vec(prop::sample::select(b"0123af;: \t\r\n\r\n\r\nx".to_vec()), 0..60),
        ],
        sizes in prop::collection::vec(1usize..9, 1..5),
        limit in prop_oneof![Just(NO_LIMIT), 0u64..40],
    ) {
        let whole = decode(&data, limit);
        let mut decoder = ChunkDecoder::new(limit);
        let mut decoded = Vec::new();
        let mut seen = 0;
        let mut parts = Ok(None);
        for piece in cut(&data, &sizes) {
            parts = decoder.feed(piece, &mut decoded).map_err(|refusal| refusal.status);
            match parts {
                Ok(None) => seen += piece.len(),
                _ => break,
            }
        }
        prop_assert_eq!(parts.map(|end| (decoded, end.map(|end| seen + end))), whole);
    }
}
