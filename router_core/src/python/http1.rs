//! `http` part of `warmroute._core`: heads, bodies, chunks.

use std::sync::atomic::{AtomicU32, Ordering};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{Nanoseconds, written};
use crate::http1;

pyo3::create_exception!(
    warmroute._core,
    BadHead,
    PyValueError,
    "A head or framing that must be refused. `args == (status, message)`; the connection is closed afterwards."
);

pub(crate) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("BadHead", m.py().get_type::<BadHead>())?;
    m.add_class::<Route>()?;
    m.add_class::<RequestHead>()?;
    m.add_class::<Response>()?;
    m.add_class::<HeadParser>()?;
    m.add_class::<ChunkDecoder>()
}

impl From<http1::BadHead> for PyErr {
    fn from(refusal: http1::BadHead) -> Self {
        BadHead::new_err((refusal.status, refusal.message))
    }
}

/// -1 stands for "none" on the Python side.
fn or_minus_one<T: TryInto<i64>>(number: Option<T>) -> i64 {
    number.and_then(|number| number.try_into().ok()).unwrap_or(-1)
}

fn length_or_none(content_length: i64) -> Option<u64> {
    u64::try_from(content_length).ok()
}

/// What a request line asks for, as far as the data plane cares.
#[pyclass(module = "warmroute._core", frozen, eq, hash, rename_all = "UPPERCASE")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Route {
    Chat,
    Completions,
    Generate,
    Health,
    Liveness,
    Readiness,
    Control,
}

impl From<http1::Route> for Route {
    fn from(route: http1::Route) -> Self {
        match route {
            http1::Route::Chat => Route::Chat,
            http1::Route::Completions => Route::Completions,
            http1::Route::Generate => Route::Generate,
            http1::Route::Health => Route::Health,
            http1::Route::Liveness => Route::Liveness,
            http1::Route::Readiness => Route::Readiness,
            http1::Route::Control => Route::Control,
        }
    }
}

#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct RequestHead {
    pub(super) head: http1::RequestHead,
    /// Its name where the client gave none.
    made_id: Vec<u8>,
    pub(super) is_authorized: bool,
}

impl RequestHead {
    pub(super) fn id(&self) -> &[u8] {
        self.head.request_id().unwrap_or(&self.made_id)
    }
}

#[pymethods]
impl RequestHead {
    #[getter]
    fn method(&self) -> &str {
        self.head.method()
    }

    /// Without the query.
    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.head.path())
    }

    #[getter]
    fn route(&self) -> Route {
        self.head.route().into()
    }

    /// CHAT, COMPLETIONS or GENERATE.
    #[getter]
    fn is_routed(&self) -> bool {
        self.head.route().is_routed()
    }

    /// Bytes of the head, the empty line included.
    #[getter]
    fn size(&self) -> usize {
        self.head.size()
    }

    /// -1: none given.
    #[getter]
    fn content_length(&self) -> i64 {
        or_minus_one(self.head.content_length())
    }

    #[getter]
    fn chunked(&self) -> bool {
        self.head.chunked()
    }

    #[getter]
    fn keep_alive(&self) -> bool {
        self.head.keep_alive()
    }

    #[getter]
    fn http_1_0(&self) -> bool {
        self.head.http_1_0()
    }

    #[getter]
    fn expect_continue(&self) -> bool {
        self.head.expect_continue()
    }

    /// What the request is called, here and at the worker: the first of the configured headers that the client sent, else a name
    /// made here.
    #[getter]
    fn request_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.id())
    }

    #[getter]
    fn authorization<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.head.authorization().map(|value| PyBytes::new(py, value))
    }

    /// Whether it bears the key that the router wants, if it wants one.
    #[getter]
    fn is_authorized(&self) -> bool {
        self.is_authorized
    }

    /// The header lines that policies read, with lower-case names; empty as a rule.
    #[getter]
    fn routing_headers<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.head.routing_headers())
    }

    /// Its body, in the bytes that begin with it.
    #[pyo3(signature = (data, /))]
    fn body_in<'py>(&self, py: Python<'py>, data: &[u8]) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.head.body_in(data))
    }

    /// The head to send to the control app.
    #[pyo3(signature = (content_length, /))]
    fn to_control<'py>(&self, py: Python<'py>, content_length: i64) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.head.to_control(length_or_none(content_length)))
    }
}

/// What a worker, or the control app, answers: its head, and where its body ends. The bytes of the body are not kept.
#[pyclass(module = "warmroute._core")]
pub(super) struct Response {
    pub(super) head: http1::ResponseHead,
    reader: http1::BodyReader,
    pub(super) arrivals: http1::Arrivals,
    /// When its head was complete.
    pub(super) began_ns: u64,
    /// Where its body begins in the bytes that it was found in, and where what belongs to it ends there.
    body_at: usize,
    body_end: usize,
}

impl Response {
    /// Whether the client of `request` can get the body in the framing it has.
    pub(super) fn fits(&self, request: &RequestHead) -> bool {
        !request.head.http_1_0() && (self.head.chunked() || self.head.content_length().is_some())
    }

    /// For a client whom it fits: see `as_it_is`.
    pub(super) fn written_as_it_is<'py>(
        &self,
        py: Python<'py>,
        request: &RequestHead,
        keep_alive: bool,
        data: &[u8],
    ) -> Bound<'py, PyBytes> {
        let body = data.get(self.body_at..self.body_end).unwrap_or_default();
        written(py, |answer| self.head.write_to_client(answer, request.id(), keep_alive, body))
    }

    fn feed_at(&mut self, data: &[u8], now_ns: u64) -> Result<Option<usize>, http1::BadHead> {
        self.arrivals.piece(data.len(), now_ns);
        self.reader.feed(data)
    }

    /// Prompt, completion and cached tokens: the worker's headers count before what stands in the last bytes of the body. -1 for what
    /// neither says.
    pub(super) fn tokens(&self) -> (i64, i64, i64) {
        let usage = self.reader.usage();
        let (prompt, cached) = match self.head.prompt_tokens() {
            None => (usage.prompt_tokens, usage.cached_tokens),
            given => (given, self.head.cached_tokens()),
        };
        (or_minus_one(prompt), or_minus_one(usage.completion_tokens), or_minus_one(cached))
    }
}

#[pymethods]
impl Response {
    #[getter]
    fn status(&self) -> u16 {
        self.head.status()
    }

    /// -1: none given.
    #[getter]
    fn content_length(&self) -> i64 {
        or_minus_one(self.head.content_length())
    }

    #[getter]
    fn chunked(&self) -> bool {
        self.head.chunked()
    }

    /// Whether the worker's connection can be used again after this response.
    #[getter]
    fn keep_alive(&self) -> bool {
        self.head.keep_alive()
    }

    /// When its head was complete.
    #[getter]
    fn began_ns(&self) -> u64 {
        self.began_ns
    }

    /// -1 when absent or a date.
    #[getter]
    fn retry_after_seconds(&self) -> i64 {
        or_minus_one(self.head.retry_after_seconds())
    }

    /// What of `data`, in which it began, belongs to its body.
    #[pyo3(signature = (data, /))]
    fn body_in<'py>(&self, py: Python<'py>, data: &[u8]) -> Bound<'py, PyBytes> {
        PyBytes::new(py, data.get(self.body_at..self.body_end).unwrap_or_default())
    }

    /// Head and what of the body came with it in `data`, as they go to the client of `request` that gets the body in the framing it
    /// has; None: that cannot be, since the client speaks HTTP/1.0 or the body ends with the connection.
    #[pyo3(signature = (request, keep_alive, data, /))]
    fn as_it_is<'py>(
        &self,
        py: Python<'py>,
        request: &RequestHead,
        keep_alive: bool,
        data: &[u8],
    ) -> Option<Bound<'py, PyBytes>> {
        self.fits(request).then(|| self.written_as_it_is(py, request, keep_alive, data))
    }

    /// The head to send to the client.
    #[pyo3(signature = (extra, keep_alive, chunked, /))]
    fn to_client<'py>(&self, py: Python<'py>, extra: &[u8], keep_alive: bool, chunked: bool) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.head.to_client(extra, keep_alive, chunked))
    }

    /// -1: all of `data` belongs to the body and it goes on; else how many bytes of `data` end it.
    #[pyo3(signature = (data, now_ns, /))]
    fn feed(&mut self, data: &[u8], now_ns: Nanoseconds) -> PyResult<i64> {
        Ok(or_minus_one(self.feed_at(data, now_ns.0)?))
    }

    /// When the last piece came.
    #[getter]
    fn last_ns(&self) -> u64 {
        self.arrivals.last_ns()
    }

    #[getter]
    fn done(&self) -> bool {
        self.reader.done()
    }

    /// Bytes missing until the current chunk and its CRLF are complete; -1 where that has no meaning.
    #[getter]
    fn open_chunk_bytes(&self) -> i64 {
        or_minus_one(self.reader.open_chunk_bytes())
    }

    /// The connection ended here. True if that ends the body.
    fn end_of_file(&mut self) -> bool {
        self.reader.end_of_file()
    }

    /// (prompt, completion, cached) as its head, or else the last bytes of its body say; -1 unknown.
    #[getter(tokens)]
    fn py_tokens(&self) -> (i64, i64, i64) {
        self.tokens()
    }

    /// It was kept back until now: nobody got its first byte before.
    #[pyo3(signature = (now_ns, /))]
    fn held_until(&mut self, now_ns: Nanoseconds) {
        self.began_ns = now_ns.0;
    }
}

/// The response, its status, and whether the connection can be used again; None: the body goes on.
type BegunResponse<'py> = (Bound<'py, Response>, u16, Option<bool>);

#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct HeadParser {
    parser: http1::HeadParser,
    max_body_bytes: usize,
    authorization: Option<Vec<u8>>,
    id_prefix: Vec<u8>,
    ids: AtomicU32,
}

impl HeadParser {
    /// The request at the start of `data`, and if it is there as a whole (and not too long), where it ends; None: more bytes are
    /// needed for its head.
    pub(super) fn begin(&self, data: &[u8]) -> Result<Option<(RequestHead, Option<usize>)>, http1::BadHead> {
        let Some(head) = self.parser.request(data)? else { return Ok(None) };
        let size = head.size();
        let length = head.content_length().map_or(Some(0), |length| usize::try_from(length).ok());
        let end = length
            .filter(|&length| !head.chunked() && length <= self.max_body_bytes && length <= data.len() - size)
            .map(|length| size + length);
        Ok(Some((self.request_head(head), end)))
    }

    /// The response to `request` at the start of `data`, behind interim ones, and whether the connection can be used again; None: the body
    /// goes on. None for both: more bytes are needed for its head.
    pub(super) fn response(
        &self,
        data: &[u8],
        request: &RequestHead,
        now_ns: u64,
    ) -> Result<Option<(Response, Option<bool>)>, http1::BadHead> {
        let head_request = request.head.method() == "HEAD";
        let mut at = 0;
        let head = loop {
            match self.parser.response(&data[at..], head_request)? {
                Some(head) if head.status() >= 200 => break head,
                // It concerns this hop alone.
                Some(interim) => at += interim.size(),
                None => return Ok(None),
            }
        };
        let reader = if head.chunked() {
            http1::BodyReader::of_chunks()
        } else if let Some(length) = head.content_length() {
            http1::BodyReader::of_length(length)
        } else {
            http1::BodyReader::until_eof()
        };
        let (body_at, body_end, reusable) = (at + head.size(), data.len(), head.keep_alive());
        let arrivals = http1::Arrivals::default();
        let mut response = Response { head, reader, arrivals, began_ns: now_ns, body_at, body_end };
        let mut stays = None;
        if let Some(end) = response.feed_at(&data[body_at..], now_ns)? {
            response.body_end = body_at + end;
            stays = Some(reusable && response.body_end == data.len());
        }
        Ok(Some((response, stays)))
    }

    fn request_head(&self, head: http1::RequestHead) -> RequestHead {
        let made_id = if head.request_id().is_some() { Vec::new() } else { self.make_id() };
        let is_authorized = self.authorization.as_ref().is_none_or(|expected| bears(&head, expected));
        RequestHead { head, made_id, is_authorized }
    }

    fn make_id(&self) -> Vec<u8> {
        let number = self.ids.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let mut id = Vec::with_capacity(self.id_prefix.len() + 8);
        id.extend_from_slice(&self.id_prefix);
        let digit = |shift: u32| b"0123456789abcdef"[(number >> shift & 0xF) as usize];
        id.extend((0..8).rev().map(|place| digit(4 * place)));
        id
    }
}

/// Whether that is its `authorization`; takes as long for every answer.
fn bears(head: &http1::RequestHead, expected: &[u8]) -> bool {
    let given = head.authorization().unwrap_or_default();
    let differences = given.iter().zip(expected).fold(0, |all, (one, other)| all | (one ^ other));
    std::hint::black_box(differences) == 0 && given.len() == expected.len()
}

#[pymethods]
impl HeadParser {
    #[new]
    #[pyo3(signature = (*, request_id_headers, max_head_bytes, max_body_bytes, authorization, id_prefix))]
    fn new(
        request_id_headers: Vec<String>,
        max_head_bytes: u32,
        max_body_bytes: usize,
        authorization: Option<Vec<u8>>,
        id_prefix: Vec<u8>,
    ) -> PyResult<Self> {
        let parser = http1::HeadParser::new(request_id_headers, max_head_bytes);
        let parser = parser.map_err(|name| PyValueError::new_err(format!("not a header name: {:?}", name.0)))?;
        Ok(Self { parser, max_body_bytes, authorization, id_prefix, ids: AtomicU32::new(0) })
    }

    /// A name for what no head was understood of.
    fn new_request_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.make_id())
    }

    /// Parse the head at the start of `data`; None: more bytes are needed. Raises BadHead (400, 431, 505).
    #[pyo3(signature = (data, /))]
    fn request(&self, data: &[u8]) -> PyResult<Option<RequestHead>> {
        Ok(self.parser.request(data)?.map(|head| self.request_head(head)))
    }

    /// The response to `request` at the start of `data`, behind interim ones; None: more bytes are needed. Raises BadHead(502, ...).
    #[pyo3(signature = (data, request, now_ns, /))]
    fn begin_response<'py>(
        &self,
        py: Python<'py>,
        data: &[u8],
        request: &RequestHead,
        now_ns: Nanoseconds,
    ) -> PyResult<Option<BegunResponse<'py>>> {
        let Some((response, stays)) = self.response(data, request, now_ns.0)? else { return Ok(None) };
        let status = response.head.status();
        Ok(Some((Bound::new(py, response)?, status, stays)))
    }
}

/// Takes the chunked coding off.
#[pyclass(module = "warmroute._core")]
struct ChunkDecoder(http1::ChunkDecoder);

#[pymethods]
impl ChunkDecoder {
    #[new]
    #[pyo3(signature = (max_body_bytes, /))]
    fn new(max_body_bytes: u64) -> Self {
        Self(http1::ChunkDecoder::new(max_body_bytes))
    }

    /// (decoded bytes, end): `end` is -1 while the body goes on, else the number of bytes of `data` that ended it.
    #[pyo3(signature = (data, /))]
    fn feed<'py>(&mut self, py: Python<'py>, data: &[u8]) -> PyResult<(Bound<'py, PyBytes>, i64)> {
        let mut decoded = Vec::with_capacity(data.len());
        let end = self.0.feed(data, &mut decoded)?;
        Ok((PyBytes::new(py, &decoded), or_minus_one(end)))
    }
}
