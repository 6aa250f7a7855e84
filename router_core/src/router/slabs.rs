//! Counters of all processes: this one's own slab and those it watches.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};

use super::Router;
use crate::metrics::{Ledger, Slab, TargetReading};

impl Router {
    /// Another process counts in `slab` from now on; the numbers of this router are those of all of its processes.
    pub fn watch_slab(&self, process: usize, slab: Slab) {
        self.others().insert(process, slab);
    }

    /// That process is dead: what it counted is counted here from now on, what it had in flight is lost.
    pub fn retire_slab(&self, process: usize) {
        if let Some(slab) = self.others().remove(&process) {
            self.slab.fold(&slab, true);
        }
    }

    /// Everything that was counted, at about one time.
    pub fn counted(&self) -> Slab {
        let sum = Slab::new(self.settings.duration_buckets_ns.clone());
        let others = self.others();
        others.values().chain([&self.slab]).for_each(|slab| sum.fold(slab, false));
        sum
    }

    /// The requests of each process, this one's first.
    pub fn ledgers(&self) -> Vec<Ledger> {
        let others = self.others();
        [&self.slab].into_iter().chain(others.values()).map(Slab::ledger).collect()
    }

    /// When the event loop of that process turned last; 0: never, None: it is not watched.
    pub fn turned_ns(&self, process: usize) -> Option<u64> {
        self.others().get(&process).map(Slab::turned_ns)
    }

    /// The event loop of this process turned, so much later than it should have.
    pub fn turned(&self, lag_ns: u64, now_ns: u64) {
        self.slab.turned(lag_ns, now_ns);
    }

    /// This process answered a request that is not routed, or refused one unread.
    pub fn count_http(&self, method: &str, path: &str, status: u16) {
        self.slab.count_http(method, path, status);
    }

    /// Names that counters of other processes may be of.
    pub fn learn_models(&self, models: &[String]) {
        self.names.learn(models);
    }

    /// Upper bounds of the histograms of durations.
    pub fn duration_buckets_ns(&self) -> &[u64] {
        &self.settings.duration_buckets_ns
    }

    pub(super) fn target_counters(&self, slot: u16, incarnation: u64) -> TargetReading {
        let mut sum = self.slab.target(slot, incarnation);
        self.others().values().for_each(|slab| sum += slab.target(slot, incarnation));
        sum
    }

    fn others(&self) -> MutexGuard<'_, BTreeMap<usize, Slab>> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
