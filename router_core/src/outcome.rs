//! How an attempt ended, and what that says: about the worker, about the claim on its cache, about where to try next.

/// How one attempt at a target ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutcomeKind {
    /// The worker's response arrived whole, whatever its status.
    Answered,
    /// Refused, unreachable or timed out before the request was sent.
    ConnectFailed,
    /// Sent, then nothing: reset, closed, garbage or timed out before any byte of the answer.
    NoAnswer,
    /// The answer broke off after it had begun.
    BrokenStream,
    /// The client went away.
    Cancelled,
}

/// The facts of one attempt. -1 stands for unknown.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// How it ended.
    pub kind: OutcomeKind,
    /// The worker's status; 0 if it gave none.
    pub status: u16,
    /// When the first byte of the answer came, on the clock of `now_ns`; None: none came.
    pub first_byte_ns: Option<u64>,
    /// Of the routed text, as the worker's tokenizer counts.
    pub prompt_tokens: i64,
    /// Generated.
    pub completion_tokens: i64,
    /// Of the prompt's, found in the worker's cache.
    pub cached_tokens: i64,
}

impl Outcome {
    /// Of a lease that was dropped: nobody wanted its answer.
    pub const CANCELLED: Self = Self {
        kind: OutcomeKind::Cancelled,
        status: 0,
        first_byte_ns: None,
        prompt_tokens: -1,
        completion_tokens: -1,
        cached_tokens: -1,
    };

    /// Whether it speaks for (true) or against the worker; None: it says nothing about it. What the client did wrong (4xx), asked
    /// too often (429) or what the worker does not implement (501) does neither.
    pub fn verdict(&self) -> Option<bool> {
        match self.kind {
            OutcomeKind::Answered => match self.status {
                501 => None,
                500.. => Some(false),
                400.. => None,
                _ => Some(true),
            },
            OutcomeKind::ConnectFailed | OutcomeKind::NoAnswer | OutcomeKind::BrokenStream => Some(false),
            OutcomeKind::Cancelled => None,
        }
    }

    /// Whether the worker never took in the prompt, so that the lease's claim on its cache is void.
    pub fn voids_claim(&self) -> bool {
        matches!(self.kind, OutcomeKind::ConnectFailed | OutcomeKind::NoAnswer)
    }

    /// Whether the same request should rather go to another worker.
    pub fn excludes_worker(&self) -> bool {
        match self.kind {
            OutcomeKind::ConnectFailed | OutcomeKind::NoAnswer => true,
            OutcomeKind::Answered => matches!(self.status, 408 | 429 | 500 | 502 | 503 | 504),
            _ => false,
        }
    }

    /// Whether the worker may be dead, so that it should be asked at once.
    pub fn wants_probe(&self) -> bool {
        matches!(self.kind, OutcomeKind::ConnectFailed | OutcomeKind::NoAnswer | OutcomeKind::BrokenStream)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use OutcomeKind::*;

    #[test]
    fn what_outcomes_say() {
        let table = [
            // kind, status, verdict, voids the claim, excludes the worker, wants a probe
            (Answered, 200, Some(true), false, false, false),
            (Answered, 302, Some(true), false, false, false),
            (Answered, 400, None, false, false, false),
            (Answered, 404, None, false, false, false),
            (Answered, 408, None, false, true, false),
            (Answered, 429, None, false, true, false),
            (Answered, 500, Some(false), false, true, false),
            (Answered, 501, None, false, false, false),
            (Answered, 503, Some(false), false, true, false),
            (Answered, 505, Some(false), false, false, false),
            (ConnectFailed, 0, Some(false), true, true, true),
            (NoAnswer, 0, Some(false), true, true, true),
            (BrokenStream, 200, Some(false), false, false, true),
            (Cancelled, 0, None, false, false, false),
        ];
        for (kind, status, verdict, voids, excludes, probe) in table {
            let outcome = Outcome { kind, status, ..Outcome::CANCELLED };
            let said = (outcome.verdict(), outcome.voids_claim(), outcome.excludes_worker(), outcome.wants_probe());
            assert_eq!(said, (verdict, voids, excludes, probe), "{kind:?} {status}");
        }
    }
}
