//! A request and its leases.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::enums::{Endpoint, OutcomeKind};
use super::http1::{HeadParser, RequestHead, Response};
use super::views::Transition;
use super::{Nanoseconds, written};
use crate::error::Error;
use crate::http1::JOINED_BODY_BYTES;
use crate::outcome::{self, Outcome};
use crate::router;

/// What one scan of a body found. Remembers which workers failed it.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct RoutedRequest(pub(super) Arc<router::Request>);

#[pymethods]
impl RoutedRequest {
    #[getter]
    fn endpoint(&self) -> Endpoint {
        self.0.endpoint().into()
    }

    #[getter]
    fn model(&self) -> Option<&str> {
        self.0.prompt().model.as_deref()
    }

    #[getter]
    fn stream(&self) -> bool {
        self.0.prompt().stream
    }

    #[getter]
    fn prompt_bytes(&self) -> u64 {
        self.0.prompt().prompt_bytes
    }

    #[getter]
    fn rid(&self) -> Option<&str> {
        self.0.prompt().rid.as_deref()
    }

    #[getter]
    fn priority(&self) -> Option<i64> {
        self.0.prompt().priority
    }

    fn blocks(&self) -> Vec<(u64, u32)> {
        self.0.prompt().blocks.iter().map(|block| (block.key, block.end)).collect()
    }

    /// Leases so far.
    #[getter]
    fn attempts(&self) -> u32 {
        self.0.attempts()
    }

    fn finish(&self, status: u16, first_byte_ns: i64, now_ns: u64) {
        self.0.finish(status, u64::try_from(first_byte_ns).ok(), now_ns);
    }
}

/// Where to insert what into a body.
type Splice<'py> = Option<(usize, Bound<'py, PyBytes>)>;

/// One attempt's claim on one target. Dropped without `release`, it counts as CANCELLED.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct Lease(pub(super) router::Lease);

impl Lease {
    /// Slot and incarnation, which are asked for together.
    pub(super) fn place(&self) -> (u16, u64) {
        (self.0.slot(), self.0.incarnation())
    }
}

#[pymethods]
impl Lease {
    #[getter]
    fn slot(&self) -> u16 {
        self.0.slot()
    }

    #[getter]
    fn incarnation(&self) -> u64 {
        self.0.incarnation()
    }

    #[getter]
    fn selected_ns(&self) -> u64 {
        self.0.selected_ns()
    }

    #[getter]
    fn match_bytes(&self) -> u32 {
        self.0.match_bytes()
    }

    #[getter]
    fn predicted_cached_tokens(&self) -> u64 {
        self.0.predicted_cached_tokens()
    }

    #[getter]
    fn splice<'py>(&self, py: Python<'py>) -> Splice<'py> {
        self.0.splice().map(|(offset, bytes)| (offset, PyBytes::new(py, &bytes)))
    }

    /// The request `data`, which begins with `head`, as it goes to the target; of a long one the second part is to be sent behind
    /// the first.
    #[pyo3(signature = (head, host, authorization, data, /))]
    pub(super) fn to_worker<'py>(
        &self,
        py: Python<'py>,
        head: &RequestHead,
        host: &[u8],
        authorization: Option<&[u8]>,
        data: &[u8],
    ) -> Message<'py> {
        let body = head.head.body_in(data);
        let (offset, inserted) = self.0.splice().unwrap_or_default();
        let (before, behind) = body.split_at(offset);
        let length = body.len() + inserted.len();
        let write_head = |message: &mut Vec<u8>| {
            head.head.write_to_worker(message, host, authorization, head.id(), Some(length as u64), self.0.told_rank());
        };
        if length > JOINED_BODY_BYTES {
            let body = if inserted.is_empty() { body } else { &[before, &inserted, behind].concat() };
            return (written(py, write_head), Some(PyBytes::new(py, body)));
        }
        let message = written(py, |message| {
            write_head(message);
            message.reserve(length);
            [before, &inserted, behind].iter().for_each(|part| message.extend_from_slice(part));
        });
        (message, None)
    }

    #[pyo3(signature = (
        kind, status, first_byte_ns, response, reused, prompt_tokens, completion_tokens, cached_tokens, now_ns, /
    ))]
    #[allow(clippy::too_many_arguments)]
    fn release<'py>(
        &self,
        py: Python<'py>,
        kind: OutcomeKind,
        status: u16,
        first_byte_ns: i64,
        response: Option<PyRef<'_, Response>>,
        reused: Option<bool>,
        prompt_tokens: i64,
        completion_tokens: i64,
        cached_tokens: i64,
        now_ns: u64,
    ) -> PyResult<Bound<'py, PyTuple>> {
        self.0.count_delivery(reused, response.as_ref().map(|response| &response.arrivals));
        let mut tokens = (prompt_tokens, completion_tokens, cached_tokens);
        if let Some(response) = &response {
            let found = response.tokens();
            tokens.1 = if completion_tokens < 0 { found.1 } else { completion_tokens };
            if prompt_tokens < 0 {
                (tokens.0, tokens.2) = (found.0, found.2);
            }
        }
        let outcome = Outcome {
            kind: kind.into(),
            status,
            first_byte_ns: u64::try_from(first_byte_ns).ok(),
            prompt_tokens: tokens.0,
            completion_tokens: tokens.1,
            cached_tokens: tokens.2,
        };
        let transitions = self.0.release(&outcome, now_ns)?;
        PyTuple::new(py, transitions.into_iter().map(Transition))
    }

    /// The answer has arrived whole, and the client has it: `release` and the request's `finish`.
    #[pyo3(signature = (response, reused, now_ns, /))]
    fn complete<'py>(
        &self,
        py: Python<'py>,
        response: &Response,
        reused: bool,
        now_ns: Nanoseconds,
    ) -> PyResult<Transitions<'py>> {
        let transitions = self.completed(response, reused, now_ns.0)?;
        (!transitions.is_empty()).then(|| PyTuple::new(py, transitions.into_iter().map(Transition))).transpose()
    }

    /// An answer to `head` that is whole in `data` and has nothing about it that would have to be thought over: as it goes to the client,
    /// with the lease given back as by `complete`.
    #[pyo3(signature = (parser, head, keep_alive, reused, data, now_ns, /))]
    #[allow(clippy::too_many_arguments)]
    fn answer<'py>(
        &self,
        py: Python<'py>,
        parser: &HeadParser,
        head: &RequestHead,
        keep_alive: bool,
        reused: bool,
        data: &[u8],
        now_ns: Nanoseconds,
    ) -> PyResult<Option<Answer<'py>>> {
        let Ok(Some((response, Some(stays)))) = parser.response(data, head, now_ns.0) else { return Ok(None) };
        if response.head.status() >= 400 || !response.fits(head) {
            return Ok(None);
        }
        let answer = response.written_as_it_is(py, head, keep_alive, data);
        match self.completed(&response, reused, now_ns.0) {
            Ok(transitions) if transitions.is_empty() => Ok(Some((answer, stays, None, None))),
            Ok(transitions) => {
                let transitions = PyTuple::new(py, transitions.into_iter().map(Transition))?;
                Ok(Some((answer, stays, Some(transitions), None)))
            }
            // The region's lock could not be had.
            Err(_) => Ok(Some((answer, stays, None, Some(Bound::new(py, response)?)))),
        }
    }
}

/// What goes to a worker; of a long request the second part is to be sent behind the first.
pub(super) type Message<'py> = (Bound<'py, PyBytes>, Option<Bound<'py, PyBytes>>);

type Transitions<'py> = Option<Bound<'py, PyTuple>>;

/// What the client gets; whether the worker's connection can be used again; machines that moved; if the lease could not be given back, the
/// answer, to be told when it can.
type Answer<'py> = (Bound<'py, PyBytes>, bool, Transitions<'py>, Option<Bound<'py, Response>>);

impl Lease {
    fn completed(&self, response: &Response, reused: bool, now_ns: u64) -> Result<Vec<router::Transition>, Error> {
        self.0.count_delivery(Some(reused), Some(&response.arrivals));
        let (prompt_tokens, completion_tokens, cached_tokens) = response.tokens();
        let outcome = Outcome {
            kind: outcome::OutcomeKind::Answered,
            status: response.head.status(),
            first_byte_ns: Some(response.began_ns),
            prompt_tokens,
            completion_tokens,
            cached_tokens,
        };
        self.0.request().finish(outcome.status, outcome.first_byte_ns, now_ns);
        self.0.release(&outcome, now_ns)
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<RoutedRequest>()?;
    module.add_class::<Lease>()
}
