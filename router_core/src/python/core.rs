//! The engine itself.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::{PyAssertionError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::request::{Lease, RoutedRequest};
use super::views::{Explanation, RequestSeries, TargetInfo, Transition};
use crate::policy::{self, Assignment, Balance, Parameters};
use crate::prompt::Endpoint;
use crate::region::{Found, Region};
use crate::router::{Router, Settings};
use crate::{breaker, health};

/// All state that a decision reads, and the decisions.
#[pyclass(module = "warmroute._core", frozen)]
struct Core {
    router: Arc<Router>,
    /// Open as long as the region is used: it is locked.
    region_file: Option<(File, Found)>,
}

#[pymethods]
impl Core {
    #[new]
    #[pyo3(signature = (
        *,
        region_file,
        policy,
        shadow_policy,
        cache_threshold,
        balance_abs_threshold,
        balance_rel_threshold,
        assignment_mode,
        max_idle_ns,
        max_tree_size,
        eviction_interval_ns,
        index_memory_bytes,
        hash_seed,
        any_hash_seed,
        seed,
        strict_model,
        health_failure_threshold,
        health_success_threshold,
        breaker_enabled,
        breaker_failure_threshold,
        breaker_success_threshold,
        breaker_timeout_ns,
        breaker_window_ns,
        duration_buckets_ns,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        region_file: Option<PathBuf>,
        policy: String,
        shadow_policy: Option<String>,
        cache_threshold: f64,
        balance_abs_threshold: u64,
        balance_rel_threshold: f64,
        assignment_mode: &str,
        max_idle_ns: u64,
        max_tree_size: u64,
        eviction_interval_ns: u64,
        index_memory_bytes: usize,
        hash_seed: u64,
        any_hash_seed: bool,
        seed: u64,
        strict_model: bool,
        health_failure_threshold: u32,
        health_success_threshold: u32,
        breaker_enabled: bool,
        breaker_failure_threshold: u32,
        breaker_success_threshold: u32,
        breaker_timeout_ns: u64,
        breaker_window_ns: u64,
        duration_buckets_ns: Vec<u64>,
    ) -> PyResult<Self> {
        let balance = Balance { absolute: balance_abs_threshold, relative: balance_rel_threshold };
        let unknown = || PyValueError::new_err(format!("no assignment mode is called {assignment_mode:?}"));
        let assignment = Assignment::by_name(assignment_mode).ok_or_else(unknown)?;
        let settings = Settings {
            policy,
            shadow_policy,
            policy_parameters: Parameters { cache_threshold, balance, assignment, max_idle_ns },
            max_tree_size,
            eviction_interval_ns,
            index_memory_bytes,
            hash_seed,
            seed,
            strict_model,
            health: health::Thresholds { failure: health_failure_threshold, success: health_success_threshold },
            breaker: breaker::Limits {
                enabled: breaker_enabled,
                failures: breaker_failure_threshold,
                successes: breaker_success_threshold,
                timeout_ns: breaker_timeout_ns,
                window_ns: breaker_window_ns,
            },
            duration_buckets_ns,
        };
        let Some(path) = region_file else { return Ok(Self { router: Router::new(settings)?, region_file: None }) };
        let (region, file, found) = Region::in_file(&path, 1, index_memory_bytes, seed, hash_seed, any_hash_seed)?;
        Ok(Self { router: Router::on(region, settings)?, region_file: Some((file, found)) })
    }

    /// What the region's file was: `new`, `kept`, or why it was replaced; None without a file.
    #[getter]
    fn region_found(&self) -> Option<&str> {
        self.region_file.as_ref().map(|(_, found)| match found {
            Found::New => "new",
            Found::Kept => "kept",
            Found::Replaced(reason) => reason,
        })
    }

    fn take_over(&self) -> PyResult<Vec<u16>> {
        Ok(self.router.take_over()?)
    }

    #[pyo3(signature = (text, /))]
    fn publish_registry(&self, text: &[u8]) -> PyResult<()> {
        Ok(self.router.publish_registry(text)?)
    }

    fn registry<'py>(&self, py: Python<'py>) -> PyResult<(u64, Bound<'py, PyBytes>)> {
        let (version, text) = self.router.registry()?;
        Ok((version, PyBytes::new(py, &text)))
    }

    // -- a request

    #[pyo3(signature = (path, routing_headers, body, now_ns, /))]
    fn read(&self, path: &[u8], routing_headers: &[u8], body: &[u8], now_ns: u64) -> PyResult<RoutedRequest> {
        let unrouted = || PyValueError::new_err("not a routed path");
        let endpoint = Endpoint::from_path(path).ok_or_else(unrouted)?;
        Ok(RoutedRequest(self.router.read(endpoint, routing_headers, body, now_ns)?))
    }

    #[pyo3(signature = (request, now_ns, allow_failed, /))]
    fn select(&self, request: &RoutedRequest, now_ns: u64, allow_failed: bool) -> PyResult<Option<Lease>> {
        Ok(self.router.select(&request.0, now_ns, allow_failed)?.map(Lease))
    }

    #[pyo3(signature = (path, routing_headers, body, now_ns, /))]
    fn explain(&self, path: &[u8], routing_headers: &[u8], body: &[u8], now_ns: u64) -> PyResult<Explanation> {
        let unrouted = || PyValueError::new_err("not a routed path");
        let endpoint = Endpoint::from_path(path).ok_or_else(unrouted)?;
        Ok(Explanation(self.router.explain(endpoint, routing_headers, body, now_ns)?))
    }

    #[pyo3(signature = (request, now_ns, /))]
    fn explain_request(&self, request: &RoutedRequest, now_ns: u64) -> PyResult<Explanation> {
        Ok(Explanation(self.router.explain_request(&request.0, now_ns)?))
    }

    // -- workers

    #[pyo3(signature = (models, dp_size, kv_capacity_tokens, policy, now_ns, /))]
    fn add_worker(
        &self,
        models: Vec<String>,
        dp_size: usize,
        kv_capacity_tokens: u64,
        policy: Option<&str>,
        now_ns: u64,
    ) -> PyResult<Vec<u16>> {
        let _ = now_ns;
        Ok(self.router.add_worker(&models, dp_size, kv_capacity_tokens, policy)?)
    }

    #[pyo3(signature = (head, models, kv_capacity_tokens, policy, now_ns, /))]
    fn update_worker(
        &self,
        head: u16,
        models: Vec<String>,
        kv_capacity_tokens: u64,
        policy: Option<&str>,
        now_ns: u64,
    ) -> PyResult<()> {
        let _ = now_ns;
        Ok(self.router.update_worker(head, &models, kv_capacity_tokens, policy)?)
    }

    #[pyo3(signature = (head, now_ns, /))]
    fn restart_worker(&self, head: u16, now_ns: u64) -> PyResult<()> {
        let _ = now_ns;
        Ok(self.router.restart_worker(head)?)
    }

    #[pyo3(signature = (head, /))]
    fn drain_worker(&self, head: u16) -> PyResult<()> {
        Ok(self.router.drain_worker(head)?)
    }

    #[pyo3(signature = (head, /))]
    fn remove_worker(&self, head: u16) -> PyResult<()> {
        Ok(self.router.remove_worker(head)?)
    }

    #[pyo3(signature = (head, ok, now_ns, /))]
    fn observe_probe<'py>(&self, py: Python<'py>, head: u16, ok: bool, now_ns: u64) -> PyResult<Bound<'py, PyTuple>> {
        let _ = now_ns;
        PyTuple::new(py, self.router.observe_probe(head, ok)?.into_iter().map(Transition))
    }

    fn take_probe_requests(&self) -> PyResult<Vec<u16>> {
        Ok(self.router.take_probe_requests()?)
    }

    #[pyo3(signature = (now_ns, max_buckets, /))]
    fn evict(&self, now_ns: u64, max_buckets: usize) -> PyResult<usize> {
        Ok(self.router.evict(now_ns, max_buckets)?)
    }

    // -- views

    #[pyo3(signature = (slot, /))]
    fn load(&self, slot: u16) -> PyResult<u64> {
        Ok(self.router.load(slot)?)
    }

    #[pyo3(signature = (slot, /))]
    fn target(&self, slot: u16) -> PyResult<TargetInfo> {
        Ok(TargetInfo(self.router.target(slot)?))
    }

    fn targets(&self) -> PyResult<Vec<TargetInfo>> {
        Ok(self.router.targets()?.into_iter().map(TargetInfo).collect())
    }

    fn index_entries(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        Ok(py.detach(|| self.router.index_entries())?)
    }

    #[pyo3(signature = (model, /))]
    fn policy_of_model(&self, model: &str) -> PyResult<&'static str> {
        Ok(self.router.policy_of_model(model)?)
    }

    fn readiness(&self) -> PyResult<(usize, usize)> {
        Ok(self.router.readiness()?)
    }

    fn series(&self) -> Vec<RequestSeries> {
        self.router.series().into_iter().map(RequestSeries).collect()
    }

    fn shadow_decisions(&self) -> (u64, u64) {
        self.router.shadow_decisions()
    }

    fn check_integrity(&self) -> PyResult<()> {
        self.router.check_integrity().map_err(PyAssertionError::new_err)
    }
}

/// The policies there are.
#[pyfunction]
fn policy_names() -> Vec<&'static str> {
    policy::names().collect()
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Core>()?;
    module.add_function(wrap_pyfunction!(policy_names, module)?)
}
