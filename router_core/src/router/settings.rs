//! What a router is told when it is made. There are no defaults here: `config.py` has them.

use crate::admission;
use crate::breaker;
use crate::error::Error;
use crate::health;
use crate::policy;

/// Failures are counted in 16 bits per slice of the breaker's window.
const MAX_BREAKER_FAILURES: u32 = u16::MAX as u32;

/// What a router is told when it is made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// One of [`policy::names`].
    pub policy: String,
    /// Another of them, which decides everything once more without effect.
    pub shadow_policy: Option<String>,
    /// For the policies.
    pub policy_parameters: policy::Parameters,
    /// Bytes of prompt text that a target is credited with after an eviction.
    pub max_tree_size: u64,
    /// From eviction to eviction: in between, a target may be credited with more than `max_tree_size`.
    pub eviction_interval_ns: u64,
    /// Of the prefix index, about.
    pub index_memory_bytes: usize,
    /// Of the keys of prompts, when the region is made. Whoever knows it can make prompts collide.
    pub hash_seed: u64,
    /// Of every random choice.
    pub seed: u64,
    /// Whether a fleet of one model refuses other names.
    pub strict_model: bool,
    /// Of probes.
    pub health: health::Thresholds,
    /// Of attempts.
    pub breaker: breaker::Limits,
    /// Of requests, over all processes.
    pub admission: admission::Limits,
    /// Upper bounds of the histograms' buckets, rising.
    pub duration_buckets_ns: Vec<u64>,
}

impl Settings {
    pub(super) fn validate(&self) -> Result<(), Error> {
        let parameters = &self.policy_parameters;
        let rules = [
            (parameters.cache_threshold.is_finite(), "cache_threshold must be a number"),
            (parameters.balance.relative.is_finite(), "balance_rel_threshold must be a number"),
            (self.max_tree_size > 0, "max_tree_size must be at least 1"),
            (self.health.failure > 0 && self.health.success > 0, "health thresholds must be at least 1"),
            (self.breaker.failures > 0 && self.breaker.successes > 0, "breaker thresholds must be at least 1"),
            (self.breaker.failures <= MAX_BREAKER_FAILURES, "breaker_failure_threshold must be at most 65535"),
            (self.admission.per_second >= 0.0, "rate_limit must be 0 or more"),
            (self.breaker.window_ns > 0, "breaker_window_ns must be at least 1"),
            (self.duration_buckets_ns.is_sorted_by(|low, high| low < high), "duration_buckets_ns must rise"),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, message)) => Err(Error::Invalid(message.to_owned())),
            None => Ok(()),
        }
    }
}
