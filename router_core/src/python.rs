//! The binding: the only file (with its submodules in `python/`) that names pyo3. Each method converts, calls, maps.

use std::cell::Cell;

use pyo3::exceptions::PyOverflowError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

mod core;
mod enums;
mod errors;
mod http1;
mod kv_events;
mod request;
mod routing;
mod views;

/// A time or a span. Python's integers of this size are read twice as fast as signed numbers.
struct Nanoseconds(u64);

impl<'a, 'py> FromPyObject<'a, 'py> for Nanoseconds {
    type Error = PyErr;

    fn extract(number: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let ns: i64 = number.extract()?;
        u64::try_from(ns).map(Self).map_err(|_| PyOverflowError::new_err("a time cannot be negative"))
    }
}

/// Bytes for Python, put together in memory that is used again: an allocation less for each message.
fn written<'py>(py: Python<'py>, write: impl FnOnce(&mut Vec<u8>)) -> Bound<'py, PyBytes> {
    thread_local!(static MEMORY: Cell<Vec<u8>> = const { Cell::new(Vec::new()) });
    let mut memory = MEMORY.take();
    memory.clear();
    write(&mut memory);
    let bytes = PyBytes::new(py, &memory);
    if memory.capacity() <= KEPT_BYTES {
        MEMORY.set(memory);
    }
    bytes
}

/// What a long answer needed is not kept.
const KEPT_BYTES: usize = 64 * 1024;

/// `warmroute._core`.
#[pymodule(gil_used = true)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    errors::register(module)?;
    enums::register(module)?;
    request::register(module)?;
    views::register(module)?;
    core::register(module)?;
    routing::register(module)?;
    http1::register(module)?;
    // pyo3 keeps a list of what it adds; the stub says what is public.
    module.delattr("__all__")
}
