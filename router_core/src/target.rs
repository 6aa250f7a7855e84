//! What is known of each target: a record for each slot, and a column of the loads, which policies look through as a whole.
//!
//! A decision reads and writes most of one target's fields and one field of all: a column for each field, as this was at first,
//! costs 20 cache misses for a target that was not the last one (measured: 0.9 us of 2.5 with 1,024 targets in turn).
//!
//! A target is one dp rank of a worker. A worker's slots are contiguous, and what is said of the worker as a whole (health,
//! breaker, draining) stands in its first slot, the head. A slot is free iff its `Ranks` is 0. Loads, outstanding tokens and
//! permits are kept per process, each process writing its own columns, so that those of a dead process can be zeroed; their
//! totals are kept beside them for whoever only reads.

mod learned;

use crate::breaker::Breaker;
use crate::health::Health;
use crate::region::MAX_TARGETS;
use crate::speed;

const CONTROL_WORDS: usize = 8;
const SLOT_END: usize = 0;
const WAKE_NS: usize = 1;
const EVICTED_NS: usize = 2;

/// Fields that are the same in every process. What every decision needs stands first.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Field {
    /// Totals of what each process counts for itself; see also [`Field::Load`].
    OutstandingTokens,
    HeldTokens,
    Permits,
    /// Slots of the worker that has this one; 0: the slot is free.
    Ranks,
    /// The worker's first slot.
    Head,
    /// Counts the workers that had this slot and left it, twice; never reset.
    Incarnation,
    /// Bits of the models that it serves.
    Models,
    /// The model that it names first.
    Primary,
    /// Per rank; 0: unknown.
    KvCapacityTokens,
    Health,
    Breaker0,
    Breaker1,
    Breaker2,
    Breaker3,
    Draining,
    /// An attempt failed in a way that asks for a probe now.
    ProbeWanted,
    /// Text and tokens of answered prompts, decaying together; as f64.
    LearnedBytes,
    LearnedTokens,
    /// The part of the KV capacity that caches prefixes, as the answers have shown; as f64, 0: all of it.
    CachedShare,
    /// Routing keys that were given to it (`sticky_keys.rs`).
    StickyKeys,
    /// Whether events tell what its cache gains and loses.
    IsFed,
    /// A total, too. In the column.
    Load,
}
/// Of a record, without the speed.
const FIELDS: usize = Field::Load as usize;
const SPEED: usize = FIELDS.next_multiple_of(LINE_WORDS);
/// Whole cache lines.
const RECORD: usize = (SPEED + speed::WORDS).next_multiple_of(LINE_WORDS);
const LINE_WORDS: usize = 8;

const LOADS: usize = CONTROL_WORDS;
const RECORDS: usize = LOADS + MAX_TARGETS;
const OWN_RECORDS: usize = RECORDS + MAX_TARGETS * RECORD;

/// Fields that each process keeps for itself.
#[derive(Clone, Copy)]
#[repr(usize)]
enum OwnField {
    Load,
    OutstandingTokens,
    Permits,
    HeldTokens,
}
const OWN_FIELDS: usize = OwnField::HeldTokens as usize + 1;

/// Own field and its total.
const SUMS: [(OwnField, Field); OWN_FIELDS] = [
    (OwnField::Load, Field::Load),
    (OwnField::OutstandingTokens, Field::OutstandingTokens),
    (OwnField::Permits, Field::Permits),
    (OwnField::HeldTokens, Field::HeldTokens),
];

/// Words of the region that targets take.
pub(crate) fn words(processes: usize) -> usize {
    OWN_RECORDS + processes * MAX_TARGETS * OWN_FIELDS
}

/// Where a field of a slot stands.
fn place(field: Field, slot: u16) -> usize {
    let slot = usize::from(slot);
    if field == Field::Load { LOADS + slot } else { RECORDS + slot * RECORD + field as usize }
}

fn own_place(field: OwnField, process: usize, slot: u16) -> usize {
    OWN_RECORDS + (process * MAX_TARGETS + usize::from(slot)) * OWN_FIELDS + field as usize
}

/// What one request puts on a target.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    /// Prompt tokens that it probably has to read.
    pub(crate) uncached_tokens: u64,
    /// Prompt and answer tokens that probably take room in its cache.
    pub(crate) held_tokens: u64,
    /// Whether a half-open breaker let it through.
    pub(crate) permit: bool,
}

/// A view of the targets' words, as one process sees them.
pub struct Targets<'m> {
    words: &'m mut [u64],
    processes: usize,
    process: usize,
}

impl<'m> Targets<'m> {
    pub(crate) fn new(words: &'m mut [u64], processes: usize, process: usize) -> Self {
        Self { words, processes, process }
    }

    // -- slots

    /// No slot from here on has ever been used.
    pub fn slot_end(&self) -> usize {
        (self.words[SLOT_END] as usize).min(MAX_TARGETS)
    }

    /// Whether a worker has this slot.
    pub fn is_taken(&self, slot: u16) -> bool {
        usize::from(slot) < MAX_TARGETS && self.ranks(slot) > 0
    }

    /// Derive the totals from their parts.
    pub(crate) fn recount(&mut self) {
        for slot in 0..self.slot_end() as u16 {
            for (own, total) in SUMS {
                let sum = (0..self.processes).map(|process| *self.own(own, process, slot)).sum();
                self.set(total, slot, sum);
            }
        }
    }

    /// Forget what a process has in flight.
    pub(crate) fn clear_process(&mut self, process: usize) {
        if process < self.processes {
            for slot in 0..self.slot_end() as u16 {
                for (own, _) in SUMS {
                    *self.own(own, process, slot) = 0;
                }
            }
        }
    }

    /// Slots of all targets.
    pub fn slots(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.slot_end() as u16).filter(|&slot| self.is_taken(slot))
    }

    /// Heads of all workers.
    pub fn heads(&self) -> impl Iterator<Item = u16> + '_ {
        self.slots().filter(|&slot| self.head(slot) == slot)
    }

    /// Whether a worker has its head in this slot.
    pub fn is_head(&self, slot: u16) -> bool {
        self.is_taken(slot) && self.head(slot) == slot
    }

    /// The slots of the worker at `head`.
    pub fn slots_of(&self, head: u16) -> std::ops::Range<u16> {
        head..head.saturating_add(self.ranks(head)).min(MAX_TARGETS as u16)
    }

    /// The first run of `ranks` free slots, now a worker's: pending, nothing learned, nothing in flight. None: there is none.
    pub(crate) fn claim(&mut self, ranks: u16) -> Option<u16> {
        let mut run = 0;
        let last = (0..MAX_TARGETS as u16).find(|&slot| {
            run = if self.is_taken(slot) { 0 } else { run + 1 };
            run == ranks
        })?;
        let head = last + 1 - ranks;
        for slot in head..=last {
            self.begin_incarnation(slot);
            self.set(Field::Ranks, slot, u64::from(ranks));
            self.set(Field::Head, slot, u64::from(head));
        }
        self.words[SLOT_END] = self.words[SLOT_END].max(u64::from(last) + 1);
        Some(head)
    }

    /// The worker at `head` is gone: whoever still has a lease on it holds one of another incarnation now.
    pub(crate) fn free(&mut self, head: u16) {
        for slot in self.slots_of(head) {
            self.begin_incarnation(slot);
        }
    }

    /// All zero but the incarnation, which counts on.
    fn begin_incarnation(&mut self, slot: u16) {
        let incarnation = self.incarnation(slot) + 1;
        let record = RECORDS + usize::from(slot) * RECORD;
        self.words[record..record + RECORD].fill(0);
        self.set(Field::Load, slot, 0);
        for process in 0..self.processes {
            for (own, _) in SUMS {
                *self.own(own, process, slot) = 0;
            }
        }
        self.set(Field::Incarnation, slot, incarnation);
    }

    // -- fields

    pub(crate) fn get(&self, field: Field, slot: u16) -> u64 {
        self.words[place(field, slot)]
    }

    pub(crate) fn set(&mut self, field: Field, slot: u16, value: u64) {
        self.words[place(field, slot)] = value;
    }

    /// Slots of the worker that has this one.
    pub fn ranks(&self, slot: u16) -> u16 {
        self.get(Field::Ranks, slot).min(MAX_TARGETS as u64) as u16
    }

    /// The first slot of the worker that has this one.
    pub fn head(&self, slot: u16) -> u16 {
        self.get(Field::Head, slot).min(MAX_TARGETS as u64 - 1) as u16
    }

    /// Which of its worker's ranks this is.
    pub fn rank(&self, slot: u16) -> u16 {
        slot.saturating_sub(self.head(slot))
    }

    /// Tells the workers that have or had this slot apart.
    pub fn incarnation(&self, slot: u16) -> u64 {
        self.get(Field::Incarnation, slot)
    }

    /// Requests in flight, of all processes.
    pub fn load(&self, slot: u16) -> u64 {
        self.get(Field::Load, slot)
    }

    /// Requests in flight, of all slots.
    pub fn loads(&self) -> &[u64] {
        &self.words[LOADS..LOADS + MAX_TARGETS]
    }

    /// Predicted uncached prompt tokens of the requests in flight, of all processes.
    pub fn outstanding_tokens(&self, slot: u16) -> u64 {
        self.get(Field::OutstandingTokens, slot)
    }

    /// Prompt and answer tokens that the requests in flight probably take in its cache, of all processes.
    pub fn held_tokens(&self, slot: u16) -> u64 {
        self.get(Field::HeldTokens, slot)
    }

    /// Whether events tell what its cache gains and loses.
    pub fn is_fed(&self, slot: u16) -> bool {
        self.get(Field::IsFed, slot) != 0
    }

    /// Of its rank's cache; 0: unknown.
    pub fn kv_capacity_tokens(&self, slot: u16) -> u64 {
        self.get(Field::KvCapacityTokens, slot)
    }

    /// Attempts in flight that a half-open breaker let through, of all processes.
    pub fn permits(&self, head: u16) -> u64 {
        self.get(Field::Permits, head)
    }

    /// Of the worker.
    pub fn health(&self, head: u16) -> Health {
        Health::from_word(self.get(Field::Health, head))
    }

    pub(crate) fn set_health(&mut self, head: u16, health: Health) {
        self.set(Field::Health, head, health.to_word());
    }

    /// Of the worker.
    pub fn breaker(&self, head: u16) -> Breaker {
        let fields = [Field::Breaker0, Field::Breaker1, Field::Breaker2, Field::Breaker3];
        Breaker::from_words(fields.map(|field| self.get(field, head)))
    }

    pub(crate) fn set_breaker(&mut self, head: u16, breaker: Breaker) {
        let fields = [Field::Breaker0, Field::Breaker1, Field::Breaker2, Field::Breaker3];
        for (field, word) in fields.into_iter().zip(breaker.to_words()) {
            self.set(field, head, word);
        }
        if let Breaker::Open { until_ns } = breaker {
            // 0 stands for never.
            let wake_ns = &mut self.words[WAKE_NS];
            *wake_ns = if *wake_ns == 0 { until_ns.max(1) } else { (*wake_ns).min(until_ns.max(1)) };
        }
    }

    /// Whether an open breaker's time may have come; if so, the caller looks at all of them, and setting them sets the next time.
    pub(crate) fn take_wake(&mut self, now_ns: u64) -> bool {
        let due = self.words[WAKE_NS] != 0 && self.words[WAKE_NS] <= now_ns;
        if due {
            self.words[WAKE_NS] = 0;
        }
        due
    }

    /// Whether `interval_ns` have passed since this was last true.
    pub(crate) fn take_eviction(&mut self, now_ns: u64, interval_ns: u64) -> bool {
        let due = now_ns >= self.words[EVICTED_NS].saturating_add(interval_ns);
        if due {
            self.words[EVICTED_NS] = now_ns;
        }
        due
    }

    /// Whether the worker gets no new leases because it was told to stop.
    pub fn draining(&self, head: u16) -> bool {
        self.get(Field::Draining, head) != 0
    }

    // -- work in flight

    /// One more request in flight at `slot`.
    pub(crate) fn begin(&mut self, slot: u16, work: Work) {
        self.change(slot, work, u64::wrapping_add);
    }

    /// What [`Targets::begin`] began has ended.
    pub(crate) fn end(&mut self, slot: u16, work: Work) {
        self.change(slot, work, u64::saturating_sub);
    }

    fn change(&mut self, slot: u16, work: Work, by: fn(u64, u64) -> u64) {
        let head = self.head(slot);
        let changes =
            [(slot, 1), (slot, work.uncached_tokens), (head, u64::from(work.permit)), (slot, work.held_tokens)];
        for ((own, total), (slot, amount)) in SUMS.into_iter().zip(changes) {
            let word = self.own(own, self.process, slot);
            *word = by(*word, amount);
            let sum = by(self.get(total, slot), amount);
            self.set(total, slot, sum);
        }
    }

    fn own(&mut self, field: OwnField, process: usize, slot: u16) -> &mut u64 {
        &mut self.words[own_place(field, process, slot)]
    }

    /// # Errors
    /// Names the first broken invariant.
    pub fn check_integrity(&self) -> Result<(), String> {
        let end = self.slot_end() as u16;
        for slot in 0..MAX_TARGETS as u16 {
            if self.is_taken(slot) {
                let (head, ranks) = (self.head(slot), self.ranks(slot));
                if slot >= end || !self.slots_of(head).contains(&slot) || self.ranks(head) != ranks {
                    return Err(format!("slot {slot}: not among the {ranks} slots of a worker at {head}"));
                }
            }
            for (own, total) in SUMS {
                let word = |process| self.words[own_place(own, process, slot)];
                let sum: u64 = (0..self.processes).map(word).sum();
                if sum != self.get(total, slot) {
                    return Err(format!("slot {slot}: a total is {}, its parts make {sum}", self.get(total, slot)));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_get_runs_of_slots_and_leave_them_clean() {
        let mut words = vec![0; words(2)];
        let mut targets = Targets::new(&mut words, 2, 1);
        assert_eq!([targets.claim(2), targets.claim(3), targets.claim(1)], [Some(0), Some(2), Some(5)]);
        let first = targets.incarnation(2);
        targets.begin(3, Work { uncached_tokens: 70, held_tokens: 90, permit: true });
        assert_eq!((targets.load(3), targets.outstanding_tokens(3), targets.permits(2)), (1, 70, 1));
        targets.check_integrity().unwrap();
        targets.free(2);
        assert_eq!(targets.slots().collect::<Vec<_>>(), [0, 1, 5]);
        assert_eq!(targets.claim(4), Some(6));
        assert_eq!(targets.claim(3), Some(2));
        assert!(targets.incarnation(2) > first);
        assert_eq!((targets.load(3), targets.outstanding_tokens(3), targets.permits(2)), (0, 0, 0));
        assert_eq!(targets.heads().collect::<Vec<_>>(), [0, 2, 5, 6]);
        targets.check_integrity().unwrap();
        assert_eq!(targets.claim(MAX_TARGETS as u16), None);
    }

    #[test]
    fn a_totals_parts_must_add_up() {
        let mut words = vec![0; words(1)];
        let mut targets = Targets::new(&mut words, 1, 0);
        targets.claim(1);
        targets.begin(0, Work { uncached_tokens: 10, ..Work::default() });
        targets.set(Field::Load, 0, 2);
        assert!(targets.check_integrity().unwrap_err().contains("slot 0"));
    }
}
