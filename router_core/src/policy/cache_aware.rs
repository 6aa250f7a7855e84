//! To whom holds most of the prompt, unless that would leave the fleet out of balance or the match is too small to matter. Of a
//! worker whose ranks step together, to the rank where it makes the others wait least.

use std::cmp::Reverse;

use super::{Balance, Choice, Parameters, Policy, ranks};
use crate::prefix_index::Match;

pub(super) struct CacheAware {
    cache_threshold: f64,
    balance: Balance,
}

impl CacheAware {
    pub(super) fn new(parameters: &Parameters) -> Self {
        Self { cache_threshold: parameters.cache_threshold, balance: parameters.balance }
    }
}

impl Policy for CacheAware {
    fn reason(&self, choice: &Choice<'_, '_>, picked: u16) -> &'static str {
        let (shortest, longest) = queues(choice);
        let held = f64::from(choice.matches.of(picked).bytes);
        let enough = held > f64::from(choice.prompt_bytes) * self.cache_threshold;
        if choice.targets.ranks(picked) > 1 && ranks::somebody_holds_more(choice, picked) {
            return "another rank holds more, but there it would make all ranks wait";
        }
        match (self.balance.is_lost(shortest, longest), enough) {
            (false, true) => "holds most of the prompt",
            (true, true) => "loads out of balance: holds the prompt among short queues",
            (true, false) => "loads out of balance: short queue",
            (false, false) => "nobody holds enough: most room among short queues",
        }
    }

    fn cost_seconds(&self, choice: &Choice<'_, '_>, slot: u16) -> Option<f64> {
        (choice.targets.ranks(slot) > 1).then(|| ranks::seconds(&ranks::Group::of(choice, slot), choice, slot))
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        let candidates = choice.candidates;
        let (shortest, longest) = queues(choice);
        let limit = if self.balance.is_lost(shortest, longest) { self.balance.near(shortest) } else { longest };
        let holder = self.holder(choice, limit);
        let picked = holder.or_else(|| choice.least(candidates.iter(), self.coldness(shortest))).unwrap_or_default();
        // A worker is chosen; of its ranks, which step together, the one that makes the others wait least.
        if choice.targets.ranks(picked) > 1 { ranks::cheapest(choice, picked, limit) } else { picked }
    }
}

impl CacheAware {
    /// Orders the targets for a prompt that nobody holds: the cache with most room among those with a short queue. New prefixes
    /// are spread evenly that way, however their requests overlap; by queues alone, in bursts, some get too many (simulated: 8
    /// groups on each of 8 workers or 6 to 10, and 8 % of the throughput).
    fn coldness(&self, shortest: u64) -> impl Fn(&Choice<'_, '_>, u16) -> (u64, Reverse<u64>, u64) + use<> {
        let short = self.balance.short(shortest);
        move |choice, slot| {
            // Of a worker with ranks all count alike: which of them gets the prompt is decided afterwards, so that the one with most
            // room may keep it, and must not draw one prompt after the other to its worker.
            let ranks = choice.targets.slots_of(choice.targets.head(slot));
            let count = ranks.len().max(1) as u64;
            let load = ranks.clone().map(|rank| choice.targets.load(rank)).sum::<u64>() / count;
            let room = ranks.map(|rank| choice.index.room(rank)).sum::<u64>() / count;
            (load.max(short), Reverse(room), load)
        }
    }

    /// Of the targets with a queue of at most `limit` that hold most, if it is enough: the one with the shortest queue.
    fn holder(&self, choice: &mut Choice<'_, '_>, limit: u64) -> Option<u16> {
        let (candidates, loads) = (choice.candidates, choice.targets.loads());
        let matches = choice.matches;
        let fits = |&(slot, _): &(u16, Match)| candidates.contains(slot) && loads[usize::from(slot)] <= limit;
        // Those that hold most come first.
        let (_, most) = matches.holders().find(fits)?;
        if f64::from(most.bytes) <= f64::from(choice.prompt_bytes) * self.cache_threshold {
            return None;
        }
        let best = matches.holders().filter(fits).take_while(|(_, found)| found.bytes == most.bytes);
        choice
            .least(best.map(|(slot, _)| slot), |choice, slot| (ranks::wait_ms(choice, slot), choice.targets.load(slot)))
    }
}

fn queues(choice: &Choice<'_, '_>) -> (u64, u64) {
    choice.candidates.extremes(choice.targets.loads())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::fleet::Fleet;

    fn policy(cache_threshold: f64, absolute: u64, relative: f64) -> CacheAware {
        CacheAware { cache_threshold, balance: Balance { absolute, relative } }
    }

    /// Loads; who was sent how much of a prompt of 1,000 bytes; who may be picked.
    struct Case(&'static str, &'static [u64], &'static [(u16, usize)], &'static [u16]);

    #[test]
    fn decisions() {
        let table = [
            Case("nobody holds it: the shortest queue", &[3, 1, 2], &[], &[1]),
            Case("nobody holds it, equal queues", &[1, 1, 2], &[], &[0, 1]),
            Case("a holder, though its queue is longer", &[5, 0, 0], &[(0, 1000)], &[0]),
            Case("the longest match wins", &[5, 0, 0], &[(0, 1000), (1, 600)], &[0]),
            Case("equal matches compete by load", &[5, 1, 0], &[(0, 1000), (1, 1000)], &[1]),
            Case("and then at random", &[1, 1, 0], &[(0, 1000), (1, 1000)], &[0, 1]),
            Case("a match that is too small", &[1, 0, 1], &[(0, 400)], &[1]),
            Case("in balance up to the limit", &[10, 0, 0], &[(0, 1000)], &[0]),
            Case("out of balance: the shortest queue", &[11, 1, 0], &[(0, 1000)], &[2]),
            Case("out of balance: a holder among the near-equal", &[11, 1, 0], &[(0, 1000), (1, 1000)], &[1]),
            Case("near-equal ends there", &[11, 2, 0], &[(0, 1000), (1, 1000)], &[2]),
        ];
        for Case(what, loads, holders, expected) in table {
            let mut fleet = Fleet::new(loads, 64 << 20);
            for &(slot, bytes) in holders {
                fleet.send(slot, "prompt", bytes);
            }
            let mut seen: Vec<u16> = (0..64).map(|_| fleet.pick(&policy(0.5, 10, 1.5), "prompt", 1000)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, expected, "{what}");
        }
    }

    #[test]
    fn the_threshold_is_strict_and_changes_decisions() {
        let mut fleet = Fleet::new(&[1, 0], 64 << 20);
        fleet.send(0, "prompt", 512);
        assert_eq!(fleet.pick(&policy(0.5, 10, 1.5), "prompt", 1024), 1);
        assert_eq!(fleet.pick(&policy(0.499, 10, 1.5), "prompt", 1024), 0);
    }

    #[test]
    fn each_limit_of_balance_changes_decisions() {
        let mut fleet = Fleet::new(&[12, 4], 64 << 20);
        fleet.send(0, "prompt", 1000);
        assert_eq!(fleet.pick(&policy(0.5, 8, 1.5), "prompt", 1000), 0);
        assert_eq!(fleet.pick(&policy(0.5, 7, 1.5), "prompt", 1000), 1);
        assert_eq!(fleet.pick(&policy(0.5, 7, 3.0), "prompt", 1000), 0);
        assert_eq!(fleet.pick(&policy(0.5, 7, 2.9), "prompt", 1000), 1);
    }

    #[test]
    fn equal_queues_fill_their_caches_evenly() {
        let mut fleet = Fleet::new(&[0; 8], 64 << 20);
        for round in 1..=3 {
            for turn in 0..8 {
                let prompt = format!("{round} {turn}");
                let slot = fleet.pick(&policy(0.5, 10, 1.5), &prompt, 700);
                fleet.send(slot, &prompt, 700);
            }
            assert!(fleet.characters().iter().all(|&characters| characters == round * 700));
        }
    }

    #[test]
    fn a_prompt_without_text_goes_to_the_shortest_queue() {
        let mut fleet = Fleet::new(&[1, 0], 64 << 20);
        assert_eq!(fleet.pick(&policy(0.0, 10, 1.5), "", 0), 1);
    }
}
