//! The decision engine of warmroute: which worker holds the warmest KV cache for a prompt.
//!
//! Pure and deterministic: time and seeds are arguments, nothing here reads a clock, opens a socket or writes a log.

pub mod admission;
pub mod breaker;
pub mod error;
pub mod health;
pub mod http1;
pub mod kv_mirror;
mod mapping;
pub mod metrics;
pub mod model;
pub mod outcome;
pub mod policy;
pub mod prefix_index;
pub mod prompt;
#[cfg(feature = "python")]
mod python;
pub mod random;
pub mod region;
pub mod router;
pub mod speed;
pub mod sticky_keys;
pub mod target;
