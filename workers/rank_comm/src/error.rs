//! Why a collective did not take place.

use std::fmt;

/// What a rank gets instead of the result. After any of these the region is dead: every rank gets one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommError {
    /// Somebody has called [`crate::Region::abort`]; its words.
    Aborted(String),
    /// Others did not come within the time allowed.
    TimedOut(String),
    /// Another rank is at another operation.
    Mismatch(String),
    /// The arguments cannot be right.
    Invalid(String),
}

impl fmt::Display for CommError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Aborted(text) | Self::TimedOut(text) | Self::Mismatch(text) | Self::Invalid(text)) = self;
        formatter.write_str(text)
    }
}

impl std::error::Error for CommError {}
