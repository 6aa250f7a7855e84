//! To each in turn. The turn of a model is a place in the order of slots, not a count, so that a target which is left out for a
//! while, or for one request, takes nobody's turn but its own.

use super::{Choice, Policy};

pub(super) struct RoundRobin;

impl Policy for RoundRobin {
    fn reason(&self, _choice: &Choice<'_, '_>, _picked: u16) -> &'static str {
        "its turn"
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        let candidates = choice.candidates;
        let next = candidates.from(*choice.turn as u16).next();
        let picked = next.or_else(|| candidates.iter().next()).unwrap_or_default();
        *choice.turn = u64::from(picked) + 1;
        picked
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::fleet::Fleet;

    fn picks(fleet: &mut Fleet, times: usize) -> Vec<u16> {
        (0..times).map(|_| fleet.pick(&RoundRobin, "", 0)).collect()
    }

    #[test]
    fn each_in_turn_whatever_its_load() {
        let mut fleet = Fleet::new(&[9, 0, 3], 1 << 20);
        assert_eq!(picks(&mut fleet, 7), [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn who_is_left_out_takes_nobodys_turn() {
        let mut fleet = Fleet::new(&[0; 4], 1 << 20);
        fleet.exclude(&[1]);
        assert_eq!(picks(&mut fleet, 6), [0, 2, 3, 0, 2, 3]);
        fleet.exclude(&[]);
        assert_eq!(picks(&mut fleet, 4), [0, 1, 2, 3]);

        // Every request that reaches target 0 fails there and is tried once more elsewhere.
        let mut shares = [0; 4];
        for _ in 0..30 {
            fleet.exclude(&[]);
            let mut slot = fleet.pick(&RoundRobin, "", 0);
            if slot == 0 {
                fleet.exclude(&[0]);
                slot = fleet.pick(&RoundRobin, "", 0);
            }
            shares[usize::from(slot)] += 1;
        }
        assert_eq!(shares, [0, 10, 10, 10]);
    }
}
