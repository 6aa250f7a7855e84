//! Enums, as classes whose attributes are the members.

use pyo3::prelude::*;

use crate::outcome;
use crate::prompt;

/// Which routed path.
#[pyclass(module = "warmroute._core", frozen, eq, hash)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::upper_case_acronyms)]
pub(super) enum Endpoint {
    CHAT,
    COMPLETIONS,
    GENERATE,
}

impl From<prompt::Endpoint> for Endpoint {
    fn from(endpoint: prompt::Endpoint) -> Self {
        match endpoint {
            prompt::Endpoint::Chat => Self::CHAT,
            prompt::Endpoint::Completions => Self::COMPLETIONS,
            prompt::Endpoint::Generate => Self::GENERATE,
        }
    }
}

/// How one attempt at a target ended.
#[pyclass(module = "warmroute._core", frozen, eq, hash, from_py_object)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[allow(clippy::upper_case_acronyms, non_camel_case_types)]
pub(super) enum OutcomeKind {
    ANSWERED,
    CONNECT_FAILED,
    NO_ANSWER,
    BROKEN_STREAM,
    CANCELLED,
}

impl From<OutcomeKind> for outcome::OutcomeKind {
    fn from(kind: OutcomeKind) -> Self {
        match kind {
            OutcomeKind::ANSWERED => Self::Answered,
            OutcomeKind::CONNECT_FAILED => Self::ConnectFailed,
            OutcomeKind::NO_ANSWER => Self::NoAnswer,
            OutcomeKind::BROKEN_STREAM => Self::BrokenStream,
            OutcomeKind::CANCELLED => Self::Cancelled,
        }
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Endpoint>()?;
    module.add_class::<OutcomeKind>()
}
