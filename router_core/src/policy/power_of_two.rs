//! To the one of two with less to do: two drawn at random, compared by outstanding tokens, then by requests in flight.

use super::{Choice, Policy};

pub(super) struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn reason(&self, _choice: &Choice<'_, '_>, _picked: u16) -> &'static str {
        "less to do than another one drawn by chance"
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        let count = choice.candidates.count();
        let first = choice.random.below(count);
        // Another one than the first, if there is one.
        let second = (first + 1 + choice.random.below(count.saturating_sub(1))) % count.max(1);
        let two = [choice.candidates.nth(first), choice.candidates.nth(second)];
        let work = |choice: &Choice<'_, '_>, slot| (choice.targets.outstanding_tokens(slot), choice.targets.load(slot));
        choice.least(two.into_iter().flatten(), work).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::fleet::Fleet;

    fn shares(fleet: &mut Fleet) -> [usize; 3] {
        let mut shares = [0; 3];
        for _ in 0..300 {
            shares[usize::from(fleet.pick(&PowerOfTwo, "", 0))] += 1;
        }
        shares
    }

    #[test]
    fn of_two_the_one_with_less_to_do() {
        let mut fleet = Fleet::new(&[1, 1, 1], 1 << 20);
        fleet.set_outstanding(0, 900);
        fleet.set_outstanding(1, 100);
        let shares = shares(&mut fleet);
        assert_eq!(shares[0], 0, "it is never the better of two");
        assert!(shares[2] > shares[1] && shares[1] > 50, "{shares:?}");
    }

    #[test]
    fn equal_tokens_compare_by_requests_and_equals_by_chance() {
        let mut fleet = Fleet::new(&[2, 1, 1], 1 << 20);
        let shares = shares(&mut fleet);
        assert_eq!(shares[0], 0);
        assert!(shares[1] > 100 && shares[2] > 100, "{shares:?}");
    }

    #[test]
    fn a_lone_candidate_is_picked() {
        let mut fleet = Fleet::new(&[2, 1, 1], 1 << 20);
        fleet.exclude(&[0, 1]);
        assert_eq!(fleet.pick(&PowerOfTwo, "", 0), 2);
    }
}
