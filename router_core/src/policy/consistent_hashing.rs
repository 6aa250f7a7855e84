//! To the target that the request's key falls on, as long as that is not overloaded.
//!
//! The key is the client's (a routing key, a session, a user), else the beginning of the prompt. The order of targets for a key
//! is that of rendezvous hashing, so that a target that joins or leaves moves the keys that fall on it and no others; with
//! bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2016) the first target in that order with room gets it.

use super::{Choice, Policy, rendezvous};

/// How far above the mean a target's load may be.
const LOAD_FACTOR: f64 = 1.25;

pub(super) struct ConsistentHashing;

impl Policy for ConsistentHashing {
    fn reason(&self, choice: &Choice<'_, '_>, _picked: u16) -> &'static str {
        if choice.routing_key.is_some() { "the client's key" } else { "the beginning of the prompt" }
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        let key = choice.routing_key.or_else(|| choice.blocks.first().map(|block| block.key)).unwrap_or_default();
        let load = |slot: u16| choice.targets.load(slot);
        let total: u64 = choice.candidates.iter().map(load).sum();
        // The request itself counts: with one in all, its target may have it.
        let limit = ((total + 1) as f64 / choice.candidates.count() as f64 * LOAD_FACTOR).ceil();
        let with_room = choice.candidates.iter().filter(|&slot| ((load(slot) + 1) as f64) <= limit);
        with_room.max_by_key(|&slot| rendezvous(key, slot)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::fleet::Fleet;

    fn of_keys(fleet: &mut Fleet) -> Vec<u16> {
        (0..400)
            .map(|key| {
                fleet.set_routing_key(key);
                fleet.pick(&ConsistentHashing, "", 0)
            })
            .collect()
    }

    #[test]
    fn a_key_keeps_its_target_and_keys_are_spread() {
        let mut fleet = Fleet::new(&[0; 4], 1 << 20);
        let before = of_keys(&mut fleet);
        assert_eq!(of_keys(&mut fleet), before);
        for slot in 0..4 {
            let share = before.iter().filter(|&&picked| picked == slot).count();
            assert!((60..=140).contains(&share), "target {slot} has {share} of 400 keys");
        }
        fleet.exclude(&[2]);
        for (before, after) in before.iter().zip(of_keys(&mut fleet)) {
            assert!(after != 2 && (*before == 2 || after == *before), "{before} moved to {after}");
        }
    }

    #[test]
    fn an_overloaded_target_is_passed_over() {
        let mut fleet = Fleet::new(&[4, 4, 4, 4], 1 << 20);
        fleet.set_routing_key(1);
        let first = fleet.pick(&ConsistentHashing, "", 0);
        fleet.set_load(first, 6);
        let second = fleet.pick(&ConsistentHashing, "", 0);
        assert_ne!(second, first, "18 in flight and one more: at most 6 each");
        assert_eq!(fleet.pick(&ConsistentHashing, "", 0), second);
    }

    #[test]
    fn without_a_key_the_beginning_of_the_prompt_is_the_key() {
        let mut fleet = Fleet::new(&[0; 8], 1 << 20);
        let picks: Vec<u16> = (0..64).map(|n| fleet.pick(&ConsistentHashing, &format!("prompt {n}"), 500)).collect();
        assert_eq!(picks[3], fleet.pick(&ConsistentHashing, "prompt 3", 900));
        assert!((0..8).all(|slot| picks.contains(&slot)));
    }
}
