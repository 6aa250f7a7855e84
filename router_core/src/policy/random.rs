//! To anybody.

use super::{Choice, Policy};

pub(super) struct Uniform;

impl Policy for Uniform {
    fn reason(&self, _choice: &Choice<'_, '_>, _picked: u16) -> &'static str {
        "chance"
    }

    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16 {
        let drawn = choice.random.below(choice.candidates.count());
        choice.candidates.nth(drawn).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::fleet::Fleet;

    #[test]
    fn everybody_gets_a_share() {
        let mut fleet = Fleet::new(&[9, 0, 3, 0], 1 << 20);
        fleet.exclude(&[3]);
        let mut shares = [0; 4];
        for _ in 0..600 {
            shares[usize::from(fleet.pick(&Uniform, "", 0))] += 1;
        }
        assert_eq!(shares[3], 0);
        assert!(shares[..3].iter().all(|share| (150..=250).contains(share)), "{shares:?}");
    }
}
