//! When loads are out of balance, and which queues count as equally short then.

/// The share of [`Balance::absolute`] within which queues are equally short: an eighth of the imbalance that the operator
/// tolerates. Affinity is worth a few requests of waiting, not the imbalance that is to be undone.
const NEAR_SHARE: u64 = 8;

/// Loads are out of balance when they differ by more than both say.
#[derive(Clone, Copy, Debug)]
pub struct Balance {
    /// Requests between the longest and the shortest queue.
    pub absolute: u64,
    /// The longest queue as a multiple of the shortest.
    pub relative: f64,
}

impl Balance {
    /// Whether a fleet with these shortest and longest queues is out of balance. Both tests are strict, as sglang-router's.
    pub fn is_lost(&self, shortest: u64, longest: u64) -> bool {
        longest - shortest > self.absolute && longest as f64 > shortest as f64 * self.relative
    }

    /// The longest queue that is short enough for a prompt that nobody holds: half of the imbalance that is tolerated. It comes
    /// once, where affinity comes again and again.
    pub fn short(&self, shortest: u64) -> u64 {
        shortest.saturating_add(self.absolute / 2)
    }

    /// The longest queue that is nearly as short as the shortest.
    pub fn near(&self, shortest: u64) -> u64 {
        shortest.saturating_add(self.absolute / NEAR_SHARE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_must_be_passed() {
        let table = [
            // shortest, longest, absolute, relative, lost
            (0, 32, 32, 1.5, false),
            (0, 33, 32, 1.5, true),
            (100, 140, 32, 1.5, false),
            (100, 150, 32, 1.5, false),
            (100, 151, 32, 1.5, true),
            (7, 7, 0, 1.0, false),
            (7, 8, 0, 1.0, true),
            (7, 8, 0, 0.0, true),
            (0, 1, 0, 1e300, true),
        ];
        for (shortest, longest, absolute, relative, lost) in table {
            let balance = Balance { absolute, relative };
            assert_eq!(balance.is_lost(shortest, longest), lost, "{shortest}..{longest} of {absolute}, {relative}");
        }
        assert_eq!(Balance { absolute: 32, relative: 1.5 }.near(10), 14);
        assert_eq!(Balance { absolute: 7, relative: 1.5 }.near(10), 10);
    }
}
