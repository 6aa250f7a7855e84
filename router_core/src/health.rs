//! Whether a worker answers its probes: pending -> ready <-> unhealthy. Pure; kept per worker, in its head's slot.
//!
//! Nothing is born healthy, and no state is absorbing: enough good probes make any state ready.

/// What probes in a row it takes to change one's mind.
#[derive(Clone, Copy, Debug)]
pub struct Thresholds {
    /// Failures in a row that make a ready worker unhealthy.
    pub failure: u32,
    /// Successes in a row that make a pending or unhealthy worker ready.
    pub success: u32,
}

/// The state, with the streak that may end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Registered, not yet ready for the first time.
    Pending {
        /// Good probes in a row.
        successes: u32,
    },
    /// May get requests.
    Ready {
        /// Bad probes in a row.
        failures: u32,
    },
    /// Was ready once.
    Unhealthy {
        /// Good probes in a row.
        successes: u32,
    },
}

impl Health {
    /// A worker that was never probed.
    pub const NEW: Self = Self::Pending { successes: 0 };

    /// The state after a probe that went well or not.
    #[must_use]
    pub fn observe(self, ok: bool, thresholds: Thresholds) -> Self {
        match self {
            Self::Pending { successes } | Self::Unhealthy { successes }
                if ok && successes + 1 >= thresholds.success =>
            {
                Self::Ready { failures: 0 }
            }
            Self::Pending { successes } => Self::Pending { successes: if ok { successes + 1 } else { 0 } },
            Self::Unhealthy { successes } => Self::Unhealthy { successes: if ok { successes + 1 } else { 0 } },
            Self::Ready { failures } if !ok && failures + 1 >= thresholds.failure => Self::Unhealthy { successes: 0 },
            Self::Ready { failures } => Self::Ready { failures: if ok { 0 } else { failures + 1 } },
        }
    }

    /// Whether a worker in this state may get requests.
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Ready { .. })
    }

    /// The state's name, for logs and the admin API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending { .. } => "pending",
            Self::Ready { .. } => "ready",
            Self::Unhealthy { .. } => "unhealthy",
        }
    }

    /// As one word of the region; 0 is [`Health::NEW`].
    pub(crate) fn to_word(self) -> u64 {
        let (tag, streak) = match self {
            Self::Pending { successes } => (0, successes),
            Self::Ready { failures } => (1, failures),
            Self::Unhealthy { successes } => (2, successes),
        };
        tag | u64::from(streak) << 32
    }

    pub(crate) fn from_word(word: u64) -> Self {
        let streak = (word >> 32) as u32;
        match word & 0xFF {
            0 => Self::Pending { successes: streak },
            1 => Self::Ready { failures: streak },
            _ => Self::Unhealthy { successes: streak },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_count_in_a_row() {
        let table: &[(&str, &str)] = &[
            ("", "pending"),
            ("+", "pending"),
            ("+-+", "pending"),
            ("----------", "pending"),
            ("++", "ready"),
            ("++--", "ready"),
            ("++--+--", "ready"),
            ("++---", "unhealthy"),
            ("++---+", "unhealthy"),
            ("++---+-+", "unhealthy"),
            ("++---++", "ready"),
            ("++---++--", "ready"),
            ("++---++---++", "ready"),
        ];
        for (probes, expected) in table {
            let thresholds = Thresholds { failure: 3, success: 2 };
            let health = probes.chars().fold(Health::NEW, |health, probe| {
                let next = health.observe(probe == '+', thresholds);
                assert_eq!(Health::from_word(next.to_word()), next);
                next
            });
            assert_eq!(health.name(), *expected, "after {probes:?}");
            assert_eq!(health.is_ready(), *expected == "ready");
        }
    }

    #[test]
    fn thresholds_of_one_act_at_once() {
        let thresholds = Thresholds { failure: 1, success: 1 };
        let ready = Health::NEW.observe(true, thresholds);
        assert!(ready.is_ready());
        assert_eq!(ready.observe(false, thresholds), Health::Unhealthy { successes: 0 });
        assert_eq!(Health::from_word(0), Health::NEW);
    }
}
