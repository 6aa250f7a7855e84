//! Admission: how many requests may run at once over all processes, how many may wait, and how fast they may come.
//!
//! What runs and what waits is counted per process, each process writing its own column, so that those of a dead process can be
//! zeroed. Who waits, and in which order, is each process's own business.

/// Whoever may come per second may come at once after a quiet second.
const BURST_SECONDS: f64 = 1.0;
const SECOND: f64 = 1e9;

const TOKENS: usize = 0;
const REFILLED_NS: usize = 1;
const LET_IN: usize = 2;
const REJECTED: usize = 3;
const HEADER_WORDS: usize = 8;

/// Of a process.
const RUNNING: usize = 0;
const WAITING: usize = 1;
const COLUMN: usize = 2;

/// Words of the region that it takes.
pub(crate) fn words(processes: usize) -> usize {
    HEADER_WORDS + processes * COLUMN
}

/// What is limited.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests that run at once; 0: any number.
    pub concurrent: u64,
    /// Requests that wait for their turn.
    pub queue: u64,
    /// Requests that begin per second; 0: any number.
    pub per_second: f64,
}

/// Whether a request may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It runs from now on.
    Now,
    /// Not before this time has passed.
    After(u64),
    /// Not before another one has ended.
    AfterAnother,
}

/// What becomes of a request that comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It runs from now on.
    Runs,
    /// It waits from now on.
    Waits,
    /// Too many wait already.
    Refused,
}

/// Requests under limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// At this time, over all processes.
    pub running: u64,
    /// At this time, over all processes.
    pub waiting: u64,
    /// Since the region was made.
    pub let_in: u64,
    /// Since the region was made: too many waited, or it waited for too long.
    pub rejected: u64,
}

/// A view of the words, as one process sees them.
pub struct Admission<'m> {
    words: &'m mut [u64],
    process: usize,
}

impl<'m> Admission<'m> {
    pub(crate) fn new(words: &'m mut [u64], process: usize) -> Self {
        Self { words, process }
    }

    /// One comes. Whoever waits, in whatever process, is before it.
    pub fn enter(&mut self, limits: &Limits, now_ns: u64) -> Entry {
        let waiting = self.sum(WAITING);
        if waiting == 0 && self.take(limits, now_ns) == Turn::Now {
            return Entry::Runs;
        }
        if waiting >= limits.queue {
            self.words[REJECTED] += 1;
            return Entry::Refused;
        }
        *self.own(WAITING) += 1;
        Entry::Waits
    }

    /// Whether one that waits in this process may run. `Now`: it does not wait any more.
    pub fn next(&mut self, limits: &Limits, now_ns: u64) -> Turn {
        let turn = self.take(limits, now_ns);
        if turn == Turn::Now {
            self.count_down(WAITING);
        }
        turn
    }

    /// One that ran in this process has ended. Whether anybody waits.
    pub fn leave(&mut self) -> bool {
        self.count_down(RUNNING);
        self.sum(WAITING) > 0
    }

    /// One that waited in this process does not any more: its client left, or `refused`, it waited for too long.
    pub fn withdraw(&mut self, refused: bool) {
        self.count_down(WAITING);
        self.words[REJECTED] += u64::from(refused);
    }

    /// As they stand now.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.sum(RUNNING),
            waiting: self.sum(WAITING),
            let_in: self.words[LET_IN],
            rejected: self.words[REJECTED],
        }
    }

    /// Nothing runs or waits in that process any more.
    pub(crate) fn clear_process(&mut self, process: usize) {
        let start = HEADER_WORDS + process * COLUMN;
        if let Some(column) = self.words.get_mut(start..start + COLUMN) {
            column.fill(0);
        }
    }

    fn take(&mut self, limits: &Limits, now_ns: u64) -> Turn {
        if limits.concurrent > 0 && self.sum(RUNNING) >= limits.concurrent {
            return Turn::AfterAnother;
        }
        if limits.per_second > 0.0 {
            let most = (limits.per_second * BURST_SECONDS).max(1.0);
            // All of them at first: nothing was ever taken.
            let elapsed = now_ns.saturating_sub(self.words[REFILLED_NS]) as f64 / SECOND;
            let mut tokens = (f64::from_bits(self.words[TOKENS]) + elapsed * limits.per_second).min(most);
            let taken = tokens >= 1.0;
            tokens -= f64::from(u8::from(taken));
            self.words[REFILLED_NS] = now_ns;
            self.words[TOKENS] = tokens.to_bits();
            if !taken {
                return Turn::After(((1.0 - tokens) / limits.per_second * SECOND).ceil() as u64);
            }
        }
        *self.own(RUNNING) += 1;
        self.words[LET_IN] += 1;
        Turn::Now
    }

    fn sum(&self, field: usize) -> u64 {
        self.words[HEADER_WORDS..].iter().skip(field).step_by(COLUMN).sum()
    }

    fn own(&mut self, field: usize) -> &mut u64 {
        &mut self.words[HEADER_WORDS + self.process * COLUMN + field]
    }

    fn count_down(&mut self, field: usize) {
        let word = self.own(field);
        *word = word.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn the_limit_is_one_for_all_processes() {
        let mut words = vec![0; words(3)];
        let limits = Limits { concurrent: 2, queue: 2, per_second: 0.0 };
        let enter = |words: &mut Vec<u64>, process| Admission::new(words, process).enter(&limits, 0);
        let entries = [0, 1, 2, 0, 1].map(|process| enter(&mut words, process));
        assert_eq!(entries, [Entry::Runs, Entry::Runs, Entry::Waits, Entry::Waits, Entry::Refused]);
        assert_eq!(Admission::new(&mut words, 2).next(&limits, 0), Turn::AfterAnother);
        assert!(Admission::new(&mut words, 1).leave());
        // Nobody overtakes those who wait, though there is room.
        Admission::new(&mut words, 0).withdraw(true);
        assert_eq!(enter(&mut words, 1), Entry::Waits);
        assert_eq!(Admission::new(&mut words, 2).next(&limits, 0), Turn::Now);
        Admission::new(&mut words, 1).withdraw(false);
        assert!(!Admission::new(&mut words, 0).leave());
        let counts = Admission::new(&mut words, 0).counts();
        assert_eq!(counts, Counts { running: 1, waiting: 0, let_in: 3, rejected: 2 });
        Admission::new(&mut words, 0).clear_process(2);
        assert_eq!(Admission::new(&mut words, 0).counts().running, 0);
    }

    #[test]
    fn a_rate_lets_a_seconds_worth_in_at_once_and_then_one_by_one() {
        let mut words = vec![0; words(2)];
        let limits = Limits { concurrent: 0, queue: 1, per_second: 4.0 };
        let start = 1_000_000 * MS;
        for process in [0, 1, 0, 1] {
            assert_eq!(Admission::new(&mut words, process).enter(&limits, start), Entry::Runs);
        }
        assert_eq!(Admission::new(&mut words, 0).enter(&limits, start), Entry::Waits);
        assert_eq!(Admission::new(&mut words, 0).next(&limits, start + 50 * MS), Turn::After(200 * MS));
        assert_eq!(Admission::new(&mut words, 0).next(&limits, start + 250 * MS), Turn::Now);
        assert_eq!(Admission::new(&mut words, 1).enter(&limits, start + 250 * MS), Entry::Waits);
    }
}
