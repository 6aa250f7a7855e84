//! The engine itself.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyAssertionError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::views::{Counters, RequestSeries, TargetInfo, Transition};
use crate::admission::{Entry, Limits, Turn};
use crate::metrics::{Ledger, Slab};
use crate::policy::{self, Assignment, Balance, Parameters};
use crate::region::{Found, Region};
use crate::router::{Router, Settings};
use crate::{breaker, health};

/// All state that a decision reads, and the decisions.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct Core {
    pub(super) router: Arc<Router>,
    /// Open as long as the region is used: a named one is locked.
    region_fd: Option<i32>,
    slab_fd: Option<i32>,
    found: Option<Found>,
    /// Open as long as they are used: a region's file is locked, and children are given the descriptors.
    files: Mutex<Vec<File>>,
}

#[pymethods]
impl Core {
    #[new]
    #[pyo3(signature = (
        *,
        region_file,
        region_fd,
        slab_fd,
        processes,
        process,
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
        max_concurrent_requests,
        queue_size,
        requests_per_second,
        duration_buckets_ns,
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        region_file: Option<PathBuf>,
        region_fd: Option<i32>,
        slab_fd: Option<i32>,
        processes: usize,
        process: usize,
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
        max_concurrent_requests: u64,
        queue_size: u64,
        requests_per_second: f64,
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
            admission: Limits {
                concurrent: max_concurrent_requests,
                queue: queue_size,
                per_second: requests_per_second,
            },
            duration_buckets_ns,
        };
        let mut files = Vec::new();
        let mut keep = |file: File| {
            let fd = file.as_raw_fd();
            files.push(file);
            Some(fd)
        };
        let (region, region_fd, found) = match (region_fd, region_file) {
            (Some(fd), _) => {
                let file = inherited(fd)?;
                let region = Region::attach(&file, processes, index_memory_bytes, process)?;
                (region, Some(fd), None)
            }
            (None, Some(path)) => {
                let (region, file, found) =
                    Region::in_file(&path, processes, index_memory_bytes, seed, hash_seed, any_hash_seed)?;
                (region, keep(file), Some(found))
            }
            (None, None) if processes > 1 => {
                let (region, file) = Region::shared(processes, index_memory_bytes, seed, hash_seed)?;
                (region, keep(file), None)
            }
            (None, None) => (Region::anonymous(index_memory_bytes, seed, hash_seed), None, None),
        };
        let bounds_ns = settings.duration_buckets_ns.clone();
        let (slab, slab_fd) = match slab_fd {
            Some(fd) => (Slab::attach(bounds_ns, &inherited(fd)?)?, Some(fd)),
            None if processes > 1 => {
                let (slab, file) = Slab::shared(bounds_ns)?;
                (slab, keep(file))
            }
            None => (Slab::new(bounds_ns), None),
        };
        Ok(Self { router: Router::on(region, slab, settings)?, region_fd, slab_fd, found, files: Mutex::new(files) })
    }

    /// What other processes need to attach: the descriptor of the region; None: it is this process's alone.
    #[getter]
    fn region_fd(&self) -> Option<i32> {
        self.region_fd
    }

    /// Likewise of this process's own slab.
    #[getter]
    fn slab_fd(&self) -> Option<i32> {
        self.slab_fd
    }

    /// What the region's file was: `new`, `kept`, or why it was replaced; None without a file.
    #[getter]
    fn region_found(&self) -> Option<&str> {
        self.found.as_ref().map(|found| match found {
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

    #[pyo3(signature = (slot, kv_capacity_tokens, /))]
    fn set_kv_capacity(&self, slot: u16, kv_capacity_tokens: u64) -> PyResult<()> {
        Ok(self.router.set_kv_capacity(slot, kv_capacity_tokens)?)
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
        self.router.counted().shadow_decisions()
    }

    fn counters(&self) -> Counters {
        Counters(self.router.counted())
    }

    fn ledgers(&self) -> Vec<(u64, u64, u64, u64)> {
        let tuple = |ledger: Ledger| (ledger.accepted, ledger.answered, ledger.in_flight, ledger.lost);
        self.router.ledgers().into_iter().map(tuple).collect()
    }

    // -- other processes

    /// A slab for a process that is about to be started; its descriptor, for the child.
    #[cfg(target_os = "linux")]
    #[pyo3(signature = (process, /))]
    fn make_slab(&self, process: usize) -> PyResult<i32> {
        let (slab, file) = Slab::shared(self.router.duration_buckets_ns().to_vec())?;
        self.router.watch_slab(process, slab);
        Ok(self.keep(file))
    }

    #[pyo3(signature = (process, fd, /))]
    fn watch_slab(&self, process: usize, fd: i32) -> PyResult<()> {
        let slab = Slab::attach(self.router.duration_buckets_ns().to_vec(), &inherited(fd)?)?;
        self.router.watch_slab(process, slab);
        Ok(())
    }

    #[pyo3(signature = (process, fd, /))]
    fn retire_process(&self, process: usize, fd: i32) -> PyResult<()> {
        self.router.clear_process(process)?;
        self.router.retire_slab(process);
        self.files().retain(|file| file.as_raw_fd() != fd);
        Ok(())
    }

    #[pyo3(signature = (process, /))]
    fn turned_ns(&self, process: usize) -> Option<u64> {
        self.router.turned_ns(process)
    }

    #[pyo3(signature = (models, /))]
    fn learn_models(&self, models: Vec<String>) {
        self.router.learn_models(&models);
    }

    #[pyo3(signature = (lag_ns, now_ns, /))]
    fn turned(&self, lag_ns: u64, now_ns: u64) {
        self.router.turned(lag_ns, now_ns);
    }

    #[pyo3(signature = (method, path, status, /))]
    fn count_http(&self, method: &str, path: &str, status: u16) {
        self.router.count_http(method, path, status);
    }

    // -- admission

    #[pyo3(signature = (now_ns, /))]
    fn enter(&self, now_ns: u64) -> PyResult<Option<bool>> {
        Ok(match self.router.enter(now_ns)? {
            Entry::Runs => Some(true),
            Entry::Waits => Some(false),
            Entry::Refused => None,
        })
    }

    #[pyo3(signature = (now_ns, /))]
    fn next_turn(&self, now_ns: u64) -> PyResult<i64> {
        Ok(match self.router.next_turn(now_ns)? {
            Turn::Now => 0,
            Turn::After(ns) => ns.max(1) as i64,
            Turn::AfterAnother => -1,
        })
    }

    fn leave(&self) -> PyResult<bool> {
        Ok(self.router.leave()?)
    }

    #[pyo3(signature = (refused, /))]
    fn withdraw(&self, refused: bool) -> PyResult<()> {
        Ok(self.router.withdraw(refused)?)
    }

    fn admission(&self) -> PyResult<(u64, u64, u64, u64)> {
        let counts = self.router.admission()?;
        Ok((counts.running, counts.waiting, counts.let_in, counts.rejected))
    }

    fn check_integrity(&self) -> PyResult<()> {
        self.router.check_integrity().map_err(PyAssertionError::new_err)
    }
}

impl Core {
    fn files(&self) -> MutexGuard<'_, Vec<File>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, file: File) -> i32 {
        let fd = file.as_raw_fd();
        self.files().push(file);
        fd
    }
}

/// What another process left open for this one.
fn inherited(fd: i32) -> io::Result<File> {
    File::options().read(true).write(true).open(format!("/proc/self/fd/{fd}"))
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
