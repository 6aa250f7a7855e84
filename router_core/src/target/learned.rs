//! What a target's answers have taught: how much text a token is, how much of its cache keeps prefixes, how fast it is.

use super::{Field, RECORD, RECORDS, SPEED, Targets};
use crate::speed::{self, Speed};

/// What an answer weighs in the ratio of text to tokens: with 1/16, the last 16 answers or so decide.
const LEARNING_RATE: f64 = 1.0 / 16.0;

/// The age from which a prefix that is missing says something about the size of the cache.
const OLD: f64 = 0.125;
/// Alike, so that the credit settles where as much is found unexpectedly as is missed.
const SHRINK: f64 = 0.98;
const GROW: f64 = 1.0 / SHRINK;
const LEAST_CACHED_SHARE: f64 = 1.0 / 64.0;

/// Bytes of text per token of a target that has not answered yet: English text in the tokenizers of Llama 3 and Qwen 2.5 has
/// 4 to 4.5 characters a token.
const PRIOR_BYTES_PER_TOKEN: f64 = 4.0;

impl Targets<'_> {
    /// Bytes of routed text per prompt token, as its answers have shown.
    pub fn bytes_per_token(&self, slot: u16) -> f64 {
        let bytes = f64::from_bits(self.get(Field::LearnedBytes, slot));
        let tokens = f64::from_bits(self.get(Field::LearnedTokens, slot));
        if tokens > 0.0 && bytes > 0.0 { bytes / tokens } else { PRIOR_BYTES_PER_TOKEN }
    }

    /// How fast it is.
    pub fn speed(&self, slot: u16) -> Speed {
        let words = &self.words[RECORDS + usize::from(slot) * RECORD + SPEED..];
        words.first_chunk().map_or(Speed::NEW, Speed::from_words)
    }

    pub(crate) fn set_speed(&mut self, slot: u16, speed: &Speed) {
        let start = RECORDS + usize::from(slot) * RECORD + SPEED;
        self.words[start..start + speed::WORDS].copy_from_slice(&speed.to_words());
    }

    /// An answer says that `bytes` of routed text were `tokens` prompt tokens. Sums decay, not ratios: a long prompt tells more.
    pub(crate) fn learn(&mut self, slot: u16, bytes: u64, tokens: u64) {
        for (field, amount) in [(Field::LearnedBytes, bytes), (Field::LearnedTokens, tokens)] {
            let decayed = f64::from_bits(self.get(field, slot)) * (1.0 - LEARNING_RATE);
            self.set(field, slot, (decayed + amount as f64).to_bits());
        }
    }

    /// The part of its KV capacity that caches prefixes: the rest is taken by requests in flight, or evicted by other rules.
    pub fn cached_share(&self, slot: u16) -> f64 {
        let share = f64::from_bits(self.get(Field::CachedShare, slot));
        if share > 0.0 { share.min(1.0) } else { 1.0 }
    }

    pub(crate) fn set_cached_share(&mut self, slot: u16, share: f64) {
        self.set(Field::CachedShare, slot, share.clamp(LEAST_CACHED_SHARE, 1.0).to_bits());
    }

    /// An answer found `reported` of its `prompt` tokens in the cache where `predicted` were expected, which had been sent `age`
    /// (a share of the credited capacity) before. Only an old prefix that is missing speaks of size: a young one was not
    /// computed yet, or never will be.
    pub(crate) fn learn_cached_share(&mut self, slot: u16, age: f64, prompt: u64, predicted: u64, reported: u64) {
        let matters = prompt / 8;
        let share = self.cached_share(slot);
        let learned = if age > OLD && predicted > reported + matters {
            (share * SHRINK).max(LEAST_CACHED_SHARE)
        } else if reported > predicted + matters {
            (share * GROW).min(1.0)
        } else {
            return;
        };
        self.set(Field::CachedShare, slot, learned.to_bits());
    }
}

#[cfg(test)]
mod tests {
    use super::super::words;
    use super::*;

    #[test]
    fn the_ratio_of_text_to_tokens_is_learned() {
        let mut words = vec![0; words(1)];
        let mut targets = Targets::new(&mut words, 1, 0);
        targets.claim(1);
        assert_eq!(targets.bytes_per_token(0), PRIOR_BYTES_PER_TOKEN);
        targets.learn(0, 1_000, 1_000);
        assert_eq!(targets.bytes_per_token(0), 1.0);
        for _ in 0..100 {
            targets.learn(0, 3_000, 1_000);
        }
        assert!((targets.bytes_per_token(0) - 3.0).abs() < 0.01);
    }
}
