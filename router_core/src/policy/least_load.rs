//! To the target with the fewest requests in flight.

use super::{Choice, Policy};

pub(super) struct LeastLoad;

impl Policy for LeastLoad {
    fn reason(&self, _choice: &Choice<'_, '_>, _picked: u16) -> &'static str {
        "fewest requests in flight"
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        let candidates = choice.candidates;
        choice.least(candidates.iter(), |choice, slot| choice.targets.load(slot)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::fleet::Fleet;

    #[test]
    fn the_shortest_queue_and_of_equal_ones_any() {
        let mut fleet = Fleet::new(&[2, 1, 1, 3], 1 << 20);
        let mut seen: Vec<u16> = (0..64).map(|_| fleet.pick(&LeastLoad, "", 0)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [1, 2]);
    }
}
