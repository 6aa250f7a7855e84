//! What the core tells: transitions, targets, series.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::enums::Endpoint;
use crate::metrics::{PAUSE_BOUNDS_NS, RETRY_REASONS, Slab};
use crate::router;

/// A fact for the log: a machine of the worker at `head` changed its state.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct Transition(pub(super) router::Transition);

#[pymethods]
impl Transition {
    #[getter]
    fn head(&self) -> u16 {
        self.0.head
    }

    #[getter]
    fn machine(&self) -> &'static str {
        self.0.machine
    }

    #[getter]
    fn previous(&self) -> &'static str {
        self.0.previous
    }

    #[getter]
    fn current(&self) -> &'static str {
        self.0.current
    }

    fn __repr__(&self) -> String {
        let router::Transition { head, machine, previous, current } = self.0;
        format!("<Transition of {head}: {machine} {previous} -> {current}>")
    }
}

/// What would be decided, and why.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct Explanation(pub(super) router::Explanation);

/// (slot, bytes of the prompt that it holds, requests in flight, outstanding tokens, cost in seconds)
type Candidate = (u16, u32, u64, u64, Option<f64>);

#[pymethods]
impl Explanation {
    #[getter]
    fn policy(&self) -> &'static str {
        self.0.policy
    }

    #[getter]
    fn chosen(&self) -> Option<u16> {
        self.0.chosen
    }

    #[getter]
    fn reason(&self) -> &'static str {
        self.0.reason
    }

    #[getter]
    fn prompt_bytes(&self) -> u32 {
        self.0.prompt_bytes
    }

    #[getter]
    fn candidates(&self) -> Vec<Candidate> {
        let candidates = self.0.candidates.iter();
        candidates.map(|c| (c.slot, c.match_bytes, c.load, c.outstanding_tokens, c.cost_seconds)).collect()
    }
}

/// One target as it stands now.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct TargetInfo(pub(super) router::TargetView);

#[pymethods]
impl TargetInfo {
    #[getter]
    fn slot(&self) -> u16 {
        self.0.slot
    }

    #[getter]
    fn head(&self) -> u16 {
        self.0.head
    }

    #[getter]
    fn rank(&self) -> u16 {
        self.0.rank
    }

    #[getter]
    fn incarnation(&self) -> u64 {
        self.0.incarnation
    }

    #[getter]
    fn health(&self) -> &'static str {
        self.0.health
    }

    #[getter]
    fn breaker(&self) -> &'static str {
        self.0.breaker
    }

    #[getter]
    fn draining(&self) -> bool {
        self.0.draining
    }

    #[getter]
    fn available(&self) -> bool {
        self.0.available
    }

    #[getter]
    fn load(&self) -> u64 {
        self.0.load
    }

    #[getter]
    fn outstanding_tokens(&self) -> u64 {
        self.0.outstanding_tokens
    }

    #[getter]
    fn consecutive_failures(&self) -> u32 {
        self.0.consecutive_failures
    }

    #[getter]
    fn consecutive_successes(&self) -> u32 {
        self.0.consecutive_successes
    }

    #[getter]
    fn selections(&self) -> u64 {
        self.0.counters.selections
    }

    #[getter]
    fn failures(&self) -> u64 {
        self.0.counters.failures
    }

    #[getter]
    fn prompt_tokens(&self) -> u64 {
        self.0.counters.prompt_tokens
    }

    #[getter]
    fn reported_cached_tokens(&self) -> u64 {
        self.0.counters.reported_cached_tokens
    }

    #[getter]
    fn predicted_cached_tokens(&self) -> u64 {
        self.0.counters.predicted_cached_tokens
    }

    #[getter]
    fn completion_tokens(&self) -> u64 {
        self.0.counters.completion_tokens
    }

    #[getter]
    fn connects(&self) -> u64 {
        self.0.counters.connects
    }

    #[getter]
    fn reuses(&self) -> u64 {
        self.0.counters.reuses
    }

    #[getter]
    fn request_bytes(&self) -> u64 {
        self.0.counters.request_bytes
    }

    #[getter]
    fn response_bytes(&self) -> u64 {
        self.0.counters.response_bytes
    }

    #[getter]
    fn kv_capacity_tokens(&self) -> u64 {
        self.0.kv_capacity_tokens
    }

    #[getter]
    fn sticky_keys(&self) -> u64 {
        self.0.sticky_keys
    }

    #[getter]
    fn index_characters(&self) -> u64 {
        self.0.index_characters
    }

    fn __repr__(&self) -> String {
        format!("<TargetInfo {:?}>", self.0)
    }
}

/// Counters of one (model, endpoint, streaming).
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct RequestSeries(pub(super) router::NamedSeries);

#[pymethods]
impl RequestSeries {
    #[getter]
    fn model(&self) -> &str {
        &self.0.model
    }

    #[getter]
    fn endpoint(&self) -> Endpoint {
        self.0.reading.endpoint.into()
    }

    #[getter]
    fn streaming(&self) -> bool {
        self.0.reading.streaming
    }

    #[getter]
    fn accepted(&self) -> u64 {
        self.0.reading.accepted
    }

    #[getter]
    fn answered<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = PyDict::new(py);
        for (status, count) in &self.0.reading.answered {
            counts.set_item(status, count)?;
        }
        Ok(counts)
    }

    #[getter]
    fn attempts(&self) -> u64 {
        self.0.reading.attempts
    }

    #[getter]
    fn retries(&self) -> u64 {
        self.0.reading.retries
    }

    #[getter]
    fn duration_buckets(&self) -> Vec<u64> {
        self.0.reading.duration_buckets.clone()
    }

    #[getter]
    fn duration_sum_ns(&self) -> u64 {
        self.0.reading.duration_sum_ns
    }

    #[getter]
    fn first_byte_buckets(&self) -> Vec<u64> {
        self.0.reading.first_byte_buckets.clone()
    }

    #[getter]
    fn first_byte_sum_ns(&self) -> u64 {
        self.0.reading.first_byte_sum_ns
    }

    #[getter]
    fn chunks(&self) -> u64 {
        self.0.reading.chunks
    }

    #[getter]
    fn gap_buckets(&self) -> Vec<u64> {
        self.0.reading.gap_buckets.clone()
    }

    #[getter]
    fn gap_sum_ns(&self) -> u64 {
        self.0.reading.gap_sum_ns
    }
}

/// Counters over all processes and models.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct Counters(pub(super) Slab);

#[pymethods]
impl Counters {
    #[getter]
    fn http_requests(&self) -> Vec<(&'static str, &'static str, u64)> {
        self.0.http().requests
    }

    #[getter]
    fn http_responses(&self) -> Vec<(u16, &'static str, u64)> {
        self.0.http().responses
    }

    #[getter]
    fn retries(&self) -> Vec<(&'static str, u64)> {
        RETRY_REASONS.into_iter().zip(self.0.retries()).collect()
    }

    #[getter]
    fn loop_lag(&self) -> (Vec<u64>, u64) {
        let lag = self.0.lag();
        (lag.buckets, lag.sum_ns)
    }

    #[getter]
    fn lock_waits(&self) -> (u64, u64) {
        self.0.lock_waits()
    }

    #[getter]
    fn lost(&self) -> u64 {
        self.0.ledger().lost
    }
}

/// Upper bounds of the histograms of pauses.
#[pyfunction]
fn pause_bounds_ns() -> Vec<u64> {
    PAUSE_BOUNDS_NS.to_vec()
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Transition>()?;
    module.add_class::<Explanation>()?;
    module.add_class::<TargetInfo>()?;
    module.add_class::<RequestSeries>()?;
    module.add_class::<Counters>()?;
    module.add_function(wrap_pyfunction!(pause_bounds_ns, module)?)
}
