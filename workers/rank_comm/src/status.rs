//! What a rank tells everybody about itself: numbers that it alone writes and anybody may read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

/// Kinds of collectives, in the order of their counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Everybody gets the sum of all.
    AllReduce,
    /// One, or everybody, gets the parts of all.
    Gather,
    /// Everybody gets what one has.
    Broadcast,
    /// Nothing but waiting for each other.
    Barrier,
    /// Everybody gets the sum of all, of the part that it wants.
    ReduceScatter,
    /// Everybody gets what others have for it.
    AllToAll,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::AllReduce, Self::Gather, Self::Broadcast, Self::Barrier, Self::ReduceScatter, Self::AllToAll];

    /// As metrics spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::Gather => "gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
        }
    }
}

/// Numbers of a rank that are not a collective's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Counter {
    /// Process id; 0: it has not begun.
    Pid,
    /// Grows as long as the rank is alive, whether it computes, waits or is idle.
    Heartbeat,
    /// Steps computed.
    Steps,
    /// Nanoseconds spent in steps, waiting for others not included.
    BusyNs,
    /// Nanoseconds in collectives, waiting included.
    CommNs,
    /// Bytes of weights this rank holds.
    WeightBytes,
    /// Bytes of its KV pool.
    PoolBytes,
    /// Bytes that it wrote into its slots: what the collectives really moved.
    SlotBytes,
    /// Of the driver: nanoseconds with a plan under way.
    ActiveNs,
    /// Steps in which it had tokens of prompts, in which it had only sequences that decode, and in which it had nothing and kept in step.
    PrefillSteps,
    /// See there.
    DecodeSteps,
    /// See there.
    IdleSteps,
    /// Bytes of keys and values that it stored.
    StoredBytes,
    /// Rows that it sent to experts of others, and that its own experts computed.
    SentRows,
    /// See there.
    ExpertRows,
    /// Nanoseconds in which a collective went on while something else was computed.
    OverlapNs,
    /// Experts whose weights it took over.
    MovedExperts,
    /// How evenly the rows of experts were spread over ranks when it was looked at last: mean over maximum, in millionths.
    BalancednessPpm,
    /// Bytes that it sent to other nodes.
    NodeBytes,
}

impl Counter {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::Pid,
        Self::Heartbeat,
        Self::Steps,
        Self::BusyNs,
        Self::CommNs,
        Self::WeightBytes,
        Self::PoolBytes,
        Self::SlotBytes,
        Self::ActiveNs,
        Self::PrefillSteps,
        Self::DecodeSteps,
        Self::IdleSteps,
        Self::StoredBytes,
        Self::SentRows,
        Self::ExpertRows,
        Self::OverlapNs,
        Self::MovedExperts,
        Self::BalancednessPpm,
        Self::NodeBytes,
    ];

    /// As metrics spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pid => "pid",
            Self::Heartbeat => "heartbeat",
            Self::Steps => "steps",
            Self::BusyNs => "busy_ns",
            Self::CommNs => "comm_ns",
            Self::WeightBytes => "weight_bytes",
            Self::PoolBytes => "pool_bytes",
            Self::SlotBytes => "slot_bytes",
            Self::ActiveNs => "active_ns",
            Self::PrefillSteps => "prefill_steps",
            Self::DecodeSteps => "decode_steps",
            Self::IdleSteps => "idle_steps",
            Self::StoredBytes => "stored_bytes",
            Self::SentRows => "sent_rows",
            Self::ExpertRows => "expert_rows",
            Self::OverlapNs => "overlap_ns",
            Self::MovedExperts => "moved_experts",
            Self::BalancednessPpm => "balancedness_ppm",
            Self::NodeBytes => "node_bytes",
        }
    }
}

const FIRST_OP: usize = Counter::ALL.len();
pub(crate) const STATUS_WORDS: usize = 64;
const _: () = assert!(FIRST_OP + 2 * Op::ALL.len() <= STATUS_WORDS);

/// One rank's block.
#[derive(Clone, Copy)]
pub struct RankStatus<'a>(pub(crate) &'a [AtomicU64]);

impl RankStatus<'_> {
    /// The number as it stands.
    #[must_use]
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize].load(Ordering::Relaxed)
    }

    /// By its owner only.
    pub fn set(&self, counter: Counter, value: u64) {
        self.0[counter as usize].store(value, Ordering::Relaxed);
    }

    /// By its owner only, which may have a thread for collectives besides its own.
    pub fn add(&self, counter: Counter, value: u64) {
        self.0[counter as usize].fetch_add(value, Ordering::Relaxed);
    }

    /// How often `op` was done, and how many bytes were given to it: of an all-reduce, the size of the vector.
    #[must_use]
    pub fn op(&self, op: Op) -> (u64, u64) {
        let at = FIRST_OP + 2 * op as usize;
        (self.0[at].load(Ordering::Relaxed), self.0[at + 1].load(Ordering::Relaxed))
    }

    /// All numbers, to be shown on another host.
    #[must_use]
    pub fn words(&self) -> Vec<u64> {
        self.0.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// What `words` gave on the host where the rank is; only where its owner is not. What is missing or too much is left alone.
    pub fn set_words(&self, words: &[u64]) {
        for (word, &value) in self.0.iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
    }

    pub(crate) fn count_op(&self, op: Op, bytes: u64) {
        let at = FIRST_OP + 2 * op as usize;
        self.0[at].fetch_add(1, Ordering::Relaxed);
        self.0[at + 1].fetch_add(bytes, Ordering::Relaxed);
    }
}
