//! `warmroute_worker._native`: the worker's Rust, as Python sees it.
#![cfg(feature = "python")]

mod comm;
mod decoder;
mod end;
mod kernels;
mod memory;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<comm::PyRegion>()?;
    module.add_class::<comm::PyGroup>()?;
    module.add("CollectiveError", module.py().get_type::<comm::CollectiveError>())?;
    decoder::add_to(module)?;
    kernels::add_to(module)
}
