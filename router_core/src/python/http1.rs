//! `http` part of `warmroute._core`: heads, bodies, chunks.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

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
    m.add_class::<ResponseHead>()?;
    m.add_class::<HeadParser>()?;
    m.add_class::<BodyReader>()?;
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
pub(super) struct RequestHead(pub(super) http1::RequestHead);

#[pymethods]
impl RequestHead {
    #[getter]
    fn method(&self) -> &str {
        self.0.method()
    }

    /// Without the query.
    #[getter]
    fn path<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.path())
    }

    #[getter]
    fn route(&self) -> Route {
        self.0.route().into()
    }

    /// CHAT, COMPLETIONS or GENERATE.
    #[getter]
    fn is_routed(&self) -> bool {
        self.0.route().is_routed()
    }

    /// Bytes of the head, the empty line included.
    #[getter]
    fn size(&self) -> usize {
        self.0.size()
    }

    /// -1: none given.
    #[getter]
    fn content_length(&self) -> i64 {
        or_minus_one(self.0.content_length())
    }

    #[getter]
    fn chunked(&self) -> bool {
        self.0.chunked()
    }

    #[getter]
    fn keep_alive(&self) -> bool {
        self.0.keep_alive()
    }

    /// (keep_alive, size, chunked, content_length), which are asked for together.
    #[getter]
    fn framing(&self) -> (bool, usize, bool, i64) {
        (self.keep_alive(), self.size(), self.chunked(), self.content_length())
    }

    #[getter]
    fn http_1_0(&self) -> bool {
        self.0.http_1_0()
    }

    #[getter]
    fn expect_continue(&self) -> bool {
        self.0.expect_continue()
    }

    /// The first of the configured headers that the client sent.
    #[getter]
    fn request_id<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.request_id().map(|value| PyBytes::new(py, value))
    }

    #[getter]
    fn authorization<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyBytes>> {
        self.0.authorization().map(|value| PyBytes::new(py, value))
    }

    /// Whether that is its `authorization`; takes as long for every answer.
    #[pyo3(signature = (expected, /))]
    fn bears(&self, expected: &[u8]) -> bool {
        let given = self.0.authorization().unwrap_or_default();
        let differences = given.iter().zip(expected).fold(0, |all, (one, other)| all | (one ^ other));
        std::hint::black_box(differences) == 0 && given.len() == expected.len()
    }

    /// The client's name for the request, else one made of `prefix` and `number`.
    #[pyo3(signature = (prefix, number, /))]
    fn request_id_or<'py>(&self, py: Python<'py>, prefix: &[u8], number: u32) -> Bound<'py, PyBytes> {
        if let Some(id) = self.0.request_id() {
            return PyBytes::new(py, id);
        }
        let mut id = Vec::with_capacity(prefix.len() + 8);
        id.extend_from_slice(prefix);
        let digit = |shift: u32| b"0123456789abcdef"[(number >> shift & 0xF) as usize];
        id.extend((0..8).rev().map(|place| digit(4 * place)));
        PyBytes::new(py, &id)
    }

    /// The header lines that policies read, with lower-case names; empty as a rule.
    #[getter]
    fn routing_headers<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.routing_headers())
    }

    /// The head to send to a worker.
    #[pyo3(signature = (host, authorization, request_id, content_length, rank, /))]
    fn to_worker<'py>(
        &self,
        py: Python<'py>,
        host: &[u8],
        authorization: Option<&[u8]>,
        request_id: &[u8],
        content_length: i64,
        rank: Option<u16>,
    ) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_worker(host, authorization, request_id, length_or_none(content_length), rank))
    }

    /// The head to send to the control app.
    #[pyo3(signature = (content_length, /))]
    fn to_control<'py>(&self, py: Python<'py>, content_length: i64) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_control(length_or_none(content_length)))
    }
}

#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct ResponseHead(pub(super) http1::ResponseHead);

#[pymethods]
impl ResponseHead {
    #[getter]
    fn status(&self) -> u16 {
        self.0.status()
    }

    #[getter]
    fn size(&self) -> usize {
        self.0.size()
    }

    /// -1: none given.
    #[getter]
    fn content_length(&self) -> i64 {
        or_minus_one(self.0.content_length())
    }

    #[getter]
    fn chunked(&self) -> bool {
        self.0.chunked()
    }

    /// Whether the worker's connection can be used again after this response.
    #[getter]
    fn keep_alive(&self) -> bool {
        self.0.keep_alive()
    }

    /// Of the x-prompt-tokens header; -1 when absent or not a number.
    #[getter]
    fn prompt_tokens(&self) -> i64 {
        or_minus_one(self.0.prompt_tokens())
    }

    /// Of the x-cached-tokens header; -1 when absent or not a number.
    #[getter]
    fn cached_tokens(&self) -> i64 {
        or_minus_one(self.0.cached_tokens())
    }

    /// -1 when absent or a date.
    #[getter]
    fn retry_after_seconds(&self) -> i64 {
        or_minus_one(self.0.retry_after_seconds())
    }

    /// Head and `rest` as they go to a client of HTTP/1.1 that gets the body in the framing it has; None: it has none, it ends with
    /// the connection.
    #[pyo3(signature = (request_id, keep_alive, rest, /))]
    fn as_it_is<'py>(
        &self,
        py: Python<'py>,
        request_id: &[u8],
        keep_alive: bool,
        rest: &[u8],
    ) -> Option<Bound<'py, PyBytes>> {
        let chunked = self.0.chunked();
        if !chunked && self.0.content_length().is_none() {
            return None;
        }
        let mut extra = Vec::with_capacity(request_id.len() + 16);
        extra.extend_from_slice(b"x-request-id: ");
        extra.extend_from_slice(request_id);
        extra.extend_from_slice(b"\r\n");
        let mut answer = self.0.to_client(&extra, keep_alive, chunked);
        answer.extend_from_slice(rest);
        Some(PyBytes::new(py, &answer))
    }

    /// The head to send to the client.
    #[pyo3(signature = (extra, keep_alive, chunked, /))]
    fn to_client<'py>(&self, py: Python<'py>, extra: &[u8], keep_alive: bool, chunked: bool) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_client(extra, keep_alive, chunked))
    }
}

/// Head, status, reader of the body, what has come of it, -1 while it goes on or else how many bytes were not of this response,
/// and whether the connection can be used again.
type BegunResponse<'py> = (Bound<'py, ResponseHead>, u16, Bound<'py, BodyReader>, Bound<'py, PyBytes>, i64, bool);

#[pyclass(module = "warmroute._core", frozen)]
struct HeadParser(http1::HeadParser);

#[pymethods]
impl HeadParser {
    #[new]
    #[pyo3(signature = (*, request_id_headers, max_head_bytes))]
    fn new(request_id_headers: Vec<String>, max_head_bytes: u32) -> PyResult<Self> {
        let parser = http1::HeadParser::new(request_id_headers, max_head_bytes);
        parser.map(Self).map_err(|name| PyValueError::new_err(format!("not a header name: {:?}", name.0)))
    }

    /// Parse the head at the start of `data`; None: more bytes are needed. Raises BadHead (400, 431, 505).
    #[pyo3(signature = (data, /))]
    fn request(&self, data: &[u8]) -> PyResult<Option<RequestHead>> {
        Ok(self.0.request(data)?.map(RequestHead))
    }

    /// As `request`, for a worker. 1xx heads are returned like others. Raises BadHead(502, ...).
    #[pyo3(signature = (data, head_request, /))]
    fn response(&self, data: &[u8], head_request: bool) -> PyResult<Option<ResponseHead>> {
        Ok(self.0.response(data, head_request)?.map(ResponseHead))
    }

    /// The response at the start of `data`, behind interim ones; None: more bytes are needed. Raises BadHead(502, ...).
    #[pyo3(signature = (data, head_request, now_ns, /))]
    fn begin_response<'py>(
        &self,
        py: Python<'py>,
        mut data: &[u8],
        head_request: bool,
        now_ns: u64,
    ) -> PyResult<Option<BegunResponse<'py>>> {
        let head = loop {
            match self.0.response(data, head_request)? {
                Some(head) if head.status() >= 200 => break head,
                // It concerns this hop alone.
                Some(interim) => data = &data[interim.size()..],
                None => return Ok(None),
            }
        };
        let mut reader = BodyReader::new(if head.chunked() {
            http1::BodyReader::of_chunks()
        } else if let Some(length) = head.content_length() {
            http1::BodyReader::of_length(length)
        } else {
            http1::BodyReader::until_eof()
        });
        let rest = &data[head.size()..];
        let (body, surplus) = match usize::try_from(reader.feed(rest, now_ns)?) {
            Ok(end) => (&rest[..end], (rest.len() - end) as i64),
            Err(_) => (rest, -1),
        };
        let (status, reusable) = (head.status(), head.keep_alive());
        let reader = Bound::new(py, reader)?;
        Ok(Some((Bound::new(py, ResponseHead(head))?, status, reader, PyBytes::new(py, body), surplus, reusable)))
    }
}

/// Finds the end of a message body in a stream of bytes. The bytes themselves are not touched.
#[pyclass(module = "warmroute._core")]
pub(super) struct BodyReader {
    reader: http1::BodyReader,
    arrivals: http1::Arrivals,
}

impl BodyReader {
    pub(super) fn arrivals(&self) -> &http1::Arrivals {
        &self.arrivals
    }

    /// -1 for what is not found in the last bytes.
    pub(super) fn tokens(&self) -> (i64, i64, i64) {
        let usage = self.reader.usage();
        (or_minus_one(usage.prompt_tokens), or_minus_one(usage.completion_tokens), or_minus_one(usage.cached_tokens))
    }

    fn new(reader: http1::BodyReader) -> Self {
        Self { reader, arrivals: http1::Arrivals::default() }
    }
}

#[pymethods]
impl BodyReader {
    #[staticmethod]
    #[pyo3(signature = (length, /))]
    fn of_length(length: u64) -> Self {
        Self::new(http1::BodyReader::of_length(length))
    }

    #[staticmethod]
    fn of_chunks() -> Self {
        Self::new(http1::BodyReader::of_chunks())
    }

    #[staticmethod]
    fn until_eof() -> Self {
        Self::new(http1::BodyReader::until_eof())
    }

    /// -1: all of `data` belongs to the body and it goes on; else how many bytes of `data` end it.
    #[pyo3(signature = (data, now_ns, /))]
    fn feed(&mut self, data: &[u8], now_ns: u64) -> PyResult<i64> {
        self.arrivals.piece(data.len(), now_ns);
        Ok(or_minus_one(self.reader.feed(data)?))
    }

    /// When `feed` was called last.
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

    /// (prompt, completion, cached) tokens found in the last bytes of the body; -1 unknown.
    fn usage(&self) -> (i64, i64, i64) {
        self.tokens()
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
