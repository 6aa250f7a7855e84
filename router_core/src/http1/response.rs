//! The head of a worker's response, and the head that the client gets for it.

use std::mem::MaybeUninit;

use httparse::{Header, Status};

use super::BadHead;
use super::fields::{self, Field, FieldName, Fields, MAX_FIELDS, Span};

/// A worker's head. Owns a copy of its bytes; all else is ranges of it.
#[derive(Debug)]
pub struct ResponseHead {
    head: Box<[u8]>,
    status: u16,
    /// `200 OK`, or `200` from a worker that gives no reason.
    status_and_reason: Span,
    content_length: Option<u64>,
    content_length_line: Option<Span>,
    chunked: bool,
    keep_alive: bool,
    end_to_end: Vec<Field>,
}

impl ResponseHead {
    /// The status code, 100 to 999.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Bytes of the head, the empty line included.
    pub fn size(&self) -> usize {
        self.head.len()
    }

    /// Bytes of the body: 0 where there cannot be one (1xx, 204, 304, an answer to HEAD), None where its end is not known
    /// from here: chunks, or the end of the connection.
    pub fn content_length(&self) -> Option<u64> {
        self.content_length
    }

    /// Whether the body is in the chunked coding.
    pub fn chunked(&self) -> bool {
        self.chunked
    }

    /// Whether the worker's connection can be used again after this response.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// `x-prompt-tokens`; None when absent or not a number.
    pub fn prompt_tokens(&self) -> Option<u64> {
        self.number(FieldName::PromptTokens)
    }

    /// `x-cached-tokens`; None when absent or not a number.
    pub fn cached_tokens(&self) -> Option<u64> {
        self.number(FieldName::CachedTokens)
    }

    /// `retry-after`; None when absent or a date (there is no clock here).
    pub fn retry_after_seconds(&self) -> Option<u64> {
        self.number(FieldName::RetryAfter)
    }

    /// The head for the client: the worker's status line and end-to-end fields, framing, then the lines in `extra`.
    pub fn to_client(&self, extra: &[u8], keep_alive: bool, chunked: bool) -> Vec<u8> {
        let mut head = Vec::with_capacity(self.head.len() + extra.len() + 64);
        self.begin_to_client(&mut head, keep_alive, chunked);
        head.extend_from_slice(extra);
        head.extend_from_slice(b"\r\n");
        head
    }

    /// The same behind what `answer` holds, with the name of the request as the only line of the router's own, and `body`.
    pub fn write_to_client(&self, answer: &mut Vec<u8>, request_id: &[u8], keep_alive: bool, body: &[u8]) {
        answer.reserve(self.head.len() + request_id.len() + body.len() + 96);
        self.begin_to_client(answer, keep_alive, self.chunked);
        answer.extend_from_slice(b"x-request-id: ");
        answer.extend_from_slice(request_id);
        answer.extend_from_slice(b"\r\n\r\n");
        answer.extend_from_slice(body);
    }

    /// All but the router's own lines.
    fn begin_to_client(&self, head: &mut Vec<u8>, keep_alive: bool, chunked: bool) {
        head.extend_from_slice(b"HTTP/1.1 ");
        let status_and_reason = self.status_and_reason.from(&self.head);
        head.extend_from_slice(status_and_reason);
        // The space behind the status must stand even when no reason follows it (RFC 9112 section 4).
        head.extend_from_slice(if status_and_reason.len() == 3 { b" \r\n" } else { b"\r\n" });
        for field in &self.end_to_end {
            head.extend_from_slice(field.line(&self.head));
            head.extend_from_slice(b"\r\n");
        }
        if chunked {
            head.extend_from_slice(b"transfer-encoding: chunked\r\n");
        } else if let Some(line) = self.content_length_line {
            head.extend_from_slice(line.from(&self.head));
            head.extend_from_slice(b"\r\n");
        }
        if !keep_alive {
            head.extend_from_slice(b"connection: close\r\n");
        }
    }

    fn number(&self, name: FieldName) -> Option<u64> {
        let field = self.end_to_end.iter().find(|field| field.meaning == name)?;
        fields::digits(field.value.from(&self.head))
    }
}

pub(super) fn parse(data: &[u8], max_head_bytes: usize, head_request: bool) -> Result<Option<ResponseHead>, BadHead> {
    let refuse = |message| BadHead::new(502, message);
    let window = &data[..data.len().min(max_head_bytes)];
    // httparse skips empty lines, which no server may send here.
    if matches!(window, [b'\r' | b'\n', ..]) {
        return Err(refuse("the worker's answer is not HTTP"));
    }
    let mut headers = [const { MaybeUninit::<Header<'_>>::uninit() }; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut []);
    let parsed =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, window, &mut headers);
    let size = match parsed {
        Ok(Status::Complete(size)) => size,
        Ok(Status::Partial) if data.len() < max_head_bytes => return Ok(None),
        Ok(Status::Partial) => return Err(refuse("the worker's head is too large")),
        Err(_) => return Err(refuse("the worker's answer is not HTTP")),
    };
    let head = &window[..size];
    if !fields::all_lines_end_with_crlf(head, response.headers.len() + 2) {
        return Err(refuse("a line of the worker's head ends without CRLF"));
    }
    let (Some(version), Some(status @ 100..)) = (response.version, response.code) else {
        return Err(refuse("the worker's status is not one of HTTP"));
    };
    if status == 101 {
        return Err(refuse("the worker changes the protocol unasked"));
    }
    let Fields { mut end_to_end, content_length, content_length_line, chunked, close, keep_alive, .. } =
        fields::read(head, response.headers).map_err(refuse)?;
    if version == 0 && chunked {
        return Err(refuse("the worker sends transfer-encoding in HTTP/1.0"));
    }
    // The router answers with its own id, which it also sent to the worker.
    end_to_end.retain(|field| field.meaning != FieldName::RequestId);
    let says_no_length = status < 200 || status == 204;
    let has_no_body = says_no_length || status == 304 || head_request;
    Ok(Some(ResponseHead {
        status,
        status_and_reason: Span::of(head, first_line(head).get(STATUS_AT..).unwrap_or_default()),
        content_length: if has_no_body { Some(0) } else { content_length },
        content_length_line: content_length_line.filter(|_| !says_no_length),
        chunked: chunked && !has_no_body,
        keep_alive: !close && (version == 1 || keep_alive) && (has_no_body || chunked || content_length.is_some()),
        end_to_end,
        head: head.into(),
    }))
}

/// Where the status stands in a status line: behind `HTTP/1.1 `.
const STATUS_AT: usize = 9;

fn first_line(head: &[u8]) -> &[u8] {
    head.split(|&byte| byte == b'\r').next().unwrap_or_default()
}
