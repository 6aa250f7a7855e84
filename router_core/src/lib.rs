//! The decision engine of warmroute: which worker holds the warmest KV cache for a prompt.
//!
//! Pure and deterministic: time and seeds are arguments, nothing here reads a clock, opens a socket or writes a log.

pub mod http1;
pub mod prefix_index;
pub mod prompt;
#[cfg(feature = "python")]
mod python;
