//! The binding: the only file (with its submodules in `python/`) that names pyo3.

use pyo3::prelude::*;

/// `warmroute._core`.
#[pymodule(gil_used = true)]
mod _core {}
