//! HTTP/1.1 without IO: heads, the end of bodies, the chunked coding.
//!
//! The router stands between strangers and servers of many makes, so whatever two parsers could read differently is
//! refused here, once, for everything behind it (RFC 9112 section 11.2, request smuggling). What passes is either
//! forwarded byte for byte or written anew from what was understood; nothing is repaired.
//!
//! Every answer is a function of the bytes from the start of the message, never of how they were cut into reads.

mod arrivals;
mod body;
mod chunks;
mod fields;
mod request;
mod response;
mod target;
mod usage;

pub use arrivals::Arrivals;
pub use body::BodyReader;
pub use chunks::ChunkDecoder;
pub use request::{JOINED_BODY_BYTES, RequestHead};
pub use response::ResponseHead;
pub use target::Route;
pub use usage::Usage;

/// A head or a framing that must be refused; the connection cannot be used afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadHead {
    /// The status to answer with: 400, 413, 431 or 505 for a client's fault, 502 for a worker's.
    pub status: u16,
    /// What is wrong, in one line. Never text of the peer.
    pub message: &'static str,
}

impl BadHead {
    const fn new(status: u16, message: &'static str) -> Self {
        Self { status, message }
    }
}

/// A configured name that is no header name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadHeaderName(pub String);

/// Parses the heads of both sides. Holds configuration only: a head is parsed from its first byte each time.
#[derive(Debug)]
pub struct HeadParser {
    request_id_headers: Vec<String>,
    max_head_bytes: u32,
}

impl HeadParser {
    /// `request_id_headers`: where a client may name its request, the first that it sent wins.
    pub fn new(request_id_headers: Vec<String>, max_head_bytes: u32) -> Result<Self, BadHeaderName> {
        match request_id_headers.iter().find(|name| !fields::is_token(name.as_bytes())) {
            Some(name) => Err(BadHeaderName(name.clone())),
            None => Ok(Self { request_id_headers, max_head_bytes }),
        }
    }

    /// The head of a client's request at the start of `data`; None: more bytes are needed.
    pub fn request(&self, data: &[u8]) -> Result<Option<RequestHead>, BadHead> {
        request::parse(data, self.max_head_bytes as usize, &self.request_id_headers)
    }

    /// The head of a worker's response. `head_request`: it answers a HEAD, so it has no body whatever it says.
    pub fn response(&self, data: &[u8], head_request: bool) -> Result<Option<ResponseHead>, BadHead> {
        response::parse(data, self.max_head_bytes as usize, head_request)
    }
}
