//! When the pieces of a body came.

use crate::metrics::{PAUSE_BUCKETS, pause_bucket};

/// Counts the pieces of one body, and the times between them.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    /// Pieces.
    pub chunks: u32,
    /// In all of them.
    pub bytes: u64,
    /// Times between two pieces, by `metrics::PAUSE_BOUNDS_NS`.
    pub gaps: [u32; PAUSE_BUCKETS],
    /// Of all of those times.
    pub gap_sum_ns: u64,
    last_ns: u64,
}

impl Arrivals {
    /// `bytes` have come. None: the body is about to begin.
    #[inline]
    pub fn piece(&mut self, bytes: usize, now_ns: u64) {
        let since_ns = now_ns.saturating_sub(self.last_ns);
        let has_begun = self.last_ns > 0;
        self.last_ns = now_ns;
        if bytes > 0 {
            self.chunks = self.chunks.saturating_add(1);
            self.bytes += bytes as u64;
            if has_begun {
                self.gaps[pause_bucket(since_ns)] += 1;
                self.gap_sum_ns += since_ns;
            }
        }
    }

    /// When the last piece came; 0: none did.
    pub fn last_ns(&self) -> u64 {
        self.last_ns
    }
}
