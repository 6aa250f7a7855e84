//! The binding: the only file (with its submodules in `python/`) that names pyo3. Each method converts, calls, maps.

use pyo3::prelude::*;

mod core;
mod enums;
mod errors;
mod http1;
mod request;
mod views;

/// `warmroute._core`.
#[pymodule(gil_used = true)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    errors::register(module)?;
    enums::register(module)?;
    request::register(module)?;
    views::register(module)?;
    core::register(module)?;
    http1::register(module)
}
