//! What stands in the region and the slab, read: for the admin API, the metrics, and tests.

use super::Router;
use crate::error::Error;
use crate::metrics::{OTHER_MODEL, SeriesReading, TargetReading};
use crate::model::{ANY, MAX_MODELS};
use crate::policy::Candidates;
use crate::region::MAX_TARGETS;
use crate::region::State;
use crate::target::Field;

/// One target as it stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TargetView {
    /// Its slot.
    pub slot: u16,
    /// Its worker's first slot.
    pub head: u16,
    /// Which of its worker's ranks it is.
    pub rank: u16,
    /// Tells the workers that have or had this slot apart.
    pub incarnation: u64,
    /// Of the worker: pending, ready, unhealthy.
    pub health: &'static str,
    /// Of the worker: closed, open, half_open.
    pub breaker: &'static str,
    /// Whether the worker was told to stop.
    pub draining: bool,
    /// Whether it can get a request now.
    pub available: bool,
    /// Requests in flight.
    pub load: u64,
    /// Predicted uncached prompt tokens of the requests in flight.
    pub outstanding_tokens: u64,
    /// As the breaker counts them.
    pub consecutive_failures: u32,
    /// As the breaker counts them.
    pub consecutive_successes: u32,
    /// Of its cache; 0: unknown.
    pub kv_capacity_tokens: u64,
    /// Routing keys that were given to it, by the policy that keeps them.
    pub sticky_keys: u64,
    /// Bytes of prompt text that the index credits it with.
    pub index_characters: u64,
    /// Its counters.
    pub counters: TargetReading,
}

/// A series of the slab with its model's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSeries {
    /// The name, or [`OTHER_MODEL`].
    pub model: String,
    /// The counters.
    pub reading: SeriesReading,
}

impl Router {
    /// Requests in flight at a target.
    ///
    /// # Errors
    /// [`Error::Invalid`] when no worker has the slot.
    pub fn load(&self, slot: u16) -> Result<u64, Error> {
        let mut guard = self.lock()?;
        let targets = guard.state().targets;
        if targets.is_taken(slot) { Ok(targets.load(slot)) } else { Err(no_target(slot)) }
    }

    /// One target as it stands now.
    ///
    /// # Errors
    /// [`Error::Invalid`] when no worker has the slot.
    pub fn target(&self, slot: u16) -> Result<TargetView, Error> {
        let mut guard = self.lock()?;
        let state = guard.state();
        if state.targets.is_taken(slot) { Ok(self.view(&state, slot)) } else { Err(no_target(slot)) }
    }

    /// All targets as they stand now, by slot.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn targets(&self) -> Result<Vec<TargetView>, Error> {
        let mut guard = self.lock()?;
        let state = guard.state();
        Ok(state.targets.slots().map(|slot| self.view(&state, slot)).collect())
    }

    /// Workers that can get a request now, and workers.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn readiness(&self) -> Result<(usize, usize), Error> {
        let mut guard = self.lock()?;
        let state = guard.state();
        let heads = state.targets.heads();
        let count = |(available, all), head| (available + usize::from(self.is_available(&state, head)), all + 1);
        Ok(heads.fold((0, 0), count))
    }

    /// Blocks of the prefix index that each target holds, by slot. Walks the whole index, a piece at a time, so that decisions
    /// wait for no more than a piece.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn index_entries(&self) -> Result<Vec<u64>, Error> {
        let mut counts = vec![0; MAX_TARGETS];
        let mut first = 0;
        loop {
            let mut guard = self.lock()?;
            let state = guard.state();
            if first >= state.index.buckets() {
                counts.truncate(state.targets.slot_end());
                return Ok(counts);
            }
            state.index.count_blocks(first, first + BUCKETS_AT_ONCE, &mut counts);
            first += BUCKETS_AT_ONCE;
        }
    }

    /// The series in which something was counted.
    pub fn series(&self) -> Vec<NamedSeries> {
        let name = |hash| self.names.text(hash);
        let named = |reading: SeriesReading| NamedSeries {
            model: reading.model.and_then(name).unwrap_or_else(|| OTHER_MODEL.to_owned()),
            reading,
        };
        self.counted().series().into_iter().map(named).collect()
    }

    /// The policy by which requests for a model are routed now.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn policy_of_model(&self, name: &str) -> Result<&'static str, Error> {
        let mut guard = self.lock()?;
        let state = guard.state();
        let model = state.models.find(self.names.hash(name)).unwrap_or(ANY);
        Ok(self.policies.name(super::policy_word(&state, model)))
    }

    /// Checks what must hold whenever nobody has the region's lock.
    ///
    /// # Errors
    /// Names the first broken invariant.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.region.check_header()?;
        let mut guard = self.lock().map_err(|error| error.to_string())?;
        let state = guard.state();
        state.targets.check_integrity()?;
        state.sticky_keys.check_integrity(&state.targets)?;
        state.index.check_integrity()?;
        self.check_availability(&state)
    }

    fn view(&self, state: &State<'_>, slot: u16) -> TargetView {
        let targets = &state.targets;
        let head = targets.head(slot);
        let (incarnation, breaker) = (targets.incarnation(slot), targets.breaker(head));
        TargetView {
            slot,
            head,
            rank: targets.rank(slot),
            incarnation,
            health: targets.health(head).name(),
            breaker: breaker.name(),
            draining: targets.draining(head),
            available: self.is_available(state, head),
            load: targets.load(slot),
            outstanding_tokens: targets.outstanding_tokens(slot),
            consecutive_failures: breaker.consecutive_failures(),
            consecutive_successes: breaker.consecutive_successes(),
            kv_capacity_tokens: targets.kv_capacity_tokens(slot),
            sticky_keys: targets.get(Field::StickyKeys, slot),
            index_characters: state.index.characters(slot),
            counters: self.target_counters(slot, incarnation),
        }
    }

    /// The bitsets say what health, breaker, permits, draining and models say.
    fn check_availability(&self, state: &State<'_>) -> Result<(), String> {
        let targets = &state.targets;
        for model in 0..=ANY {
            let available = Candidates::new(state.models.available(model), MAX_TARGETS);
            for slot in 0..MAX_TARGETS as u16 {
                let serves = model == ANY || targets.get(Field::Models, slot) & 1 << model != 0;
                let expected = targets.is_taken(slot) && serves && self.is_available(state, targets.head(slot));
                if available.contains(slot) != expected {
                    return Err(format!("slot {slot}: available for model {model} is not {expected}"));
                }
            }
        }
        let count = |model: usize| {
            let serves = |&head: &u16| targets.get(Field::Models, head) & 1 << model != 0;
            targets.heads().filter(serves).count() as u64
        };
        match (0..MAX_MODELS).find(|&model| state.models.served_by(model) != count(model)) {
            Some(model) => Err(format!("model {model}: {} workers counted", state.models.served_by(model))),
            None => Ok(()),
        }
    }
}

/// About 10 us of the lock.
const BUCKETS_AT_ONCE: usize = 1 << 10;

fn no_target(slot: u16) -> Error {
    Error::Invalid(format!("no worker has slot {slot}"))
}
