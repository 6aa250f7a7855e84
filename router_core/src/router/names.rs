//! Names of models: as hashes in the region and the slab, as text here, for whoever reads the counters.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use xxhash_rust::xxh3::xxh3_64_with_seed;

pub(super) struct Names {
    seed: u64,
    names: Mutex<HashMap<u64, String>>,
}

impl Names {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, names: Mutex::new(HashMap::new()) }
    }

    /// The hash that stands for a name; never 0, which stands for none.
    pub(super) fn hash(&self, name: &str) -> u64 {
        xxh3_64_with_seed(name.as_bytes(), self.seed).max(1)
    }

    /// The hashes of names, whose text is kept from now on: counters outlive workers.
    pub(super) fn learn(&self, models: &[String]) -> Vec<u64> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let learn = |name: &String| {
            let hash = self.hash(name);
            names.entry(hash).or_insert_with(|| name.clone());
            hash
        };
        models.iter().map(learn).collect()
    }

    /// The text of a name that was learned.
    pub(super) fn text(&self, hash: u64) -> Option<String> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).get(&hash).cloned()
    }
}
