//! The slab: counters and histograms of one process, as plain words.
//!
//! **Owner and mutability.** The process that routes writes it and nobody else; whoever scrapes reads while it does, from another
//! process too. Each word is one atomic, and counters never fall. What one call counts is bracketed by two words of the header, so
//! that a reader can tell whether it has read between two calls ([`Slab::ledger`]). A series is (model, endpoint, streaming);
//! models beyond the 64th, and requests that named none that is known, count as [`OTHER_MODEL`]. A target's row belongs to one
//! incarnation of its slot and starts anew with the next. The slab of a process that died is folded into another one.
//!
//! ```text
//! header    layout hash, calls begun and ended, balance of requests, time of the last turn of the loop, retries by reason
//! lag       histogram of how late the loop was
//! models    hashes of the models that have series of their own, in the order they came; 0: none yet
//! http      answers of the router's own, by method and by status, for each known path
//! accepted  a word for each series
//! series    [series][counters, statuses, three histograms]
//! targets   [slot][incarnation, counters]
//! ```

mod reading;

pub use reading::{HttpReading, LagReading, Ledger, SeriesReading, TargetReading};

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::http1::Arrivals;
use crate::mapping::Mapping;
use crate::model::MAX_MODELS;
use crate::outcome::OutcomeKind;
use crate::prompt::Endpoint;
use crate::region::MAX_TARGETS;

/// The label of the series of all models that have none of their own.
pub const OTHER_MODEL: &str = "other";

const OTHER: usize = MAX_MODELS;
const MODELS: usize = MAX_MODELS + 1;
const ENDPOINTS: [Endpoint; 3] = [Endpoint::Chat, Endpoint::Completions, Endpoint::Generate];
const SERIES: usize = MODELS * ENDPOINTS.len() * 2;

/// Upper bounds of the histograms of pauses: between two pieces of an answer, and of the event loop.
pub const PAUSE_BOUNDS_NS: [u64; 15] = {
    const MS: u64 = 1_000_000;
    let bounds = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000];
    let mut ns = [0; 15];
    let mut i = 0;
    while i < ns.len() {
        ns[i] = bounds[i] * MS;
        i += 1;
    }
    ns
};
/// Buckets of those histograms.
pub const PAUSE_BUCKETS: usize = PAUSE_BOUNDS_NS.len() + 1;

/// Statuses that HTTP allows: 100 to 599.
const FIRST_STATUS: u16 = 100;
const STATUSES: usize = 500;

/// What else than routed requests is counted by. The last stands for all others.
pub const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"];
/// Likewise. Whatever the control app answers it counts itself.
pub const PATHS: [&str; 7] =
    ["/health", "/liveness", "/readiness", "/v1/chat/completions", "/v1/completions", "/generate", "other"];

/// Why an attempt was not the first one of its request.
pub const RETRY_REASONS: [&str; 4] = ["connect_failed", "no_answer", "status", "stream_broken"];

// The header.
const LAYOUT: usize = 0;
const BEGUN: usize = 1;
const ENDED: usize = 2;
const ACCEPTED_IN_ALL: usize = 3;
const ANSWERED_IN_ALL: usize = 4;
const IN_FLIGHT: usize = 5;
const LOST: usize = 6;
const TURNED_NS: usize = 7;
const RETRIES_BY_REASON: usize = 8;
const LAG_SUM_NS: usize = RETRIES_BY_REASON + RETRY_REASONS.len();
const SHADOW_AGREED: usize = LAG_SUM_NS + 1;
const SHADOW_DIFFERED: usize = SHADOW_AGREED + 1;
const LOCK_WAITS: usize = SHADOW_DIFFERED + 1;
const LOCK_WAIT_NS: usize = LOCK_WAITS + 1;
const HEADER_WORDS: usize = 24;

const LAG: usize = HEADER_WORDS;
const MODEL_HASHES: usize = LAG + PAUSE_BUCKETS;
const HTTP: usize = MODEL_HASHES + MAX_MODELS;
const HTTP_ROW: usize = METHODS.len() + STATUSES;
const ACCEPTED: usize = HTTP + PATHS.len() * HTTP_ROW;
const SERIES_AT: usize = ACCEPTED + SERIES;

// A series.
const ATTEMPTS: usize = 0;
const RETRIES: usize = 1;
const DURATION_SUM_NS: usize = 2;
const FIRST_BYTE_SUM_NS: usize = 3;
const GAP_SUM_NS: usize = 4;
const CHUNKS: usize = 5;
const ANSWERED: usize = 8;
const GAPS: usize = ANSWERED + STATUSES;
const DURATIONS: usize = GAPS + PAUSE_BUCKETS;

/// Changes with every change of what stands where that sizes do not show.
const LAYOUT_VERSION: u64 = 1;

const TARGET_WORDS: usize = 16;

/// Counters of a target.
#[derive(Clone, Copy)]
#[repr(usize)]
pub(crate) enum TargetCounter {
    Selections = 1,
    Failures,
    PromptTokens,
    ReportedCachedTokens,
    PredictedCachedTokens,
    CompletionTokens,
    Connects,
    Reuses,
    RequestBytes,
    ResponseBytes,
}
const INCARNATION: usize = 0;

/// Names a series of the slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series(usize);

/// The words, and the bounds of the histograms.
pub struct Slab {
    bounds_ns: Vec<u64>,
    memory: Mapping,
}

/// What is counted while this lives is counted in one step, as far as [`Slab::ledger`] can tell.
pub(crate) struct Step<'s>(&'s Slab);

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.words()[ENDED].fetch_add(1, Ordering::Release);
    }
}

impl Slab {
    /// All zero, of this process alone. `bounds_ns`: upper bounds of the buckets of durations, rising.
    ///
    /// # Panics
    /// When the system has no memory left, as any allocation.
    pub fn new(bounds_ns: Vec<u64>) -> Self {
        let made = Mapping::private(words(bounds_ns.len()));
        #[allow(clippy::expect_used, reason = "as an allocation that fails")]
        Self::on(bounds_ns, made.expect("memory for the slab"))
    }

    /// All zero, in a file that another process can [`Slab::attach`].
    ///
    /// # Errors
    /// What the system says.
    #[cfg(target_os = "linux")]
    pub fn shared(bounds_ns: Vec<u64>) -> io::Result<(Self, File)> {
        let words = words(bounds_ns.len());
        let file = Mapping::memory_file("warmroute-slab", words)?;
        let memory = Mapping::shared(&file, words)?;
        Ok((Self::on(bounds_ns, memory), file))
    }

    /// The slab that another process made, with the same bounds.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::InvalidData`] when it is not such a slab.
    pub fn attach(bounds_ns: Vec<u64>, file: &File) -> io::Result<Self> {
        let memory = Mapping::shared(file, words(bounds_ns.len()))?;
        if memory.atomics()[LAYOUT].load(Ordering::Relaxed) != layout_hash(&bounds_ns) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the slab was made by another version"));
        }
        Ok(Self { bounds_ns, memory })
    }

    fn on(bounds_ns: Vec<u64>, memory: Mapping) -> Self {
        memory.atomics()[LAYOUT].store(layout_hash(&bounds_ns), Ordering::Relaxed);
        Self { bounds_ns, memory }
    }

    // -- written by the process that routes

    pub(crate) fn step(&self) -> Step<'_> {
        self.words()[BEGUN].fetch_add(1, Ordering::Relaxed);
        // Nothing that the step counts may be seen before its beginning.
        fence(Ordering::Release);
        Step(self)
    }

    /// A request has come.
    pub(crate) fn accept(&self) {
        self.add(ACCEPTED_IN_ALL, 1);
    }

    /// One more is under way, or one less.
    pub(crate) fn change_in_flight(&self, by: i64) {
        self.add(IN_FLIGHT, by as u64);
    }

    /// The series of a model (None: of all that have none), which gets its own as long as there is room.
    pub(crate) fn settle(&self, model: Option<u64>, endpoint: Endpoint, streaming: bool) -> Series {
        let row = model.map_or(OTHER, |hash| self.model_row(hash));
        Series((row * ENDPOINTS.len() + endpoint as usize) * 2 + usize::from(streaming))
    }

    fn model_row(&self, hash: u64) -> usize {
        for (row, known) in self.words()[MODEL_HASHES..][..MAX_MODELS].iter().enumerate() {
            let claimed = match known.load(Ordering::Relaxed) {
                0 => known.compare_exchange(0, hash, Ordering::Relaxed, Ordering::Relaxed).unwrap_or_else(|now| now),
                known => known,
            };
            if claimed == hash || claimed == 0 {
                return row;
            }
        }
        OTHER
    }

    /// A request that has come belongs to this series.
    pub(crate) fn assign(&self, series: Series) {
        self.add(ACCEPTED + series.0, 1);
    }

    /// `retried`: why, if it is not the first attempt.
    pub(crate) fn attempt(&self, series: Series, retried: Option<OutcomeKind>) {
        self.add(self.place(series, ATTEMPTS), 1);
        if let Some(reason) = retried {
            self.add(self.place(series, RETRIES), 1);
            let reason = match reason {
                OutcomeKind::ConnectFailed => 0,
                OutcomeKind::NoAnswer => 1,
                OutcomeKind::Answered => 2,
                OutcomeKind::BrokenStream | OutcomeKind::Cancelled => 3,
            };
            self.add(RETRIES_BY_REASON + reason, 1);
        }
    }

    /// The pieces in which an answer came.
    pub(crate) fn arrive(&self, series: Series, arrivals: &Arrivals) {
        self.add(self.place(series, CHUNKS), u64::from(arrivals.chunks));
        self.add(self.place(series, GAP_SUM_NS), arrivals.gap_sum_ns);
        for (bucket, &count) in arrivals.gaps.iter().enumerate() {
            if count > 0 {
                self.add(self.place(series, GAPS + bucket), u64::from(count));
            }
        }
    }

    /// `first_byte_ns`: since the request came; None: not a byte was answered.
    pub(crate) fn answer(&self, series: Series, status: u16, duration_ns: u64, first_byte_ns: Option<u64>) {
        self.add(ANSWERED_IN_ALL, 1);
        self.add(self.place(series, ANSWERED + status_index(status)), 1);
        self.add(self.place(series, DURATION_SUM_NS), duration_ns);
        self.add(self.place(series, DURATIONS + self.bucket(duration_ns)), 1);
        if let Some(first_byte_ns) = first_byte_ns {
            self.add(self.place(series, FIRST_BYTE_SUM_NS), first_byte_ns);
            self.add(self.place(series, DURATIONS + self.buckets() + self.bucket(first_byte_ns)), 1);
        }
    }

    pub(crate) fn count(&self, slot: u16, incarnation: u64, counter: TargetCounter, amount: u64) {
        let row = self.target_row(slot);
        if row[INCARNATION].load(Ordering::Relaxed) != incarnation {
            row.iter().for_each(|word| word.store(0, Ordering::Relaxed));
            row[INCARNATION].store(incarnation, Ordering::Relaxed);
        }
        row[counter as usize].fetch_add(amount, Ordering::Relaxed);
    }

    /// The router itself answered a request that is not routed, or refused one that was not read.
    pub(crate) fn count_http(&self, method: &str, path: &str, status: u16) {
        let find = |names: &[&str], name| names.iter().position(|&known| known == name).unwrap_or(names.len() - 1);
        let row = HTTP + find(&PATHS, path) * HTTP_ROW;
        self.add(row + find(&METHODS, method), 1);
        self.add(row + METHODS.len() + status_index(status), 1);
    }

    /// The event loop turned, so much later than it should have.
    pub(crate) fn turned(&self, lag_ns: u64, now_ns: u64) {
        self.words()[TURNED_NS].store(now_ns, Ordering::Relaxed);
        self.add(LAG_SUM_NS, lag_ns);
        self.add(LAG + pause_bucket(lag_ns), 1);
    }

    /// The shadow policy chose the same target, or another one.
    pub(crate) fn shadow(&self, agrees: bool) {
        self.add(if agrees { SHADOW_AGREED } else { SHADOW_DIFFERED }, 1);
    }

    /// The region's lock was somebody else's at first.
    pub(crate) fn waited(&self, ns: u64) {
        self.add(LOCK_WAITS, 1);
        self.add(LOCK_WAIT_NS, ns);
    }

    /// Take over what another slab counted. What it has in flight is lost when its process is dead, and answered never.
    pub fn fold(&self, other: &Self, is_dead: bool) {
        let theirs = other.words();
        let _step = self.step();
        for word in (ACCEPTED_IN_ALL..=LOST).chain(RETRIES_BY_REASON..MODEL_HASHES).chain(HTTP..ACCEPTED) {
            self.add(word, theirs[word].load(Ordering::Relaxed));
        }
        if is_dead {
            let lost = theirs[IN_FLIGHT].load(Ordering::Relaxed);
            self.add(IN_FLIGHT, lost.wrapping_neg());
            self.add(ANSWERED_IN_ALL, lost);
            self.add(LOST, lost);
        }
        for theirs in (0..SERIES).map(Series).filter(|&series| other.accepted(series) > 0) {
            let ours = self.settle(other.model_of(theirs), theirs.endpoint(), theirs.streaming());
            self.add(ACCEPTED + ours.0, other.accepted(theirs));
            for word in 0..series_words(self.bounds_ns.len()) {
                self.add(self.place(ours, word), other.read(other.place(theirs, word)));
            }
        }
        for slot in 0..MAX_TARGETS as u16 {
            let row = other.target_row(slot);
            let incarnation = row[INCARNATION].load(Ordering::Relaxed);
            // What is of an incarnation before the one that is counted here is nobody's any more.
            if incarnation > 0 && incarnation >= self.target_row(slot)[INCARNATION].load(Ordering::Relaxed) {
                self.count(slot, incarnation, TargetCounter::Selections, 0);
                for (ours, theirs) in self.target_row(slot).iter().zip(row).skip(1) {
                    ours.fetch_add(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
                }
            }
        }
    }

    // -- where things are

    fn words(&self) -> &[AtomicU64] {
        self.memory.atomics()
    }

    fn add(&self, word: usize, amount: u64) {
        self.words()[word].fetch_add(amount, Ordering::Relaxed);
    }

    fn read(&self, word: usize) -> u64 {
        self.words()[word].load(Ordering::Relaxed)
    }

    fn accepted(&self, series: Series) -> u64 {
        self.read(ACCEPTED + series.0)
    }

    fn model_of(&self, series: Series) -> Option<u64> {
        let row = series.0 / (2 * ENDPOINTS.len());
        (row < MAX_MODELS).then(|| self.read(MODEL_HASHES + row))
    }

    fn place(&self, series: Series, word: usize) -> usize {
        SERIES_AT + series.0 * series_words(self.bounds_ns.len()) + word
    }

    fn target_row(&self, slot: u16) -> &[AtomicU64] {
        let start = SERIES_AT + SERIES * series_words(self.bounds_ns.len()) + usize::from(slot) * TARGET_WORDS;
        &self.words()[start..start + TARGET_WORDS]
    }

    fn buckets(&self) -> usize {
        self.bounds_ns.len() + 1
    }

    /// The first bucket whose bound is not below.
    fn bucket(&self, ns: u64) -> usize {
        self.bounds_ns.partition_point(|&bound| bound < ns)
    }
}

impl Series {
    fn endpoint(self) -> Endpoint {
        ENDPOINTS[self.0 / 2 % ENDPOINTS.len()]
    }

    fn streaming(self) -> bool {
        self.0 % 2 == 1
    }
}

/// Which of the [`PAUSE_BUCKETS`] a pause belongs to.
#[inline]
pub(crate) fn pause_bucket(ns: u64) -> usize {
    PAUSE_BOUNDS_NS.iter().position(|&bound| ns <= bound).unwrap_or(PAUSE_BOUNDS_NS.len())
}

fn status_index(status: u16) -> usize {
    usize::from(status.saturating_sub(FIRST_STATUS)).min(STATUSES - 1)
}

fn words(bounds: usize) -> usize {
    SERIES_AT + SERIES * series_words(bounds) + MAX_TARGETS * TARGET_WORDS
}

fn series_words(bounds: usize) -> usize {
    DURATIONS + 2 * (bounds + 1)
}

fn layout_hash(bounds_ns: &[u64]) -> u64 {
    let parts = [LAYOUT_VERSION, SERIES_AT as u64, TARGET_WORDS as u64].into_iter().chain(bounds_ns.iter().copied());
    parts.fold(0x736c_6162, |hash, part| (hash ^ part).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(23))
}

#[cfg(test)]
mod tests;
