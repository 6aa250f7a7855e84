//! A request and its leases.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::enums::{Endpoint, OutcomeKind};
use super::http1::{BodyReader, ResponseHead};
use super::views::Transition;
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

    fn finish(&self, status: u16, first_byte_ns: i64, now_ns: u64) {
        self.0.finish(status, u64::try_from(first_byte_ns).ok(), now_ns);
    }
}

/// Where to insert what into a body.
type Splice<'py> = Option<(usize, Bound<'py, PyBytes>)>;

/// One attempt's claim on one target. Dropped without `release`, it counts as CANCELLED.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct Lease(pub(super) router::Lease);

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

    /// (slot, incarnation, splice, told rank), which are asked for together.
    #[getter]
    fn terms<'py>(&self, py: Python<'py>) -> (u16, u64, Splice<'py>, Option<u16>) {
        (self.slot(), self.incarnation(), self.splice(py), self.0.told_rank())
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

    #[pyo3(signature = (
        kind, status, first_byte_ns, reader, reused, prompt_tokens, completion_tokens, cached_tokens, now_ns, /
    ))]
    #[allow(clippy::too_many_arguments)]
    fn release<'py>(
        &self,
        py: Python<'py>,
        kind: OutcomeKind,
        status: u16,
        first_byte_ns: i64,
        reader: Option<PyRef<'_, BodyReader>>,
        reused: Option<bool>,
        prompt_tokens: i64,
        completion_tokens: i64,
        cached_tokens: i64,
        now_ns: u64,
    ) -> PyResult<Bound<'py, PyTuple>> {
        self.0.count_delivery(reused, reader.as_ref().map(|reader| reader.arrivals()));
        let mut tokens = (prompt_tokens, completion_tokens, cached_tokens);
        if let Some(reader) = &reader {
            let found = reader.tokens();
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
    #[pyo3(signature = (status, first_byte_ns, head, reader, reused, now_ns, /))]
    #[allow(clippy::too_many_arguments)]
    fn complete<'py>(
        &self,
        py: Python<'py>,
        status: u16,
        first_byte_ns: u64,
        head: &ResponseHead,
        reader: PyRef<'_, BodyReader>,
        reused: bool,
        now_ns: u64,
    ) -> PyResult<Option<Bound<'py, PyTuple>>> {
        self.0.count_delivery(Some(reused), Some(reader.arrivals()));
        let found = reader.tokens();
        let given = (head.0.prompt_tokens(), head.0.cached_tokens());
        let as_number = |tokens: Option<u64>| tokens.and_then(|tokens| i64::try_from(tokens).ok()).unwrap_or(-1);
        let (prompt_tokens, cached_tokens) =
            if given.0.is_some() { (as_number(given.0), as_number(given.1)) } else { (found.0, found.2) };
        let outcome = Outcome {
            kind: outcome::OutcomeKind::Answered,
            status,
            first_byte_ns: Some(first_byte_ns),
            prompt_tokens,
            completion_tokens: found.1,
            cached_tokens,
        };
        self.0.request().finish(status, Some(first_byte_ns), now_ns);
        let transitions = self.0.release(&outcome, now_ns)?;
        if transitions.is_empty() {
            return Ok(None);
        }
        PyTuple::new(py, transitions.into_iter().map(Transition)).map(Some)
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<RoutedRequest>()?;
    module.add_class::<Lease>()
}
