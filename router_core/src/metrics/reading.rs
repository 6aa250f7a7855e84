//! The slab, read: at scrape, while its owner writes.

use std::sync::atomic::{Ordering, fence};

use super::*;

/// A reader that has met a step of the writer this many times takes what it has.
const MOST_TRIES: usize = 100_000;

/// The requests of a slab.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Have come.
    pub accepted: u64,
    /// Have been answered, or were lost.
    pub answered: u64,
    /// Are neither.
    pub in_flight: u64,
    /// Were in flight when their process died.
    pub lost: u64,
}

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
    /// Pieces in which answers came.
    pub chunks: u64,
    /// The times between two of one answer, by [`PAUSE_BOUNDS_NS`].
    pub gap_buckets: Vec<u64>,
    /// Of all of those times.
    pub gap_sum_ns: u64,
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
    /// Attempts on a new connection.
    pub connects: u64,
    /// Attempts on one that had been used.
    pub reuses: u64,
    /// Of bodies that were sent to it.
    pub request_bytes: u64,
    /// Of bodies that came from it.
    pub response_bytes: u64,
}

/// What else the router answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpReading {
    /// (method, path, how many)
    pub requests: Vec<(&'static str, &'static str, u64)>,
    /// (status, path, how many)
    pub responses: Vec<(u16, &'static str, u64)>,
}

/// How late the event loop was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LagReading {
    /// Counts by [`PAUSE_BOUNDS_NS`].
    pub buckets: Vec<u64>,
    /// Of all of them.
    pub sum_ns: u64,
}

impl Slab {
    /// The requests in all, between two steps of whoever writes.
    pub fn ledger(&self) -> Ledger {
        let mut ledger = Ledger::default();
        for _ in 0..MOST_TRIES {
            let ended = self.words()[ENDED].load(Ordering::Acquire);
            ledger = Ledger {
                accepted: self.read(ACCEPTED_IN_ALL),
                answered: self.read(ANSWERED_IN_ALL),
                in_flight: self.read(IN_FLIGHT),
                lost: self.read(LOST),
            };
            fence(Ordering::Acquire);
            if self.words()[BEGUN].load(Ordering::Relaxed) == ended {
                break;
            }
            std::hint::spin_loop();
        }
        ledger
    }

    /// The series in which something was counted.
    pub fn series(&self) -> Vec<SeriesReading> {
        let counted = (0..SERIES).map(Series).filter(|&series| self.accepted(series) > 0);
        counted.map(|series| self.reading(series)).collect()
    }

    fn reading(&self, series: Series) -> SeriesReading {
        let word = |word: usize| self.read(self.place(series, word));
        let words = |start: usize, count: usize| (start..start + count).map(word);
        SeriesReading {
            model: self.model_of(series),
            endpoint: series.endpoint(),
            streaming: series.streaming(),
            accepted: self.accepted(series),
            answered: (FIRST_STATUS..).zip(words(ANSWERED, STATUSES)).filter(|&(_, count)| count > 0).collect(),
            attempts: word(ATTEMPTS),
            retries: word(RETRIES),
            duration_buckets: words(DURATIONS, self.buckets()).collect(),
            duration_sum_ns: word(DURATION_SUM_NS),
            first_byte_buckets: words(DURATIONS + self.buckets(), self.buckets()).collect(),
            first_byte_sum_ns: word(FIRST_BYTE_SUM_NS),
            chunks: word(CHUNKS),
            gap_buckets: words(GAPS, PAUSE_BUCKETS).collect(),
            gap_sum_ns: word(GAP_SUM_NS),
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
            connects: read(TargetCounter::Connects),
            reuses: read(TargetCounter::Reuses),
            request_bytes: read(TargetCounter::RequestBytes),
            response_bytes: read(TargetCounter::ResponseBytes),
        }
    }

    /// What else was answered.
    pub fn http(&self) -> HttpReading {
        let mut reading = HttpReading::default();
        for (row, &path) in PATHS.iter().enumerate() {
            let row = HTTP + row * HTTP_ROW;
            let methods = METHODS.iter().zip(row..).map(|(&method, word)| (method, path, self.read(word)));
            reading.requests.extend(methods.filter(|&(.., count)| count > 0));
            let statuses = (FIRST_STATUS..).zip(row + METHODS.len()..row + HTTP_ROW);
            let statuses = statuses.map(|(status, word)| (status, path, self.read(word)));
            reading.responses.extend(statuses.filter(|&(.., count)| count > 0));
        }
        reading
    }

    /// Retries by reason: counts for [`RETRY_REASONS`].
    pub fn retries(&self) -> [u64; RETRY_REASONS.len()] {
        std::array::from_fn(|reason| self.read(RETRIES_BY_REASON + reason))
    }

    /// How late the event loop was.
    pub fn lag(&self) -> LagReading {
        let buckets = (LAG..LAG + PAUSE_BUCKETS).map(|word| self.read(word)).collect();
        LagReading { buckets, sum_ns: self.read(LAG_SUM_NS) }
    }

    /// Decisions in which the shadow policy chose the same target, and in which it chose another.
    pub fn shadow_decisions(&self) -> (u64, u64) {
        (self.read(SHADOW_AGREED), self.read(SHADOW_DIFFERED))
    }

    /// How often the region's lock was somebody else's at first, and for how many ns in all.
    pub fn lock_waits(&self) -> (u64, u64) {
        (self.read(LOCK_WAITS), self.read(LOCK_WAIT_NS))
    }

    /// When the event loop turned last; 0: never.
    pub fn turned_ns(&self) -> u64 {
        self.read(TURNED_NS)
    }
}

impl std::ops::AddAssign for TargetReading {
    fn add_assign(&mut self, other: Self) {
        self.selections += other.selections;
        self.failures += other.failures;
        self.prompt_tokens += other.prompt_tokens;
        self.reported_cached_tokens += other.reported_cached_tokens;
        self.predicted_cached_tokens += other.predicted_cached_tokens;
        self.completion_tokens += other.completion_tokens;
        self.connects += other.connects;
        self.reuses += other.reuses;
        self.request_bytes += other.request_bytes;
        self.response_bytes += other.response_bytes;
    }
}
