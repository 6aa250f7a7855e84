//! How fast a target is, learned from its answers, and how much prompt it still has to read.
//!
//! Two straight lines are fitted to what answers show, by least squares over the last hundred or so: the time to the first token
//! over the prompt tokens that were queued before it, and the time between tokens over the requests that were in flight. Only
//! streamed answers show them. What is queued is not told by anybody: it rises with every request sent and drains at the learned
//! rate.

/// Words of the region that one target's speed takes: two cache lines.
pub(crate) const WORDS: usize = 16;

/// What is believed before anything is known: a mid-range accelerator with a model of 8 billion parameters.
const PRIOR_FIRST_TOKEN: Line = Line::through(0.02, 1.0 / 8_000.0, 4_000.0);
const PRIOR_STEP: Line = Line::through(0.01, 0.000_3, 32.0);
const PRIOR_ANSWER_TOKENS: f64 = 256.0;

/// What one more answer weighs.
const LEARNING_RATE: f64 = 1.0 / 64.0;

/// A prompt token takes at least this long, and no queue drains faster.
const LEAST_SECONDS_PER_TOKEN: f64 = 1e-7;

const NANOSECONDS: f64 = 1e9;

/// Observations of y over x, as sums that decay.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    count: f64,
    x: f64,
    y: f64,
    xx: f64,
    xy: f64,
}

impl Line {
    /// As if two groups of four observations had been made on the line `y = start + slope x`, at 0 and at `x`.
    const fn through(start: f64, slope: f64, x: f64) -> Self {
        let end = start + slope * x;
        Self { count: 8.0, x: 4.0 * x, y: 4.0 * (start + end), xx: 4.0 * x * x, xy: 4.0 * x * end }
    }

    fn observe(&mut self, x: f64, y: f64) {
        let kept = 1.0 - LEARNING_RATE;
        self.count = self.count * kept + 1.0;
        self.x = self.x * kept + x;
        self.y = self.y * kept + y;
        self.xx = self.xx * kept + x * x;
        self.xy = self.xy * kept + x * y;
    }

    /// (start, slope), neither below 0: waiting behind more work is never faster.
    fn fit(&self) -> (f64, f64) {
        let spread = self.count * self.xx - self.x * self.x;
        // All observations at one place say nothing of the slope.
        let slope = if spread > 1e-9 * self.count * self.xx {
            ((self.count * self.xy - self.x * self.y) / spread).max(0.0)
        } else {
            0.0
        };
        (((self.y - slope * self.x) / self.count).max(0.0), slope)
    }

    fn to_words(self) -> [u64; 5] {
        [self.count, self.x, self.y, self.xx, self.xy].map(f64::to_bits)
    }

    fn from_words(words: &[u64]) -> Option<Self> {
        let &[count, x, y, xx, xy] = words.first_chunk()?;
        let [count, x, y, xx, xy] = [count, x, y, xx, xy].map(f64::from_bits);
        (count > 0.0).then_some(Self { count, x, y, xx, xy })
    }
}

/// What one streamed answer shows.
#[derive(Clone, Copy, Debug)]
pub struct Observation {
    /// Prompt tokens that were queued when it was sent, its own uncached ones included.
    pub queued_tokens: f64,
    /// From sending it to its first byte.
    pub first_token_seconds: f64,
    /// Requests that were in flight when it was sent.
    pub load: u64,
    /// Mean time between the tokens after the first.
    pub step_seconds: f64,
}

/// One target's speed. Words that are all zero are what is believed of a new one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    first_token: Line,
    step: Line,
    answer_tokens: f64,
    queued_tokens: f64,
    queued_at_ns: u64,
}

impl Speed {
    /// Of a target that nobody has heard of.
    pub const NEW: Self = Self {
        first_token: PRIOR_FIRST_TOKEN,
        step: PRIOR_STEP,
        answer_tokens: PRIOR_ANSWER_TOKENS,
        queued_tokens: 0.0,
        queued_at_ns: 0,
    };

    /// Seconds of reading for each uncached prompt token.
    pub fn seconds_per_prompt_token(&self) -> f64 {
        self.first_token.fit().1.max(LEAST_SECONDS_PER_TOKEN)
    }

    /// (seconds of a step with nothing in it, seconds that each request in flight adds to it)
    pub fn step_seconds(&self) -> (f64, f64) {
        self.step.fit()
    }

    /// Tokens of an answer, on average.
    pub fn answer_tokens(&self) -> f64 {
        self.answer_tokens
    }

    /// Prompt tokens that are still to be read.
    pub fn queued_tokens(&self, now_ns: u64) -> f64 {
        let seconds = now_ns.saturating_sub(self.queued_at_ns) as f64 / NANOSECONDS;
        (self.queued_tokens - seconds / self.seconds_per_prompt_token()).max(0.0)
    }

    /// A request of `tokens` uncached prompt tokens is sent; how many are queued now.
    pub fn queue(&mut self, tokens: f64, now_ns: u64) -> f64 {
        self.queued_tokens = self.queued_tokens(now_ns) + tokens;
        self.queued_at_ns = now_ns;
        self.queued_tokens
    }

    /// A request of `tokens` uncached prompt tokens will not be read after all.
    pub fn unqueue(&mut self, tokens: f64, now_ns: u64) {
        self.queued_tokens = (self.queued_tokens(now_ns) - tokens).max(0.0);
        self.queued_at_ns = now_ns;
    }

    /// An answer of that many tokens.
    pub fn learn_answer(&mut self, tokens: u64) {
        self.answer_tokens += (tokens as f64 - self.answer_tokens) * LEARNING_RATE;
    }

    /// A streamed answer.
    pub fn learn(&mut self, seen: &Observation) {
        self.first_token.observe(seen.queued_tokens, seen.first_token_seconds);
        self.step.observe(seen.load as f64, seen.step_seconds);
    }

    pub(crate) fn to_words(self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        words[..5].copy_from_slice(&self.first_token.to_words());
        words[5..10].copy_from_slice(&self.step.to_words());
        words[10] = self.answer_tokens.to_bits();
        words[11] = self.queued_tokens.to_bits();
        words[12] = self.queued_at_ns;
        words
    }

    pub(crate) fn from_words(words: &[u64; WORDS]) -> Self {
        let lines = Line::from_words(&words[..5]).zip(Line::from_words(&words[5..10]));
        let Some((first_token, step)) = lines else { return Self::NEW };
        Self {
            first_token,
            step,
            answer_tokens: f64::from_bits(words[10]),
            queued_tokens: f64::from_bits(words[11]),
            queued_at_ns: words[12],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn both_lines_are_learned() {
        let mut speed = Speed::NEW;
        for turn in 0..1_000 {
            let (queued_tokens, load) = (f64::from(turn % 7) * 1_000.0, turn as u64 % 11);
            speed.learn(&Observation {
                queued_tokens,
                first_token_seconds: 0.1 + queued_tokens / 2_000.0,
                load,
                step_seconds: 0.03 + load as f64 * 0.001,
            });
            speed.learn_answer(1_000);
        }
        let (step, per_request) = speed.step_seconds();
        assert!((speed.seconds_per_prompt_token() - 1.0 / 2_000.0).abs() < 1e-6);
        assert!((step - 0.03).abs() < 1e-4 && (per_request - 0.001).abs() < 1e-5, "{step} {per_request}");
        assert!((speed.answer_tokens() - 1_000.0).abs() < 1.0);
        assert_eq!(Speed::from_words(&speed.to_words()), speed);
    }

    #[test]
    fn a_line_never_falls_and_one_place_has_no_slope() {
        let mut falling = PRIOR_STEP;
        (0..1_000).for_each(|turn| falling.observe(f64::from(turn % 10), 1.0 - f64::from(turn % 10) / 20.0));
        assert_eq!(falling.fit().1, 0.0);
        let mut at_one_place = PRIOR_STEP;
        (0..10_000).for_each(|_| at_one_place.observe(3.0, 0.5));
        let (start, slope) = at_one_place.fit();
        assert!((start + 3.0 * slope - 0.5).abs() < 1e-6, "{start} {slope}");
    }

    #[test]
    fn a_queue_drains_at_the_learned_rate() {
        let mut speed = Speed::from_words(&[0; WORDS]);
        assert_eq!(speed, Speed::NEW);
        assert_eq!(speed.queue(16_000.0, SECOND), 16_000.0);
        assert!((speed.queued_tokens(2 * SECOND) - 8_000.0).abs() < 1e-3);
        assert!((speed.queue(1_000.0, 2 * SECOND) - 9_000.0).abs() < 1e-3);
        speed.unqueue(1_000.0, 2 * SECOND);
        assert!((speed.queued_tokens(2 * SECOND) - 8_000.0).abs() < 1e-3);
        assert_eq!(speed.queued_tokens(9 * SECOND), 0.0);
        assert_eq!(speed.queued_tokens(0), 8_000.0, "time does not run backwards");
    }
}
