//! The generator behind every random choice: splitmix64, whose whole state is one word of the region.

/// A view of the generator's word; drawing changes it.
pub struct Random<'m>(pub(crate) &'m mut u64);

impl Random<'_> {
    /// 64 random bits. Sebastiano Vigna's splitmix64: one word of state, any seed is good, passes BigCrush.
    pub fn draw(&mut self) -> u64 {
        *self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = *self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// One of `0..bound`; 0 if `bound` is 0. The bias of multiply-and-shift is below `bound / 2^64`.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.draw()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_numbers_and_all_of_them() {
        let draws = |seed: u64| {
            let mut state = seed;
            let mut random = Random(&mut state);
            (0..200).map(|_| random.below(7)).collect::<Vec<_>>()
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        for number in 0..7 {
            let times = draws(3).iter().filter(|&&drawn| drawn == number).count();
            assert!((15..=45).contains(&times), "{number} came {times} times of 200");
        }
    }
}
