//! Whether what a worker answers to real requests lets it get more of them: closed -> open -> half-open -> closed.
//!
//! Pure; kept per worker, in its head's slot. Only failures of the worker itself are put to it (see `Outcome::verdict`).
//! How many attempts hold a permit of a half-open breaker is counted with the loads, per process, so that a permit cannot leak.

/// Slices that the window is counted in: failures leave the count when their slice does, at most 1/8 of the window early.
const SLICES: usize = 8;

/// What it takes to open and to close.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// If not, a breaker stays closed for ever.
    pub enabled: bool,
    /// Failures within a window, no success between them, that open it.
    pub failures: u32,
    /// Successes that close a half-open one; also how many attempts may be out at once while it is half-open, since more could
    /// not be needed.
    pub successes: u32,
    /// From open to half-open.
    pub timeout_ns: u64,
    /// Failures older than this do not count.
    pub window_ns: u64,
}

/// The state, with what may end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breaker {
    /// Lets everything through.
    Closed {
        /// Since the last success.
        failures: Failures,
    },
    /// Lets nothing through.
    Open {
        /// Half-open from then on, if no good probe makes it so before.
        until_ns: u64,
    },
    /// Lets [`Limits::successes`] attempts through at a time.
    HalfOpen {
        /// Of attempts that had a permit.
        successes: u32,
    },
}

impl Breaker {
    /// Of a new worker.
    pub const NEW: Self = Self::Closed { failures: Failures::NONE };

    /// The state after an attempt that speaks for or against the worker. `had_permit`: it was let through half-open; others say
    /// nothing about a breaker that has opened since they began.
    #[must_use]
    pub fn observe(self, ok: bool, had_permit: bool, now_ns: u64, limits: &Limits) -> Self {
        match self {
            _ if !limits.enabled => self,
            Self::Closed { .. } if ok => Self::NEW,
            Self::Closed { failures } => {
                let failures = failures.add(now_ns, limits.window_ns);
                if failures.total() >= limits.failures {
                    Self::opened(now_ns, limits)
                } else {
                    Self::Closed { failures }
                }
            }
            Self::HalfOpen { successes } if had_permit && ok => {
                let successes = successes + 1;
                if successes >= limits.successes { Self::NEW } else { Self::HalfOpen { successes } }
            }
            Self::HalfOpen { .. } if had_permit => Self::opened(now_ns, limits),
            Self::HalfOpen { .. } | Self::Open { .. } => self,
        }
    }

    /// The state after a good probe: an open breaker need not wait for its time.
    #[must_use]
    pub fn probed(self) -> Self {
        if let Self::Open { .. } = self { Self::HalfOpen { successes: 0 } } else { self }
    }

    /// The state when it is `now_ns`.
    #[must_use]
    pub fn at(self, now_ns: u64) -> Self {
        match self {
            Self::Open { until_ns } if now_ns >= until_ns => Self::HalfOpen { successes: 0 },
            _ => self,
        }
    }

    /// Whether one more attempt may go through while `permits` are out.
    pub fn admits(self, permits: u64, limits: &Limits) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Open { .. } => false,
            Self::HalfOpen { .. } => permits < u64::from(limits.successes),
        }
    }

    /// Whether attempts need a permit.
    pub fn is_half_open(self) -> bool {
        matches!(self, Self::HalfOpen { .. })
    }

    /// The state's name, for logs and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Closed { .. } => "closed",
            Self::Open { .. } => "open",
            Self::HalfOpen { .. } => "half_open",
        }
    }

    /// Failures that count now.
    pub fn consecutive_failures(self) -> u32 {
        if let Self::Closed { failures } = self { failures.total() } else { 0 }
    }

    /// Successes that count towards closing.
    pub fn consecutive_successes(self) -> u32 {
        if let Self::HalfOpen { successes } = self { successes } else { 0 }
    }

    fn opened(now_ns: u64, limits: &Limits) -> Self {
        Self::Open { until_ns: now_ns.saturating_add(limits.timeout_ns) }
    }

    /// As words of the region; zeros are [`Breaker::NEW`].
    pub(crate) fn to_words(self) -> [u64; 4] {
        match self {
            Self::Closed { failures } => {
                let half = |from: usize| {
                    let counts = &failures.counts[from..from + SLICES / 2];
                    counts.iter().rev().fold(0, |word, &count| word << 16 | u64::from(count))
                };
                [0, failures.slice, half(0), half(SLICES / 2)]
            }
            Self::Open { until_ns } => [1, until_ns, 0, 0],
            Self::HalfOpen { successes } => [2, u64::from(successes), 0, 0],
        }
    }

    pub(crate) fn from_words(words: [u64; 4]) -> Self {
        match words[0] {
            0 => {
                let counts = std::array::from_fn(|index| (words[2 + index / 4] >> (index % 4 * 16)) as u16);
                Self::Closed { failures: Failures { slice: words[1], counts } }
            }
            1 => Self::Open { until_ns: words[1] },
            _ => Self::HalfOpen { successes: words[1] as u32 },
        }
    }
}

/// Failures of the last window, counted per slice of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failures {
    /// Number of the newest slice since time began.
    slice: u64,
    /// By slice number modulo [`SLICES`].
    counts: [u16; SLICES],
}

impl Failures {
    const NONE: Self = Self { slice: 0, counts: [0; SLICES] };

    fn add(mut self, now_ns: u64, window_ns: u64) -> Self {
        // Time that runs backwards between processes counts as the newest slice.
        let slice = (now_ns / (window_ns / SLICES as u64).max(1)).max(self.slice);
        for passed in (self.slice + 1..=slice).rev().take(SLICES) {
            self.counts[passed as usize % SLICES] = 0;
        }
        self.slice = slice;
        let count = &mut self.counts[slice as usize % SLICES];
        *count = count.saturating_add(1);
        self
    }

    fn total(self) -> u32 {
        self.counts.iter().map(|&count| u32::from(count)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { enabled: true, failures: 3, successes: 2, timeout_ns: 60, window_ns: 80 };

    enum Step {
        Good,
        Bad,
        PermitGood,
        PermitBad,
        Probe,
        Wait(u64),
    }
    use Step::{Bad, Good, PermitBad, PermitGood, Probe, Wait};

    fn run(steps: &[Step], limits: &Limits) -> Breaker {
        let mut now_ns = 1_000_000;
        steps.iter().fold(Breaker::NEW, |breaker, step| {
            let next = match step {
                Good => breaker.observe(true, false, now_ns, limits),
                Bad => breaker.observe(false, false, now_ns, limits),
                PermitGood => breaker.observe(true, true, now_ns, limits),
                PermitBad => breaker.observe(false, true, now_ns, limits),
                Probe => breaker.probed(),
                Wait(ns) => {
                    now_ns += ns;
                    breaker.at(now_ns)
                }
            };
            assert_eq!(Breaker::from_words(next.to_words()), next);
            next
        })
    }

    #[test]
    fn states() {
        let table: &[(&str, &[Step], &str)] = &[
            ("born closed", &[], "closed"),
            ("below the threshold", &[Bad, Bad], "closed"),
            ("at the threshold", &[Bad, Bad, Bad], "open"),
            ("a success between", &[Bad, Bad, Good, Bad, Bad], "closed"),
            ("a success before", &[Good, Bad, Bad, Bad], "open"),
            ("failures within the window", &[Bad, Wait(30), Bad, Wait(30), Bad], "open"),
            ("the first left the window", &[Bad, Wait(50), Bad, Wait(50), Bad], "closed"),
            ("all left the window", &[Bad, Bad, Wait(1000), Bad, Bad], "closed"),
            ("open before its time", &[Bad, Bad, Bad, Wait(59)], "open"),
            ("half-open when it is time", &[Bad, Bad, Bad, Wait(60)], "half_open"),
            ("half-open by a good probe", &[Bad, Bad, Bad, Probe], "half_open"),
            ("a good probe of a closed one", &[Bad, Bad, Probe], "closed"),
            ("late answers do not close", &[Bad, Bad, Bad, Good, Good, Good], "open"),
            ("nor when half-open", &[Bad, Bad, Bad, Probe, Good, Good, Good], "half_open"),
            ("nor do late failures open", &[Bad, Bad, Bad, Probe, Bad], "half_open"),
            ("one success of two", &[Bad, Bad, Bad, Probe, PermitGood], "half_open"),
            ("two", &[Bad, Bad, Bad, Probe, PermitGood, PermitGood], "closed"),
            ("a failure reopens", &[Bad, Bad, Bad, Probe, PermitGood, PermitBad], "open"),
            ("for a whole time-out", &[Bad, Bad, Bad, Wait(60), PermitBad, Wait(59)], "open"),
            ("and no longer", &[Bad, Bad, Bad, Wait(60), PermitBad, Wait(60)], "half_open"),
            ("closing forgets", &[Bad, Bad, Bad, Probe, PermitGood, PermitGood, Bad, Bad], "closed"),
        ];
        for (what, steps, expected) in table {
            assert_eq!(run(steps, &LIMITS).name(), *expected, "{what}");
        }
    }

    #[test]
    fn disabled_it_stays_closed() {
        let limits = Limits { enabled: false, ..LIMITS };
        let breaker = run(&[Bad, Bad, Bad, Bad, Bad], &limits);
        assert_eq!(breaker, Breaker::NEW);
    }

    #[test]
    fn half_open_admits_as_many_as_it_needs() {
        let half_open = Breaker::HalfOpen { successes: 0 };
        assert!(half_open.admits(0, &LIMITS) && half_open.admits(1, &LIMITS));
        assert!(!half_open.admits(2, &LIMITS));
        assert!(!Breaker::Open { until_ns: 0 }.admits(0, &LIMITS));
        assert!(Breaker::NEW.admits(1_000_000, &LIMITS));
    }

    #[test]
    fn the_window_has_room_for_large_thresholds() {
        let limits = Limits { failures: 5_000, ..LIMITS };
        let mut breaker = Breaker::NEW;
        for _ in 0..4_999 {
            breaker = breaker.observe(false, false, 5, &limits);
        }
        assert_eq!(breaker.consecutive_failures(), 4_999);
        assert_eq!(breaker.observe(false, false, 6, &limits).name(), "open");
        assert_eq!(Breaker::from_words([0; 4]), Breaker::NEW);
    }
}
