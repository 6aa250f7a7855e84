//! What the core refuses, as exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyLookupError, PyMemoryError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::prompt;

create_exception!(
    warmroute._core,
    BadRequest,
    PyValueError,
    "The client's body cannot be routed. `args == (message, param_or_None)`."
);
create_exception!(warmroute._core, UnknownModel, PyLookupError, "No worker serves that model. `args == (model,)`.");
create_exception!(warmroute._core, RegionBusy, PyTimeoutError, "The region's lock was not had in time.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::UnknownModel(model) => UnknownModel::new_err((model,)),
            Error::RegionBusy => RegionBusy::new_err((message,)),
            Error::Full(_) => PyMemoryError::new_err(message),
            Error::Invalid(_) => PyValueError::new_err(message),
        }
    }
}

impl From<prompt::BadRequest> for PyErr {
    fn from(error: prompt::BadRequest) -> Self {
        BadRequest::new_err((error.message, error.param))
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("BadRequest", py.get_type::<BadRequest>())?;
    module.add("UnknownModel", py.get_type::<UnknownModel>())?;
    module.add("RegionBusy", py.get_type::<RegionBusy>())
}
