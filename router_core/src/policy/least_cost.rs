//! To the target where the request costs least: its own wait, and what it makes all others there wait, in seconds.
//!
//! ```text
//! own wait      (tokens queued + tokens to read) x seconds per token, + the wait for room in the cache
//! stall         what reading adds to the worker's longest queue x requests in flight that pause meanwhile
//! slower steps  answer tokens x seconds that a request adds to a step x requests in flight, itself included
//! eviction      half the seconds of reading anew what a full cache must drop for it
//! ```
//!
//! Ranks of one worker step together, so what counts of them is what the request adds to the slowest: below the longest queue
//! reading is free, below the largest batch decoding is. All rates are learned per target (speed.rs). Whatever a prefix is worth
//! follows: the holder has less to read. It keeps a hot prefix until its queue costs more than reading it once more elsewhere.
//! Among equal costs the choice is by rendezvous hashing of the first block that nobody holds, so that siblings that come
//! together meet, and several routers agree without a word.

use super::ranks::{Group, unread_tokens};
use super::{Choice, Policy, rendezvous};
use crate::target::Targets;

/// Costs that differ by less than this share of the least ...
const EQUAL_SHARE: f64 = 0.02;
/// ... or by less than so many seconds are equal: no estimate is better than that.
const EQUAL_SECONDS: f64 = 0.001;

/// The part of what is evicted that would have been asked for again.
const EVICTED_VALUE: f64 = 0.5;

pub(super) struct LeastCost;

impl Policy for LeastCost {
    fn reason(&self, _choice: &Choice<'_, '_>, _picked: u16) -> &'static str {
        "least cost"
    }

    fn cost_seconds(&self, choice: &Choice<'_, '_>, slot: u16) -> Option<f64> {
        Some(Group::of(choice, slot).cost(choice, slot))
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        let mut group = Group::default();
        let costs: Vec<(u16, f64)> = choice
            .candidates
            .iter()
            .map(|slot| {
                group.enter(choice, slot);
                (slot, group.cost(choice, slot))
            })
            .collect();
        let least = costs.iter().fold(f64::INFINITY, |least, &(_, cost)| least.min(cost));
        let limit = least + (least * EQUAL_SHARE).max(EQUAL_SECONDS);
        let equals = costs.iter().filter(|&&(_, cost)| cost <= limit);
        let key = first_unknown_block(choice);
        equals.max_by_key(|&&(slot, _)| rendezvous(key, slot)).map(|&(slot, _)| slot).unwrap_or_default()
    }
}

impl Group {
    /// Seconds that the request costs at `slot`.
    fn cost(&self, choice: &Choice<'_, '_>, slot: u16) -> f64 {
        let targets = choice.targets;
        let speed = targets.speed(slot);
        let bytes_per_token = targets.bytes_per_token(slot);
        let unread = unread_tokens(choice, slot);
        let queued = speed.queued_tokens(choice.now_ns) + unread;
        let per_token = speed.seconds_per_prompt_token();
        let (step, per_request) = speed.step_seconds();
        let others = self.load as f64;

        let stall = self.overhang(queued) * per_token * others;
        let slower =
            if self.grows_at(targets, slot) { speed.answer_tokens() * per_request * (1.0 + others) } else { 0.0 };
        let evicted = if choice.index.is_full(slot) { unread * per_token * EVICTED_VALUE } else { 0.0 };
        let needed = f64::from(choice.prompt_bytes) / bytes_per_token + speed.answer_tokens();
        let answer_seconds = speed.answer_tokens() * (step + per_request * targets.load(slot) as f64);
        queued * per_token + wait_for_room(targets, slot, needed, answer_seconds) + stall + slower + evicted
    }
}

/// Seconds until a cache that is full of requests in flight has room for `needed` tokens, when each takes `answer_seconds`.
fn wait_for_room(targets: &Targets<'_>, slot: u16, needed: f64, answer_seconds: f64) -> f64 {
    let (capacity, held) = (targets.kv_capacity_tokens(slot) as f64, targets.held_tokens(slot) as f64);
    let missing = held + needed - capacity;
    // What runs fills the cache at most once and leaves it within the time of an answer.
    if capacity > 0.0 && held > 0.0 && missing > 0.0 { missing / held.min(capacity) * answer_seconds } else { 0.0 }
}

/// The key of the first block beyond what the best holder has.
fn first_unknown_block(choice: &Choice<'_, '_>) -> u64 {
    let known = choice.matches.holders().map(|(_, found)| found.blocks).max().unwrap_or_default();
    let last = choice.blocks.len().saturating_sub(1);
    choice.blocks.get(last.min(known as usize)).map_or(0, |block| block.key)
}
