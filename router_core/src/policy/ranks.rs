//! Ranks of one worker with dp attention step together: a step takes as long as on the rank that has most to do in it. So a prompt
//! costs the worker nothing while the rank that reads it has less queued than another, and costs all ranks what it adds to the
//! longest queue. The same holds for the largest batch.

use super::Choice;
use crate::target::Targets;

/// What a second of waiting in a rank's own queue weighs beside a second in which all ranks wait: one request waits there.
const OWN_WAIT: f64 = 0.2;
/// What a second of reading weighs in which nobody waits: what another rank holds already takes room in a second cache. Both are
/// measured (bench.simulator.ranks): with less, more is read twice than the ranks gain; with more, prompts follow their prefix
/// into a queue while other ranks step for nothing.
const READ_AGAIN: f64 = 0.6;
/// Costs that differ by less are equal: a step takes longer.
const EQUAL_SECONDS: f64 = 0.001;

/// What the ranks of one worker have to do in all.
#[derive(Default)]
pub(super) struct Group {
    head: Option<u16>,
    /// Prompt tokens that are still to be read at the rank that has most of them.
    pub(super) longest_queue: f64,
    /// Requests in flight at the rank that has most of them.
    pub(super) largest_load: u64,
    /// Requests in flight.
    pub(super) load: u64,
}

impl Group {
    /// Of the worker that has `slot`.
    pub(super) fn of(choice: &Choice<'_, '_>, slot: u16) -> Self {
        let mut group = Self::default();
        group.enter(choice, slot);
        group
    }

    /// Go on to the worker that has `slot`, if it is another one.
    pub(super) fn enter(&mut self, choice: &Choice<'_, '_>, slot: u16) {
        let targets = choice.targets;
        let head = targets.head(slot);
        if self.head == Some(head) {
            return;
        }
        *self = Self { head: Some(head), ..Self::default() };
        for rank in targets.slots_of(head) {
            self.longest_queue = self.longest_queue.max(targets.speed(rank).queued_tokens(choice.now_ns));
            self.largest_load = self.largest_load.max(targets.load(rank));
            self.load += targets.load(rank);
        }
    }

    /// Prompt tokens by which the longest queue grows when a rank has `queued` of them.
    pub(super) fn overhang(&self, queued: f64) -> f64 {
        (queued - self.longest_queue).max(0.0)
    }

    /// Whether one more request at `slot` makes the largest batch larger.
    pub(super) fn grows_at(&self, targets: &Targets<'_>, slot: u16) -> bool {
        targets.load(slot) + 1 > self.largest_load
    }
}

/// Prompt tokens of the request that the target in `slot` probably has to read.
pub(super) fn unread_tokens(choice: &Choice<'_, '_>, slot: u16) -> f64 {
    let unread = f64::from(choice.prompt_bytes) - f64::from(choice.matches.of(slot).bytes);
    unread.max(0.0) / choice.targets.bytes_per_token(slot)
}

/// Of the ranks of the worker that has `slot`, with at most `limit` requests in flight: where the request costs the worker least.
pub(super) fn cheapest(choice: &mut Choice<'_, '_>, slot: u16, limit: u64) -> u16 {
    let (candidates, targets) = (choice.candidates, choice.targets);
    let group = Group::of(choice, slot);
    let ranks = targets.slots_of(targets.head(slot));
    let ranks = ranks.filter(|&rank| candidates.contains(rank) && targets.load(rank) <= limit);
    let costs: Vec<(u16, f64)> = ranks.map(|rank| (rank, seconds(&group, choice, rank))).collect();
    let least = costs.iter().fold(f64::INFINITY, |least, &(_, cost)| least.min(cost));
    let equals = costs.iter().filter(|&&(_, cost)| cost <= least + EQUAL_SECONDS).map(|&(rank, _)| rank);
    let key = |choice: &Choice<'_, '_>, rank| {
        let held = choice.matches.of(rank).bytes;
        (std::cmp::Reverse(held), choice.targets.load(rank), std::cmp::Reverse(choice.index.room(rank)))
    };
    choice.least(equals, key).unwrap_or(slot)
}

/// Whether another rank of the same worker, which could get the request as well, holds more of it than `slot`.
pub(super) fn somebody_holds_more(choice: &Choice<'_, '_>, slot: u16) -> bool {
    let held = choice.matches.of(slot).bytes;
    let mut ranks = choice.targets.slots_of(choice.targets.head(slot));
    ranks.any(|rank| choice.candidates.contains(rank) && choice.matches.of(rank).bytes > held)
}

/// The same in whole milliseconds, to compare holders on several workers: a worker whose holder is busy would else get the prompt for
/// one of its other ranks. 0 for a worker of one rank.
pub(super) fn wait_ms(choice: &Choice<'_, '_>, slot: u16) -> u64 {
    if choice.targets.ranks(slot) > 1 { (seconds(&Group::of(choice, slot), choice, slot) * 1e3) as u64 } else { 0 }
}

/// What the request costs at the rank in `slot`, in seconds.
pub(super) fn seconds(group: &Group, choice: &Choice<'_, '_>, slot: u16) -> f64 {
    let speed = choice.targets.speed(slot);
    let unread = unread_tokens(choice, slot);
    let queued = speed.queued_tokens(choice.now_ns) + unread;
    let (_, per_request) = speed.step_seconds();
    let slower = if group.grows_at(choice.targets, slot) { speed.answer_tokens() * per_request } else { 0.0 };
    let waited_for = group.overhang(queued) + OWN_WAIT * queued + READ_AGAIN * unread;
    waited_for * speed.seconds_per_prompt_token() + slower
}

#[cfg(test)]
mod tests {
    use crate::policy::fleet::Fleet;
    use crate::policy::{Assignment, Balance, Parameters, Policy, by_name};

    fn policy() -> Box<dyn Policy> {
        let parameters = Parameters {
            cache_threshold: 0.5,
            balance: Balance { absolute: 32, relative: 1.5 },
            assignment: Assignment::Random,
            max_idle_ns: 1,
        };
        by_name("cache_aware", &parameters).unwrap()
    }

    /// Four ranks. Requests in flight; prompt tokens queued; who was sent how much of a prompt of 16,000 bytes (4,000 tokens, at
    /// first 8,000 a second); who may be picked.
    struct Case(&'static str, [u64; 4], [f64; 4], &'static [(u16, usize)], &'static [u16]);

    #[test]
    fn decisions() {
        let table = [
            Case("the holder", [0; 4], [0.0; 4], &[(2, 12_000)], &[2]),
            Case("below the longest queue reading is free", [1; 4], [9e3, 0.0, 4e3, 0.0], &[(2, 12_000)], &[2]),
            Case("though nobody holds it", [1; 4], [9e3, 4e3, 9e3, 9e3], &[], &[1]),
            Case("a holder with the longest queue", [1; 4], [0.0, 0.0, 9e3, 9e3], &[(2, 12_000)], &[0, 1]),
            Case("unless it holds next to all", [1; 4], [0.0, 0.0, 9e3, 9e3], &[(2, 16_000)], &[2]),
            Case("and a queue that is longer still", [1; 4], [0.0, 0.0, 4e4, 4e4], &[(2, 16_000)], &[0, 1]),
            Case("of two holders the shorter queue", [1; 4], [9e3, 4e3, 6e3, 0.0], &[(1, 12_000), (2, 12_000)], &[1]),
            Case("of equal costs the shortest batch", [3, 1, 2, 3], [0.0; 4], &[], &[1]),
            Case("not the largest batch", [30, 30, 40, 30], [0.0; 4], &[(2, 800)], &[0, 1, 3]),
            Case("unless it holds enough", [30, 30, 40, 30], [0.0; 4], &[(2, 12_000)], &[2]),
            Case("loads out of balance: among the short", [0, 0, 40, 40], [0.0; 4], &[(2, 16_000)], &[0, 1]),
        ];
        for Case(what, loads, queues, holders, expected) in table {
            let mut fleet = Fleet::of_workers(4, &loads, 64 << 20);
            (0..).zip(queues).for_each(|(slot, tokens)| fleet.queue(slot, tokens));
            holders.iter().for_each(|&(slot, bytes)| fleet.send(slot, "prompt", bytes));
            let mut seen: Vec<u16> = (0..64).map(|_| fleet.pick(&*policy(), "prompt", 16_000)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, expected, "{what}");
        }
    }

    #[test]
    fn workers_of_one_rank_do_not_wait_for_each_other() {
        let mut fleet = Fleet::new(&[1; 4], 64 << 20);
        fleet.queue(2, 9_000.0);
        fleet.send(2, "prompt", 12_000);
        assert_eq!(fleet.pick(&*policy(), "prompt", 16_000), 2);
    }

    #[test]
    fn the_rank_with_most_room_does_not_draw_prompts_to_its_worker() {
        let mut fleet = Fleet::of_workers(4, &[0; 8], 64 << 20);
        // Ranks 0 and 1 have least in their caches, and most to read: others of their worker get what is new.
        (1..8).for_each(|slot| fleet.send(slot, "other", 400 * usize::from(slot)));
        [0, 1].into_iter().for_each(|slot| fleet.queue(slot, 8_000.0));
        let mut sent = [0; 2];
        for turn in 0..64 {
            let name = format!("{turn}");
            let slot = fleet.pick(&*policy(), &name, 800);
            fleet.send(slot, &name, 800);
            sent[usize::from(slot / 4)] += 1;
        }
        assert!(sent.iter().all(|&count| count >= 24), "{sent:?}");
    }

    #[test]
    fn of_holders_on_two_workers_the_one_that_is_free() {
        let mut fleet = Fleet::of_workers(2, &[1, 1, 2, 2], 64 << 20);
        fleet.send(0, "prompt", 12_000);
        fleet.send(2, "prompt", 12_000);
        fleet.queue(0, 20_000.0);
        assert_eq!(fleet.pick(&*policy(), "prompt", 16_000), 2);
    }

    #[test]
    fn the_worker_is_chosen_first() {
        let mut fleet = Fleet::of_workers(2, &[0; 4], 64 << 20);
        fleet.send(3, "prompt", 12_000);
        fleet.queue(3, 9_000.0);
        assert_eq!(fleet.pick(&*policy(), "prompt", 16_000), 2, "the other rank of the worker that holds it");
        fleet.exclude(&[2]);
        assert_eq!(fleet.pick(&*policy(), "prompt", 16_000), 3);
    }
}
