//! The head of a request: what the client wants, and the heads that go on to a worker or to the control app.

use std::io::Write;
use std::mem::MaybeUninit;

use httparse::{Error, Header, Status};

use super::BadHead;
use super::fields::{self, Field, FieldName, Fields, MAX_FIELDS, Span};
use super::target::{self, Route};

/// Empty lines tolerated before a request line: RFC 9112 section 2.2 asks for one, old clients send one after a POST.
const MAX_LEADING_EMPTY_LINES: usize = 4;

/// Up to this length a body is sent in one piece with its head: one copy is cheaper than one more buffer in the kernel's list.
pub const JOINED_BODY_BYTES: usize = 16 * 1024;

/// Longest request id taken from a client; uuids are 36, W3C trace ids 55 bytes.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// A request's head. Owns a copy of the head's bytes, so that the read buffer is free; all else is ranges of it.
#[derive(Debug)]
pub struct RequestHead {
    head: Box<[u8]>,
    size: usize,
    method: Span,
    /// Path and query, also of an absolute-form target.
    target: Span,
    path: Span,
    route: Route,
    http_1_0: bool,
    /// Of the target when that is absolute, else of the `Host` field.
    host: Option<Span>,
    authorization: Option<Span>,
    request_id: Option<Span>,
    content_length: Option<u64>,
    chunked: bool,
    keep_alive: bool,
    expect_continue: bool,
    end_to_end: Vec<Field>,
}

impl RequestHead {
    /// The method's token.
    pub fn method(&self) -> &str {
        std::str::from_utf8(self.method.from(&self.head)).unwrap_or_default()
    }

    /// The target's path, without the query.
    pub fn path(&self) -> &[u8] {
        self.path.from(&self.head)
    }

    /// What is asked for.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Bytes of the head in the stream, empty lines before and after it included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The body, in the bytes that begin with this head. Of a chunked body the coding has been taken off, and nothing follows it.
    /// Empty if it is not all there.
    pub fn body_in<'d>(&self, data: &'d [u8]) -> &'d [u8] {
        let length = self.content_length.map_or(Some(0), |length| usize::try_from(length).ok());
        let end = if self.chunked { Some(data.len()) } else { length.and_then(|length| self.size.checked_add(length)) };
        end.and_then(|end| data.get(self.size..end)).unwrap_or_default()
    }

    /// None when none was given. Never together with `chunked`.
    pub fn content_length(&self) -> Option<u64> {
        self.content_length
    }

    /// Whether the body is in the chunked coding.
    pub fn chunked(&self) -> bool {
        self.chunked
    }

    /// Whether the client wants to use the connection again.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// Whether the client speaks HTTP/1.0, which knows no chunks.
    pub fn http_1_0(&self) -> bool {
        self.http_1_0
    }

    /// Whether the client waits for `100 Continue` before it sends the body.
    pub fn expect_continue(&self) -> bool {
        self.expect_continue
    }

    /// The first of the configured headers that the client sent with a usable value (visible ASCII, at most 128 bytes).
    pub fn request_id(&self) -> Option<&[u8]> {
        self.request_id.map(|span| span.from(&self.head))
    }

    /// The client's credentials.
    pub fn authorization(&self) -> Option<&[u8]> {
        self.authorization.map(|span| span.from(&self.head))
    }

    /// The lines that policies read, with lower-case names; empty as a rule.
    pub fn routing_headers(&self) -> Vec<u8> {
        let mut lines = Vec::new();
        for field in &self.end_to_end {
            if matches!(field.meaning, FieldName::RoutingKey | FieldName::TargetWorker | FieldName::DataParallelRank) {
                lines.extend(field.name.from(&self.head).iter().map(u8::to_ascii_lowercase));
                lines.extend_from_slice(b": ");
                lines.extend_from_slice(field.value.from(&self.head));
                lines.extend_from_slice(b"\r\n");
            }
        }
        lines
    }

    /// The head for a worker, which is told only what it needs. `authorization`: None passes the client's on, an empty one
    /// drops it, another replaces it. `rank`: the dp rank that was chosen, in place of what the client says of one. The arguments
    /// are trusted to hold no line ends.
    pub fn to_worker(
        &self,
        host: &[u8],
        authorization: Option<&[u8]>,
        request_id: &[u8],
        content_length: Option<u64>,
        rank: Option<u16>,
    ) -> Vec<u8> {
        let mut head = Vec::new();
        self.write_to_worker(&mut head, host, authorization, request_id, content_length, rank);
        head
    }

    /// The same behind what `head` holds.
    pub fn write_to_worker(
        &self,
        head: &mut Vec<u8>,
        host: &[u8],
        authorization: Option<&[u8]>,
        request_id: &[u8],
        content_length: Option<u64>,
        rank: Option<u16>,
    ) {
        let credentials = authorization.or_else(|| self.authorization()).unwrap_or_default();
        // The client's own head bounds what is copied from it; 128 covers the names and the number written here.
        head.reserve(self.head.len() + host.len() + credentials.len() + request_id.len() + 128);
        self.write_request_line(head);
        write_line(head, b"host: ", host);
        write_content_length(head, content_length);
        write_line(head, b"x-request-id: ", request_id);
        if !credentials.is_empty() {
            write_line(head, b"authorization: ", credentials);
        }
        if let Some(rank) = rank {
            write_line(head, b"x-data-parallel-rank: ", rank.to_string().as_bytes());
        }
        for field in &self.end_to_end {
            if goes_to_worker(field.meaning) && !(rank.is_some() && field.meaning == FieldName::DataParallelRank) {
                write_line(head, b"", field.line(&self.head));
            }
        }
        head.extend_from_slice(b"\r\n");
    }

    /// The head for the control app: everything end-to-end. `Expect` has been answered here.
    pub fn to_control(&self, content_length: Option<u64>) -> Vec<u8> {
        let mut head = Vec::with_capacity(self.head.len() + 128);
        self.write_request_line(&mut head);
        write_line(&mut head, b"host: ", self.host.map(|span| span.from(&self.head)).unwrap_or_default());
        write_content_length(&mut head, content_length);
        for field in &self.end_to_end {
            write_line(&mut head, b"", field.line(&self.head));
        }
        head.extend_from_slice(b"\r\n");
        head
    }

    fn write_request_line(&self, head: &mut Vec<u8>) {
        head.extend_from_slice(self.method.from(&self.head));
        head.push(b' ');
        head.extend_from_slice(self.target.from(&self.head));
        head.extend_from_slice(b" HTTP/1.1\r\n");
    }
}

fn goes_to_worker(name: FieldName) -> bool {
    matches!(
        name,
        FieldName::Accept
            | FieldName::ContentType
            | FieldName::CorrelationId
            | FieldName::DataParallelRank
            | FieldName::RoutingKey
            | FieldName::TargetWorker
            | FieldName::TraceParent
            | FieldName::TraceState
            | FieldName::UserAgent
    )
}

fn write_line(head: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    head.extend_from_slice(name);
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}

fn write_content_length(head: &mut Vec<u8>, content_length: Option<u64>) {
    if let Some(length) = content_length {
        // Writing to memory cannot fail; a string in between would be one more allocation.
        let _ = write!(head, "content-length: {length}\r\n");
    }
}

pub(super) fn parse(
    data: &[u8],
    max_head_bytes: usize,
    request_id_headers: &[String],
) -> Result<Option<RequestHead>, BadHead> {
    let refuse = |message| BadHead::new(400, message);
    // Nothing behind the limit is looked at, or the answer would depend on how much had arrived.
    let window = &data[..data.len().min(max_head_bytes)];
    let incomplete = || match data.len() < max_head_bytes {
        true => Ok(None),
        false => Err(BadHead::new(431, "the head is too large")),
    };
    let skipped = leading_empty_lines(window);
    let head = &window[skipped..];
    match head {
        [] | [b'\r'] => return incomplete(),
        [b'\r' | b'\n', ..] => return Err(refuse("empty lines before the request line")),
        _ => {}
    }
    let mut headers = [const { MaybeUninit::<Header<'_>>::uninit() }; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut []);
    let end = match request.parse_with_uninit_headers(head, &mut headers) {
        Ok(Status::Complete(end)) => end,
        Ok(Status::Partial) => return incomplete(),
        Err(error) => return Err(refusal(error, head)),
    };
    let head = &head[..end];
    if !fields::all_lines_end_with_crlf(head, request.headers.len() + 2) {
        return Err(refuse("a line ends without CRLF"));
    }
    let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
        return Err(refuse("malformed request line"));
    };
    let http_1_0 = version == 0;
    let Fields { end_to_end, content_length, chunked, close, keep_alive, host, expect_continue, upgrade, .. } =
        fields::read(head, request.headers).map_err(refuse)?;
    if http_1_0 && chunked {
        return Err(refuse("transfer-encoding in HTTP/1.0"));
    }
    if !http_1_0 && host.is_none() {
        return Err(refuse("no host"));
    }
    if upgrade {
        return Err(refuse("upgrade is not supported"));
    }
    let (authority, target) = target::split(method, target.as_bytes()).map_err(refuse)?;
    let path = target.split(|&byte| byte == b'?').next().unwrap_or_default();
    let authorization = only_authorization(&end_to_end).map_err(refuse)?;
    let request_id = request_id(head, &end_to_end, request_id_headers);
    Ok(Some(RequestHead {
        size: skipped + end,
        method: Span::of(head, method.as_bytes()),
        target: Span::of(head, target),
        path: Span::of(head, path),
        route: Route::of(method.as_bytes(), path),
        http_1_0,
        host: authority.map(|authority| Span::of(head, authority)).or(host),
        authorization,
        request_id,
        content_length,
        chunked,
        keep_alive: !close && (!http_1_0 || keep_alive),
        expect_continue: expect_continue && !http_1_0,
        end_to_end,
        head: head.into(),
    }))
}

/// Bytes of the tolerated empty lines at the start of `data`.
fn leading_empty_lines(data: &[u8]) -> usize {
    let lines = data.chunks_exact(2).take(MAX_LEADING_EMPTY_LINES).take_while(|line| line == b"\r\n");
    2 * lines.count()
}

/// Two credentials would let the edge check one and the server behind it the other.
fn only_authorization(end_to_end: &[Field]) -> Result<Option<Span>, &'static str> {
    let mut all = end_to_end.iter().filter(|field| field.meaning == FieldName::Authorization);
    match (all.next(), all.next()) {
        (first, None) => Ok(first.map(|field| field.value)),
        _ => Err("more than one authorization"),
    }
}

fn request_id(head: &[u8], end_to_end: &[Field], names: &[String]) -> Option<Span> {
    let usable =
        |value: &[u8]| (1..=MAX_REQUEST_ID_BYTES).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic);
    names.iter().find_map(|name| {
        end_to_end
            .iter()
            .find(|field| field.name.from(head).eq_ignore_ascii_case(name.as_bytes()) && usable(field.value.from(head)))
            .map(|field| field.value)
    })
}

fn refusal(error: Error, head: &[u8]) -> BadHead {
    match error {
        Error::Version if names_http_version(head) => BadHead::new(505, "only HTTP/1.0 and HTTP/1.1 are spoken here"),
        Error::TooManyHeaders => BadHead::new(431, "too many header fields"),
        Error::HeaderName => BadHead::new(400, "malformed header name"),
        Error::HeaderValue => BadHead::new(400, "malformed header value"),
        Error::NewLine => BadHead::new(400, "malformed line end"),
        Error::Token | Error::Version | Error::Status => BadHead::new(400, "malformed request line"),
    }
}

/// Whether the request line's third word is some version of HTTP, rather than garbage.
fn names_http_version(head: &[u8]) -> bool {
    let word = head.splitn(3, |&byte| byte == b' ').nth(2).unwrap_or_default();
    word.starts_with(b"HTTP/") && word.get(5).is_some_and(u8::is_ascii_digit)
}
