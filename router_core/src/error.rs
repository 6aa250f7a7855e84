//! What the core refuses, and whose fault it is.

use std::fmt;

/// Why a call on the router came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The client named a model that no worker serves.
    UnknownModel(String),
    /// The region's lock was not had in time.
    RegionBusy,
    /// Fixed capacity is used up: slots of targets, or names of models.
    Full(&'static str),
    /// The caller's mistake.
    Invalid(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownModel(model) => write!(f, "no worker serves the model {model:?}"),
            Self::RegionBusy => f.write_str("the region's lock was not had in time"),
            Self::Full(what) => write!(f, "no {what} is left"),
            Self::Invalid(message) => f.write_str(message),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    pub(crate) fn no_worker(slot: u16) -> Self {
        Self::Invalid(format!("no worker has its head in slot {slot}"))
    }
}
