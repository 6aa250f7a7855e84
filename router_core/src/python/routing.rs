//! What a data plane asks of the engine for each request.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::Nanoseconds;
use super::core::Core;
use super::http1::{HeadParser, RequestHead};
use super::request::{Lease, RoutedRequest};
use super::views::Explanation;
use crate::prompt::Endpoint;

/// Head; whether the body is all there; what comes behind it, or else behind the head; whether the connection can be used again; whether
/// it is for a worker and of somebody who may ask one. Then the request, or why there is none, and its lease, as `route` gives them; the
/// pool of the worker's connections, and the two parts of what goes to it.
type Begun<'py> = (
    Bound<'py, RequestHead>,
    bool,
    Bound<'py, PyBytes>,
    bool,
    bool,
    Option<Py<PyAny>>,
    Option<Lease>,
    Option<Py<PyAny>>,
    Option<Bound<'py, PyBytes>>,
    Option<Bound<'py, PyBytes>>,
);

/// What requests are sent to workers with, by slot. Of one incarnation it never changes.
#[pyclass(module = "warmroute._core", frozen)]
pub(super) struct Upstreams(Mutex<Vec<Option<Upstream>>>);

struct Upstream {
    incarnation: u64,
    host: Vec<u8>,
    authorization: Option<Vec<u8>>,
    pool: Py<PyAny>,
}

impl Upstreams {
    fn all(&self) -> MutexGuard<'_, Vec<Option<Upstream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Upstreams {
    #[new]
    fn new() -> Self {
        Self(Mutex::default())
    }

    #[pyo3(signature = (slot, incarnation, host, authorization, pool, /))]
    fn put(&self, slot: u16, incarnation: u64, host: Vec<u8>, authorization: Option<Vec<u8>>, pool: Py<PyAny>) {
        let mut all = self.all();
        if all.len() <= usize::from(slot) {
            all.resize_with(usize::from(slot) + 1, || None);
        }
        all[usize::from(slot)] = Some(Upstream { incarnation, host, authorization, pool });
    }

    #[pyo3(signature = (pool, /))]
    fn forget(&self, pool: &Bound<'_, PyAny>) {
        for place in self.all().iter_mut() {
            if place.as_ref().is_some_and(|upstream| upstream.pool.is(pool)) {
                *place = None;
            }
        }
    }
}

type Routed = (RoutedRequest, Option<Lease>, u16, u64);

#[pymethods]
impl Core {
    #[pyo3(signature = (parser, upstreams, data, routes, now_ns, /))]
    fn begin<'py>(
        &self,
        py: Python<'py>,
        parser: &HeadParser,
        upstreams: &Upstreams,
        data: &[u8],
        routes: bool,
        now_ns: Nanoseconds,
    ) -> PyResult<Option<Begun<'py>>> {
        let Some((head, end)) = parser.begin(data)? else { return Ok(None) };
        let keep_alive = head.head.keep_alive();
        let is_for_worker = head.is_authorized && head.head.route().is_routed();
        let (mut request, mut lease, mut pool, mut first, mut second) = (None, None, None, None, None);
        if routes && is_for_worker && end.is_some() {
            match self.route(&head, data, now_ns) {
                Ok(routed) => {
                    request = Some(Bound::new(py, routed.0)?.into_any().unbind());
                    lease = routed.1;
                }
                // With a head the client can be told what its request was called.
                Err(refusal) => request = Some(refusal.into_value(py).into_any()),
            }
        }
        if let Some(lease) = &lease {
            let (slot, incarnation) = lease.place();
            let all = upstreams.all();
            if let Some(Some(upstream)) = all.get(usize::from(slot))
                && upstream.incarnation == incarnation
            {
                let (host, authorization) = (&upstream.host, upstream.authorization.as_deref());
                let message = lease.to_worker(py, &head, host, authorization, data);
                (pool, first, second) = (Some(upstream.pool.clone_ref(py)), Some(message.0), message.1);
            }
        }
        let rest = PyBytes::new(py, &data[end.unwrap_or_else(|| head.head.size())..]);
        let head = Bound::new(py, head)?;
        Ok(Some((head, end.is_some(), rest, keep_alive, is_for_worker, request, lease, pool, first, second)))
    }

    #[pyo3(signature = (path, routing_headers, body, now_ns, /))]
    fn read(&self, path: &[u8], routing_headers: &[u8], body: &[u8], now_ns: u64) -> PyResult<RoutedRequest> {
        let unrouted = || PyValueError::new_err("not a routed path");
        let endpoint = Endpoint::from_path(path).ok_or_else(unrouted)?;
        Ok(RoutedRequest(self.router.read(endpoint, routing_headers, body, now_ns)?))
    }

    /// As `read`, of bytes that begin with a head that was parsed here.
    #[pyo3(signature = (head, data, now_ns, /))]
    fn read_request(&self, head: &RequestHead, data: &[u8], now_ns: Nanoseconds) -> PyResult<RoutedRequest> {
        let unrouted = || PyValueError::new_err("not a routed path");
        let endpoint = head.head.route().endpoint().ok_or_else(unrouted)?;
        let body = head.head.body_in(data);
        Ok(RoutedRequest(self.router.read(endpoint, &head.head.routing_headers(), body, now_ns.0)?))
    }

    /// `read_request`, and `select` if that gives a lease at once, with its slot and incarnation; if not, ask it again what the matter is.
    #[pyo3(signature = (head, data, now_ns, /))]
    fn route(&self, head: &RequestHead, data: &[u8], now_ns: Nanoseconds) -> PyResult<Routed> {
        let accepted_ns = now_ns.0;
        let request = self.read_request(head, data, now_ns)?;
        let lease = self.router.select(&request.0, accepted_ns, false).ok().flatten().map(Lease);
        let (slot, incarnation) = lease.as_ref().map(Lease::place).unwrap_or_default();
        Ok((request, lease, slot, incarnation))
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
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Upstreams>()
}
