//! The slab: counters and histograms of one process, as plain words.
//!
//! **Owner and mutability.** The process that routes writes it and nobody else; whoever scrapes reads while it does. Each word is
//! one atomic; words are not consistent with each other to the last request, and counters never fall. A series is (model,
//! endpoint, streaming); models beyond the 64th, and requests that named none that is known, count as [`OTHER_MODEL`].
//! A target's row belongs to one incarnation of its slot and starts anew with the next.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::MAX_MODELS;
use crate::prompt::Endpoint;
use crate::region::MAX_TARGETS;

/// The label of the series of all models that have none of their own.
pub const OTHER_MODEL: &str = "other";

const OTHER: usize = MAX_MODELS;
const MODELS: usize = MAX_MODELS + 1;
const ENDPOINTS: [Endpoint; 3] = [Endpoint::Chat, Endpoint::Completions, Endpoint::Generate];
const SERIES: usize = MODELS * ENDPOINTS.len() * 2;

/// Statuses that HTTP allows: 100 to 599.
const FIRST_STATUS: u16 = 100;
const STATUSES: usize = 500;

const ACCEPTED: usize = 0;
const ATTEMPTS: usize = 1;
const RETRIES: usize = 2;
const DURATION_SUM_NS: usize = 3;
const FIRST_BYTE_SUM_NS: usize = 4;
const ANSWERED: usize = 8;
const DURATIONS: usize = ANSWERED + STATUSES;

const TARGET_WORDS: usize = 8;

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
}
const INCARNATION: usize = 0;

/// Names a series of the slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series(usize);

/// The counters of one series, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeriesReading {
    /// Hash of the model's name; None: [`OTHER_MODEL`].
    pub model: Option<u64>,
    /// Where the requests came to.
    pub endpoint: Endpoint,
    /// Whether they asked for a stream.
    pub streaming: bool,
    /// Requests.
    pub accepted: u64,
    /// What their clients got: status and how many; only what occurred.
    pub answered: Vec<(u16, u64)>,
    /// Leases.
    pub attempts: u64,
    /// Leases beyond the first of a request.
    pub retries: u64,
    /// Requests by duration: counts per bucket, one more than there are bounds.
    pub duration_buckets: Vec<u64>,
    /// Of all durations.
    pub duration_sum_ns: u64,
    /// Requests of which a byte was answered, by the time to it.
    pub first_byte_buckets: Vec<u64>,
    /// Of all of those times.
    pub first_byte_sum_ns: u64,
}

/// The counters of one target, read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetReading {
    /// Leases.
    pub selections: u64,
    /// Attempts that speak against the worker.
    pub failures: u64,
    /// Of answers that reported prompt and cached tokens; likewise the next two.
    pub prompt_tokens: u64,
    /// What the worker found in its cache.
    pub reported_cached_tokens: u64,
    /// What the index had expected there.
    pub predicted_cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
}

/// The words, and the bounds of the histograms.
pub struct Slab {
    bounds_ns: Vec<u64>,
    /// Hashes of the models that have series of their own, in the order they came; 0: none yet.
    models: Vec<AtomicU64>,
    series: Vec<AtomicU64>,
    targets: Vec<AtomicU64>,
}

impl Slab {
    /// All zero. `bounds_ns`: upper bounds of the histograms' buckets, rising.
    pub fn new(bounds_ns: Vec<u64>) -> Self {
        let zeros = |words: usize| (0..words).map(|_| AtomicU64::new(0)).collect();
        let series_words = series_words(&bounds_ns);
        Self {
            bounds_ns,
            models: zeros(MAX_MODELS),
            series: zeros(SERIES * series_words),
            targets: zeros(MAX_TARGETS * TARGET_WORDS),
        }
    }

    // -- written by the process that routes

    /// The series of a model (None: of all that have none), which gets its own as long as there is room.
    pub(crate) fn settle(&self, model: Option<u64>, endpoint: Endpoint, streaming: bool) -> Series {
        let row = model.map_or(OTHER, |hash| self.model_row(hash));
        Series((row * ENDPOINTS.len() + endpoint as usize) * 2 + usize::from(streaming))
    }

    fn model_row(&self, hash: u64) -> usize {
        for (row, known) in self.models.iter().enumerate() {
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

    pub(crate) fn accept(&self, series: Series) {
        self.add(series, ACCEPTED, 1);
    }

    pub(crate) fn attempt(&self, series: Series, is_retry: bool) {
        self.add(series, ATTEMPTS, 1);
        self.add(series, RETRIES, u64::from(is_retry));
    }

    /// `first_byte_ns`: since the request came; None: not a byte was answered.
    pub(crate) fn answer(&self, series: Series, status: u16, duration_ns: u64, first_byte_ns: Option<u64>) {
        let status = usize::from(status.saturating_sub(FIRST_STATUS)).min(STATUSES - 1);
        self.add(series, ANSWERED + status, 1);
        self.add(series, DURATION_SUM_NS, duration_ns);
        self.add(series, DURATIONS + self.bucket(duration_ns), 1);
        if let Some(first_byte_ns) = first_byte_ns {
            self.add(series, FIRST_BYTE_SUM_NS, first_byte_ns);
            self.add(series, DURATIONS + self.buckets() + self.bucket(first_byte_ns), 1);
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

    // -- read at scrape

    /// The series in which something was counted.
    pub fn series(&self) -> Vec<SeriesReading> {
        (0..SERIES)
            .map(Series)
            .filter(|&series| self.read(series, ACCEPTED) > 0)
            .map(|series| self.reading(series))
            .collect()
    }

    fn reading(&self, series: Series) -> SeriesReading {
        let row = series.0 / (2 * ENDPOINTS.len());
        let words = |start: usize, count: usize| (start..start + count).map(|word| self.read(series, word));
        SeriesReading {
            model: self.models.get(row).map(|hash| hash.load(Ordering::Relaxed)),
            endpoint: ENDPOINTS[series.0 / 2 % ENDPOINTS.len()],
            streaming: series.0 % 2 == 1,
            accepted: self.read(series, ACCEPTED),
            answered: (FIRST_STATUS..).zip(words(ANSWERED, STATUSES)).filter(|&(_, count)| count > 0).collect(),
            attempts: self.read(series, ATTEMPTS),
            retries: self.read(series, RETRIES),
            duration_buckets: words(DURATIONS, self.buckets()).collect(),
            duration_sum_ns: self.read(series, DURATION_SUM_NS),
            first_byte_buckets: words(DURATIONS + self.buckets(), self.buckets()).collect(),
            first_byte_sum_ns: self.read(series, FIRST_BYTE_SUM_NS),
        }
    }

    /// The counters of the target in `slot`, zero unless it is of this incarnation.
    pub fn target(&self, slot: u16, incarnation: u64) -> TargetReading {
        let row = self.target_row(slot);
        if row[INCARNATION].load(Ordering::Relaxed) != incarnation {
            return TargetReading::default();
        }
        let read = |counter: TargetCounter| row[counter as usize].load(Ordering::Relaxed);
        TargetReading {
            selections: read(TargetCounter::Selections),
            failures: read(TargetCounter::Failures),
            prompt_tokens: read(TargetCounter::PromptTokens),
            reported_cached_tokens: read(TargetCounter::ReportedCachedTokens),
            predicted_cached_tokens: read(TargetCounter::PredictedCachedTokens),
            completion_tokens: read(TargetCounter::CompletionTokens),
        }
    }

    fn target_row(&self, slot: u16) -> &[AtomicU64] {
        let start = usize::from(slot) * TARGET_WORDS;
        &self.targets[start..start + TARGET_WORDS]
    }

    fn add(&self, series: Series, word: usize, amount: u64) {
        self.word(series, word).fetch_add(amount, Ordering::Relaxed);
    }

    fn read(&self, series: Series, word: usize) -> u64 {
        self.word(series, word).load(Ordering::Relaxed)
    }

    fn word(&self, series: Series, word: usize) -> &AtomicU64 {
        &self.series[series.0 * series_words(&self.bounds_ns) + word]
    }

    fn buckets(&self) -> usize {
        self.bounds_ns.len() + 1
    }

    /// The first bucket whose bound is not below.
    fn bucket(&self, ns: u64) -> usize {
        self.bounds_ns.partition_point(|&bound| bound < ns)
    }
}

fn series_words(bounds_ns: &[u64]) -> usize {
    DURATIONS + 2 * (bounds_ns.len() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_counts_what_it_is_told() {
        let slab = Slab::new(vec![10, 20]);
        let series = slab.settle(Some(77), Endpoint::Generate, true);
        slab.accept(series);
        slab.accept(series);
        slab.attempt(series, false);
        slab.attempt(series, true);
        slab.answer(series, 200, 10, Some(3));
        slab.answer(series, 502, 21, None);
        let expected = SeriesReading {
            model: Some(77),
            endpoint: Endpoint::Generate,
            streaming: true,
            accepted: 2,
            answered: vec![(200, 1), (502, 1)],
            attempts: 2,
            retries: 1,
            duration_buckets: vec![1, 0, 1],
            duration_sum_ns: 31,
            first_byte_buckets: vec![1, 0, 0],
            first_byte_sum_ns: 3,
        };
        assert_eq!(slab.series(), [expected]);
    }

    #[test]
    fn series_do_not_mix_and_overflow_is_other() {
        let slab = Slab::new(vec![]);
        let mut all = Vec::new();
        for model in (1..=64).map(Some).chain([None]) {
            for endpoint in ENDPOINTS {
                for streaming in [false, true] {
                    all.push(slab.settle(model, endpoint, streaming));
                    slab.accept(*all.last().unwrap());
                }
            }
        }
        assert_eq!(slab.series().len(), SERIES);
        assert!(slab.series().iter().all(|series| series.accepted == 1));
        assert_eq!(slab.settle(Some(65), Endpoint::Chat, false), slab.settle(None, Endpoint::Chat, false));
        assert_eq!(slab.settle(Some(64), Endpoint::Chat, false), all[63 * 6]);
    }

    #[test]
    fn odd_statuses_have_a_place() {
        let slab = Slab::new(vec![]);
        let series = slab.settle(None, Endpoint::Chat, false);
        slab.accept(series);
        for status in [0, 99, 599, 999] {
            slab.answer(series, status, 0, None);
        }
        assert_eq!(slab.series()[0].answered, [(100, 2), (599, 2)]);
    }

    #[test]
    fn a_targets_row_starts_anew_with_its_incarnation() {
        let slab = Slab::new(vec![]);
        slab.count(9, 1, TargetCounter::Selections, 2);
        assert_eq!(slab.target(9, 1).selections, 2);
        assert_eq!(slab.target(9, 3), TargetReading::default());
        slab.count(9, 3, TargetCounter::CompletionTokens, 5);
        assert_eq!(slab.target(9, 3), TargetReading { completion_tokens: 5, ..Default::default() });
    }
}
