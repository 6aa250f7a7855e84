//! To the target that the client's routing key was given to before: sticky sessions, decided by the client.
//!
//! A key remembers up to two targets: while the first cannot get requests, the second does; when both cannot, the key is given to
//! a new one. A request without a key goes anywhere. The rules are sglang-router's; the region remembers (`sticky_keys.rs`).

use super::{Choice, Parameters, Policy};
use crate::target::Field;

/// Who gets a new key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assignment {
    /// Anybody.
    Random,
    /// Whoever has the fewest requests in flight.
    MinLoad,
    /// Whoever has the fewest keys.
    MinGroup,
}

impl Assignment {
    /// By sglang-router's names.
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "random" => Some(Self::Random),
            "min_load" => Some(Self::MinLoad),
            "min_group" => Some(Self::MinGroup),
            _ => None,
        }
    }
}

pub(super) struct Manual {
    assignment: Assignment,
    max_idle_ns: u64,
}

impl Manual {
    pub(super) fn new(parameters: &Parameters) -> Self {
        Self { assignment: parameters.assignment, max_idle_ns: parameters.max_idle_ns }
    }

    fn remembered(&self, choice: &Choice<'_, '_>) -> Option<u16> {
        let known = choice.sticky_keys.targets_of(choice.routing_key?, choice.now_ns, self.max_idle_ns, choice.targets);
        known.into_iter().find(|&slot| choice.candidates.contains(slot))
    }
}

impl Policy for Manual {
    fn keeps_keys(&self) -> bool {
        true
    }

    fn reason(&self, choice: &Choice<'_, '_>, picked: u16) -> &'static str {
        match (choice.routing_key, self.remembered(choice)) {
            (None, _) => "no routing key: any",
            (Some(_), Some(slot)) if slot == picked => "the routing key was given to it before",
            (Some(_), _) => "a new routing key, or nobody is left who had it",
        }
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        if let Some(slot) = self.remembered(choice) {
            return slot;
        }
        let assignment = if choice.routing_key.is_some() { self.assignment } else { Assignment::Random };
        let candidates = choice.candidates.iter();
        let picked = match assignment {
            Assignment::Random => choice.least(candidates, |_, _| 0),
            Assignment::MinLoad => choice.least(candidates, |choice, slot| choice.targets.load(slot)),
            Assignment::MinGroup => {
                let order = |choice: &Choice<'_, '_>, slot| {
                    (choice.targets.get(Field::StickyKeys, slot), choice.targets.load(slot))
                };
                choice.least(candidates, order)
            }
        };
        picked.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::fleet::Fleet;

    fn policy(assignment: Assignment) -> Manual {
        Manual { assignment, max_idle_ns: u64::MAX }
    }

    #[test]
    fn a_key_stays_and_fails_over_and_returns() {
        let mut fleet = Fleet::new(&[0; 4], 1 << 20);
        let policy = policy(Assignment::Random);
        fleet.set_routing_key(5);
        let first = fleet.pick_and_remember(&policy);
        assert!((0..20).all(|_| fleet.pick_and_remember(&policy) == first));
        fleet.exclude(&[first]);
        let second = fleet.pick_and_remember(&policy);
        assert!((0..20).all(|_| fleet.pick_and_remember(&policy) == second));
        fleet.exclude(&[]);
        assert_eq!(fleet.pick_and_remember(&policy), first, "the first again, as soon as it can");
        fleet.exclude(&[first, second]);
        let third = fleet.pick_and_remember(&policy);
        fleet.exclude(&[]);
        assert_eq!(fleet.pick_and_remember(&policy), second, "the third took the first one's place");
        fleet.exclude(&[second]);
        assert_eq!(fleet.pick_and_remember(&policy), third);
    }

    #[test]
    fn each_assignment_has_its_own_order() {
        let table =
            [(Assignment::Random, vec![0, 1, 2]), (Assignment::MinLoad, vec![2]), (Assignment::MinGroup, vec![1])];
        for (assignment, expected) in table {
            let mut fleet = Fleet::new(&[3, 2, 1], 1 << 20);
            for (key, slot) in [(1, 0), (2, 2), (3, 2)] {
                fleet.remember(key, slot);
            }
            fleet.set_routing_key(9);
            let mut seen: Vec<u16> = (0..64).map(|_| fleet.pick(&policy(assignment), "", 0)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, expected, "{assignment:?}");
        }
    }

    #[test]
    fn without_a_key_anybody() {
        let mut fleet = Fleet::new(&[5, 0, 0], 1 << 20);
        let picks: Vec<u16> = (0..64).map(|_| fleet.pick_and_remember(&policy(Assignment::MinLoad))).collect();
        assert!((0..3).all(|slot| picks.contains(&slot)));
    }
}
