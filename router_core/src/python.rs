//! The binding: the only file (with its submodules in `python/`) that names pyo3.

use pyo3::prelude::*;

mod http1;

/// `warmroute._core`.
#[pymodule(gil_used = true)]
mod _core {
    use super::*;

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        http1::register(m)
    }
}
