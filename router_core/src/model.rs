//! Models as the region knows them: a hash of the name, who serves it, and who of those can get a request now.
//!
//! The names themselves live outside (`router/names.rs`). Index [`ANY`] stands for all workers whatever they serve.

use crate::region::MAX_TARGETS;

/// Names of models, aliases included, that can be served at once. A target's models are the bits of one word.
pub const MAX_MODELS: usize = 64;

/// The pseudo-model that every worker serves.
pub const ANY: usize = MAX_MODELS;

const BITS: usize = u64::BITS as usize;
/// Words of a set of slots.
pub const SET_WORDS: usize = MAX_TARGETS / BITS;

const POOLS: usize = MAX_MODELS + 1;
const HASHES: usize = 0;
const SERVED_BY: usize = HASHES + MAX_MODELS;
const PRIMARY_OF: usize = SERVED_BY + MAX_MODELS;
const POLICY: usize = PRIMARY_OF + MAX_MODELS;
const TURNS: usize = POLICY + MAX_MODELS;
const AVAILABLE: usize = (TURNS + POOLS).next_multiple_of(8);

/// Words of the region that models take.
pub(crate) const WORDS: usize = AVAILABLE + POOLS * SET_WORDS;

/// A view of the models' words.
pub struct Models<'m> {
    words: &'m mut [u64],
}

impl<'m> Models<'m> {
    pub(crate) fn new(words: &'m mut [u64]) -> Self {
        Self { words }
    }

    /// The index of the model whose name has this hash, if somebody serves it.
    pub fn find(&self, hash: u64) -> Option<usize> {
        (0..MAX_MODELS).find(|&model| self.words[HASHES + model] == hash && self.served_by(model) > 0)
    }

    /// The hash of a model's name.
    pub fn hash(&self, model: usize) -> u64 {
        self.words[HASHES + model]
    }

    /// Workers that serve it, under its own name or an alias.
    pub fn served_by(&self, model: usize) -> u64 {
        self.words[SERVED_BY + model]
    }

    /// The only model of the fleet, aliases aside; None when there are several, or no worker.
    pub fn single(&self) -> Option<usize> {
        let mut primary = (0..MAX_MODELS).filter(|&model| self.words[PRIMARY_OF + model] > 0);
        primary.next().filter(|_| primary.next().is_none())
    }

    /// Whether any worker is registered.
    pub fn any(&self) -> bool {
        self.words[PRIMARY_OF..PRIMARY_OF + MAX_MODELS].iter().any(|&workers| workers > 0)
    }

    /// The policy that the first worker of this model asked for, as a number of the caller's; 0: none.
    pub(crate) fn policy(&self, model: usize) -> u64 {
        self.words[POLICY + model]
    }

    /// One more worker serves these models, the first as its own name: their indices as bits, and the first's index. `policy`
    /// becomes that of the models that nobody served before. None, and nothing is changed, when there are more names than places.
    pub(crate) fn serve(&mut self, hashes: &[u64], policy: u64) -> Option<(u64, usize)> {
        let mut mask = 0;
        let mut primary = None;
        for &hash in hashes {
            let free = || (0..MAX_MODELS).find(|&model| self.served_by(model) == 0 && mask & 1 << model == 0);
            let Some(model) = self.find(hash).or_else(free) else {
                for model in bits(mask) {
                    self.words[SERVED_BY + model] -= 1;
                }
                return None;
            };
            if mask & 1 << model == 0 {
                mask |= 1 << model;
                if self.served_by(model) == 0 {
                    self.words[POLICY + model] = policy;
                }
                self.words[HASHES + model] = hash;
                self.words[SERVED_BY + model] += 1;
            }
            primary.get_or_insert(model);
        }
        let primary = primary?;
        self.words[PRIMARY_OF + primary] += 1;
        Some((mask, primary))
    }

    /// A worker that served these does not any more.
    pub(crate) fn unserve(&mut self, mask: u64, primary: usize) {
        for model in bits(mask) {
            self.words[SERVED_BY + model] = self.served_by(model).saturating_sub(1);
        }
        let count = &mut self.words[PRIMARY_OF + primary];
        *count = count.saturating_sub(1);
    }

    /// Whether the target in `slot`, which serves the models of `mask`, can get a request now.
    pub(crate) fn set_available(&mut self, slot: u16, mask: u64, available: bool) {
        let (word, bit) = (usize::from(slot) / BITS, 1 << (usize::from(slot) % BITS));
        for model in bits(mask).chain([ANY]) {
            let word = &mut self.words[AVAILABLE + model * SET_WORDS + word];
            *word = if available { *word | bit } else { *word & !bit };
        }
    }

    /// Who can get a request for this model now, as a set of slots.
    pub fn available(&self, model: usize) -> &[u64] {
        let start = AVAILABLE + model * SET_WORDS;
        &self.words[start..start + SET_WORDS]
    }

    /// Where the turn of this model's round robin stands.
    pub(crate) fn turn(&mut self, model: usize) -> &mut u64 {
        &mut self.words[TURNS + model]
    }

    pub(crate) fn turn_of(&self, model: usize) -> u64 {
        self.words[TURNS + model]
    }
}

/// The numbers of the bits set in `mask`, from the lowest.
pub(crate) fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(bit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> Vec<u64> {
        vec![0; WORDS]
    }

    #[test]
    fn names_are_shared_and_freed() {
        let mut words = fresh();
        let mut models = Models::new(&mut words);
        assert_eq!(models.single(), None);
        let (first, primary) = models.serve(&[10, 11], 0).unwrap();
        let (second, other) = models.serve(&[10, 12, 10], 0).unwrap();
        assert_eq!((first, second, primary, other), (0b011, 0b101, 0, 0));
        assert_eq!(models.single(), Some(0));
        models.serve(&[12], 0).unwrap();
        assert_eq!(models.single(), None);
        models.unserve(first, primary);
        assert_eq!((models.find(10), models.find(11), models.find(12)), (Some(0), None, Some(2)));
        models.serve(&[13], 0).unwrap();
        assert_eq!(models.find(13), Some(1));
    }

    #[test]
    fn a_65th_name_is_refused_without_a_trace() {
        let mut words = fresh();
        let mut models = Models::new(&mut words);
        models.serve(&(100..163).collect::<Vec<_>>(), 0).unwrap();
        let before = models.words.to_vec();
        assert_eq!(models.serve(&[100, 200, 201], 0), None);
        for model in 0..MAX_MODELS {
            assert_eq!(models.served_by(model), before[SERVED_BY + model]);
        }
        assert!(models.serve(&[100, 200], 0).is_some());
    }

    #[test]
    fn the_first_worker_of_a_model_says_its_policy() {
        let mut words = fresh();
        let mut models = Models::new(&mut words);
        let (mask, primary) = models.serve(&[10, 11], 4).unwrap();
        models.serve(&[11, 12], 5).unwrap();
        assert_eq!([0, 1, 2].map(|model| models.policy(model)), [4, 4, 5]);
        models.unserve(mask, primary);
        models.serve(&[10, 11], 6).unwrap();
        assert_eq!([0, 1, 2].map(|model| models.policy(model)), [6, 4, 5], "of one that nobody served, anew");
    }

    #[test]
    fn availability_is_kept_per_model_and_for_any() {
        let mut words = fresh();
        let mut models = Models::new(&mut words);
        models.set_available(70, 0b101, true);
        assert_eq!(models.available(0)[1], 1 << 6);
        assert_eq!(models.available(1)[1], 0);
        assert_eq!(models.available(ANY)[1], 1 << 6);
        models.set_available(70, 0b101, false);
        assert!(models.words[AVAILABLE..].iter().all(|&word| word == 0));
    }
}
