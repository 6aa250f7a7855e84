//! Header fields: which name means what, which of them travel on, and what they say about the framing.

use httparse::Header;

/// Header lines a head may have: the default of hyper and of Apache (`LimitRequestFields`).
pub(super) const MAX_FIELDS: usize = 100;

/// Names that `Connection` may declare hop-by-hop. Each is compared with each field, so they must be few; real clients
/// send at most three (`Upgrade`, `HTTP2-Settings`, `TE`).
const MAX_CONNECTION_NAMES: usize = 16;

/// A range of a head's bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    start: u32,
    end: u32,
}

impl Span {
    /// Where `part`, a subslice of `whole`, lies in it.
    pub(super) fn of(whole: &[u8], part: &[u8]) -> Self {
        let start = (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize).min(whole.len());
        let end = (start + part.len()).min(whole.len());
        Self { start: start as u32, end: end as u32 }
    }

    pub(super) fn up_to(self, end: Span) -> Self {
        Self { start: self.start, end: end.end }
    }

    pub(super) fn from(self, whole: &[u8]) -> &[u8] {
        &whole[self.start as usize..self.end as usize]
    }
}

/// The names that mean something to a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FieldName {
    Accept,
    Authorization,
    Connection,
    ContentLength,
    ContentType,
    CorrelationId,
    DataParallelRank,
    Expect,
    /// Belongs to one connection and is never passed on.
    HopByHop,
    Host,
    RequestId,
    RetryAfter,
    /// `x-warmroute-*`: only the router itself may say these.
    Router,
    RoutingKey,
    TargetWorker,
    TraceParent,
    TraceState,
    TransferEncoding,
    Upgrade,
    UserAgent,
    CachedTokens,
    PromptTokens,
    Other,
}

impl FieldName {
    fn of(name: &[u8]) -> Self {
        if name.len() > LONGEST_NAME {
            return Self::of_unknown(name);
        }
        // In one go for all letters, whatever the length: the comparisons below are then plain ones.
        let mut lower = [0; LONGEST_NAME];
        lower[..name.len()].copy_from_slice(name);
        lower.make_ascii_lowercase();
        let name = &lower[..name.len()];
        // By length first: at most three comparisons for any name.
        let candidates: &[(&[u8], FieldName)] = match name.len() {
            2 => &[(b"te", FieldName::HopByHop)],
            4 => &[(b"host", FieldName::Host)],
            6 => &[(b"accept", FieldName::Accept), (b"expect", FieldName::Expect)],
            7 => &[(b"upgrade", FieldName::Upgrade), (b"trailer", FieldName::HopByHop)],
            9 => &[(b"x-user-id", FieldName::RoutingKey)],
            10 => &[
                (b"connection", FieldName::Connection),
                (b"user-agent", FieldName::UserAgent),
                (b"tracestate", FieldName::TraceState),
                (b"keep-alive", FieldName::HopByHop),
            ],
            11 => &[
                (b"traceparent", FieldName::TraceParent),
                (b"retry-after", FieldName::RetryAfter),
                (b"x-tenant-id", FieldName::RoutingKey),
            ],
            12 => &[
                (b"content-type", FieldName::ContentType),
                (b"x-request-id", FieldName::RequestId),
                (b"x-session-id", FieldName::RoutingKey),
            ],
            13 => &[(b"authorization", FieldName::Authorization)],
            14 => &[(b"content-length", FieldName::ContentLength)],
            15 => &[(b"x-cached-tokens", FieldName::CachedTokens), (b"x-prompt-tokens", FieldName::PromptTokens)],
            16 => &[(b"x-correlation-id", FieldName::CorrelationId), (b"proxy-connection", FieldName::HopByHop)],
            17 => &[(b"transfer-encoding", FieldName::TransferEncoding), (b"x-smg-routing-key", FieldName::RoutingKey)],
            18 => &[(b"proxy-authenticate", FieldName::HopByHop)],
            19 => &[(b"x-smg-target-worker", FieldName::TargetWorker), (b"proxy-authorization", FieldName::HopByHop)],
            20 => &[(b"x-data-parallel-rank", FieldName::DataParallelRank)],
            _ => &[],
        };
        for &(candidate, meaning) in candidates {
            if name == candidate {
                return meaning;
            }
        }
        Self::of_unknown(name)
    }

    fn of_unknown(name: &[u8]) -> Self {
        match name.get(..ROUTER_PREFIX.len()) {
            Some(prefix) if prefix.eq_ignore_ascii_case(ROUTER_PREFIX) => FieldName::Router,
            _ => FieldName::Other,
        }
    }
}

/// Longer than every name that is known, and a length that is quickly filled and compared.
const LONGEST_NAME: usize = 32;

const ROUTER_PREFIX: &[u8] = b"x-warmroute-";

/// An end-to-end field. Its line goes on as the peer spelled it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    pub(super) meaning: FieldName,
    pub(super) name: Span,
    pub(super) value: Span,
}

impl Field {
    /// `Name: value` without the line end.
    pub(super) fn line(self, head: &[u8]) -> &[u8] {
        self.name.up_to(self.value).from(head)
    }
}

/// What the fields of a head say.
#[derive(Debug)]
pub(super) struct Fields {
    /// The end-to-end fields in their order; those below are not among them.
    pub(super) end_to_end: Vec<Field>,
    pub(super) content_length: Option<u64>,
    /// Its line as the peer spelled it.
    pub(super) content_length_line: Option<Span>,
    pub(super) chunked: bool,
    /// `Connection: close`, `Connection: keep-alive`.
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    pub(super) host: Option<Span>,
    pub(super) expect_continue: bool,
    /// An `Upgrade` to something else than `h2c`, which a server is free to ignore (RFC 9110 section 7.8).
    pub(super) upgrade: bool,
}

/// Sorts `headers`, subslices of `head`. The error is a message for the peer whose head it is.
pub(super) fn read(head: &[u8], headers: &[Header<'_>]) -> Result<Fields, &'static str> {
    let mut fields = Fields {
        end_to_end: Vec::with_capacity(headers.len()),
        content_length: None,
        content_length_line: None,
        chunked: false,
        close: false,
        keep_alive: false,
        host: None,
        expect_continue: false,
        upgrade: false,
    };
    let mut names_hop_by_hop = false;
    for header in headers {
        let meaning = FieldName::of(header.name.as_bytes());
        let field =
            Field { meaning, name: Span::of(head, header.name.as_bytes()), value: Span::of(head, header.value) };
        match meaning {
            FieldName::ContentLength if fields.content_length.is_some() => return Err("more than one content-length"),
            FieldName::ContentLength => {
                fields.content_length = Some(digits(header.value).ok_or("content-length is not a number of bytes")?);
                fields.content_length_line = Some(field.name.up_to(field.value));
            }
            FieldName::TransferEncoding if fields.chunked => return Err("more than one transfer-encoding"),
            FieldName::TransferEncoding if header.value.eq_ignore_ascii_case(b"chunked") => fields.chunked = true,
            FieldName::TransferEncoding => return Err("transfer-encoding must be chunked and nothing else"),
            FieldName::Host if fields.host.is_some() => return Err("more than one host"),
            FieldName::Host if !is_authority(header.value) => return Err("host is not a host name"),
            FieldName::Host => fields.host = Some(field.value),
            FieldName::Connection => {
                for option in options(header.value) {
                    if option.eq_ignore_ascii_case(b"close") {
                        fields.close = true;
                    } else if option.eq_ignore_ascii_case(b"keep-alive") {
                        fields.keep_alive = true;
                    } else {
                        names_hop_by_hop = true;
                    }
                }
            }
            FieldName::Upgrade => {
                fields.upgrade |= options(header.value).any(|protocol| !protocol.eq_ignore_ascii_case(b"h2c"));
            }
            FieldName::Expect => fields.expect_continue |= header.value.eq_ignore_ascii_case(b"100-continue"),
            FieldName::HopByHop | FieldName::Router => {}
            _ => fields.end_to_end.push(field),
        }
    }
    if fields.chunked && fields.content_length.is_some() {
        return Err("both transfer-encoding and content-length");
    }
    if names_hop_by_hop {
        drop_named_by_connection(head, headers, &mut fields.end_to_end)?;
    }
    Ok(fields)
}

fn drop_named_by_connection(
    head: &[u8],
    headers: &[Header<'_>],
    end_to_end: &mut Vec<Field>,
) -> Result<(), &'static str> {
    let named = headers
        .iter()
        .filter(|header| FieldName::of(header.name.as_bytes()) == FieldName::Connection)
        .flat_map(|header| options(header.value));
    for (count, name) in named.enumerate() {
        if count == MAX_CONNECTION_NAMES {
            return Err("connection names too many fields");
        }
        end_to_end.retain(|field| !field.name.from(head).eq_ignore_ascii_case(name));
    }
    Ok(())
}

/// The elements of a comma-separated list (RFC 9110 section 5.6.1), empty ones left out.
fn options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|option| !option.is_empty())
}

/// 1*DIGIT that fits a signed 64-bit number (Python's side of the border uses -1 for "none").
pub(super) fn digits(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number =
        value.iter().try_fold(0u64, |number, digit| number.checked_mul(10)?.checked_add(u64::from(digit - b'0')))?;
    i64::try_from(number).is_ok().then_some(number)
}

/// Whether no byte of `value` could end or extend the authority it stands for. Empty is allowed (RFC 9110 section 7.2).
pub(super) fn is_authority(value: &[u8]) -> bool {
    value.iter().all(|&byte| IN_AUTHORITY[byte as usize])
}

const IN_AUTHORITY: [bool; 256] = {
    let mut allowed = [false; 256];
    let mut byte = b'!';
    while byte <= b'~' {
        allowed[byte as usize] = true;
        byte += 1;
    }
    let refused = b"/\\@,#?\"<>'`{}|^";
    let mut i = 0;
    while i < refused.len() {
        allowed[refused[i] as usize] = false;
        i += 1;
    }
    allowed
};

/// `token` of RFC 9110 section 5.6.2.
pub(super) fn is_token(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|&byte| is_token_byte(byte))
}

pub(super) fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Whether each of a head's `lines` ends with CRLF. httparse takes a bare LF as well, but no CR that is not part of a CRLF,
/// so it is enough to count.
pub(super) fn all_lines_end_with_crlf(head: &[u8], lines: usize) -> bool {
    memchr::memchr_iter(b'\r', head).count() == lines
}
