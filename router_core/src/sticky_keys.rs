//! Which targets the clients' routing keys were given to, for the policy `manual`: a table of bounded size.
//!
//! **Owner and mutability.** All state is in words of the region; how many keys a target has stands with the target
//! ([`crate::target::Field::StickyKeys`]) and goes with it. A key has one set of [`WAYS`] places that it may stand in; when all
//! are taken, the one that was idle for longest is forgotten.
//!
//! ```text
//! header   8 words: cursor of the sweep
//! sets     16 keys, 16 times of last use in ns, 16 first targets, 16 second targets
//! target   incarnation 48 | slot + 1 in 16; 0: none
//! ```

use crate::target::{Field, Targets};

const HEADER_WORDS: usize = 8;
const CURSOR: usize = 0;
/// With half as many keys as places, one set in 250 is too small for its keys.
const WAYS: usize = 16;
const SETS: usize = 1 << 12;
const SET_WORDS: usize = 4 * WAYS;

/// Keys that can be remembered at once.
pub const PLACES: usize = SETS * WAYS;

pub(crate) const WORDS: usize = HEADER_WORDS + SETS * SET_WORDS;

/// Sets looked at for idle keys with each use of a key: the table is swept once in as many uses as it has sets.
const SETS_PER_USE: usize = 1;

const USED: usize = WAYS;
const FIRST: usize = 2 * WAYS;
const SECOND: usize = 3 * WAYS;

/// A view of the keys' words.
pub struct StickyKeys<'m> {
    words: &'m mut [u64],
}

impl<'m> StickyKeys<'m> {
    pub(crate) fn new(words: &'m mut [u64]) -> Self {
        Self { words }
    }

    /// The targets that `key` was given to, the first that got it first; those that left are left out.
    pub fn targets_of(
        &self,
        key: u64,
        now_ns: u64,
        max_idle_ns: u64,
        targets: &Targets<'_>,
    ) -> impl Iterator<Item = u16> + use<> {
        let found = self.find(key).filter(|&place| !self.is_idle(place, now_ns, max_idle_ns));
        let known = found.map(|place| [self.words[place + FIRST], self.words[place + SECOND]]).unwrap_or_default();
        let present = known.map(|target| slot_of(target, targets));
        present.into_iter().flatten()
    }

    /// `key` was used, and given to `slot`. A third target takes the place of the first.
    pub(crate) fn remember(&mut self, key: u64, slot: u16, now_ns: u64, max_idle_ns: u64, targets: &mut Targets<'_>) {
        for _ in 0..SETS_PER_USE {
            self.sweep_set(now_ns, max_idle_ns, targets);
        }
        let place = self.find(key).unwrap_or_else(|| self.place_for(key, targets));
        if self.is_idle(place, now_ns, max_idle_ns) {
            self.forget(place, targets);
        }
        self.words[place] = key;
        self.words[place + USED] = now_ns;
        let target = targets.incarnation(slot) << 16 | (u64::from(slot) + 1);
        for column in [FIRST, SECOND] {
            if slot_of(self.words[place + column], targets).is_none() {
                self.words[place + column] = 0;
            }
        }
        let (first, second) = (self.words[place + FIRST], self.words[place + SECOND]);
        if target == first || target == second {
            return;
        }
        if first == 0 {
            self.words[place + FIRST] = target;
        } else if second == 0 {
            self.words[place + SECOND] = target;
        } else {
            uncount(first, targets);
            self.words[place + FIRST] = second;
            self.words[place + SECOND] = target;
        }
        targets.set(Field::StickyKeys, slot, targets.get(Field::StickyKeys, slot) + 1);
    }

    /// Drop the idle keys of the next `sets` sets.
    pub(crate) fn sweep(&mut self, sets: usize, now_ns: u64, max_idle_ns: u64, targets: &mut Targets<'_>) {
        (0..sets.min(SETS)).for_each(|_| self.sweep_set(now_ns, max_idle_ns, targets));
    }

    /// Count again how many keys each target has; walks the whole table.
    pub(crate) fn recount(&self, targets: &mut Targets<'_>) {
        for slot in 0..targets.slot_end() as u16 {
            targets.set(Field::StickyKeys, slot, 0);
        }
        for target in self.places().flat_map(|place| [self.words[place + FIRST], self.words[place + SECOND]]) {
            if let Some(slot) = slot_of(target, targets) {
                targets.set(Field::StickyKeys, slot, targets.get(Field::StickyKeys, slot) + 1);
            }
        }
    }

    /// # Errors
    /// Names the first target whose keys are not as many as it is said to have.
    pub fn check_integrity(&self, targets: &Targets<'_>) -> Result<(), String> {
        let mut counts = vec![0; targets.slot_end()];
        for target in self.places().flat_map(|place| [self.words[place + FIRST], self.words[place + SECOND]]) {
            if let Some(slot) = slot_of(target, targets) {
                counts[usize::from(slot)] += 1;
            }
        }
        match (0u16..).zip(counts).find(|&(slot, count)| targets.get(Field::StickyKeys, slot) != count) {
            Some((slot, count)) => Err(format!("slot {slot}: has {count} sticky keys, says otherwise")),
            None => Ok(()),
        }
    }

    fn places(&self) -> impl Iterator<Item = usize> + '_ {
        let place = |index: usize| HEADER_WORDS + index / WAYS * SET_WORDS + index % WAYS;
        (0..PLACES).map(place).filter(|&place| self.words[place] != 0)
    }

    fn set_of(key: u64) -> usize {
        HEADER_WORDS + (key as usize % SETS) * SET_WORDS
    }

    fn find(&self, key: u64) -> Option<usize> {
        let set = Self::set_of(key);
        (set..set + WAYS).find(|&place| self.words[place] == key)
    }

    /// Where a new key goes: a free place, or that of the key that was idle for longest.
    fn place_for(&mut self, key: u64, targets: &mut Targets<'_>) -> usize {
        let set = Self::set_of(key);
        let used = |place: usize| if self.words[place] == 0 { 0 } else { self.words[place + USED].max(1) };
        let place = (set..set + WAYS).min_by_key(|&place| used(place)).unwrap_or(set);
        self.forget(place, targets);
        place
    }

    fn is_idle(&self, place: usize, now_ns: u64, max_idle_ns: u64) -> bool {
        now_ns.saturating_sub(self.words[place + USED]) > max_idle_ns
    }

    fn forget(&mut self, place: usize, targets: &mut Targets<'_>) {
        for column in [FIRST, SECOND] {
            uncount(std::mem::take(&mut self.words[place + column]), targets);
        }
        self.words[place] = 0;
    }

    fn sweep_set(&mut self, now_ns: u64, max_idle_ns: u64, targets: &mut Targets<'_>) {
        let set = self.words[CURSOR] as usize % SETS;
        self.words[CURSOR] = (set + 1) as u64;
        let start = HEADER_WORDS + set * SET_WORDS;
        for place in start..start + WAYS {
            if self.words[place] != 0 && self.is_idle(place, now_ns, max_idle_ns) {
                self.forget(place, targets);
            }
        }
    }
}

/// The slot of a target that is still the one that was meant.
fn slot_of(target: u64, targets: &Targets<'_>) -> Option<u16> {
    let slot = ((target & 0xFFFF) as u16).checked_sub(1)?;
    (targets.is_taken(slot) && targets.incarnation(slot) == target >> 16).then_some(slot)
}

fn uncount(target: u64, targets: &mut Targets<'_>) {
    if let Some(slot) = slot_of(target, targets) {
        targets.set(Field::StickyKeys, slot, targets.get(Field::StickyKeys, slot).saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Region;

    const IDLE: u64 = 1_000;

    fn with<R>(targets: usize, check: impl FnOnce(StickyKeys<'_>, Targets<'_>) -> R) -> R {
        let region = Region::anonymous(1 << 20, 1, 0);
        let mut guard = region.lock().unwrap();
        let mut state = guard.state();
        for _ in 0..targets {
            state.targets.claim(1).unwrap();
        }
        check(state.sticky_keys, state.targets)
    }

    fn known(keys: &StickyKeys<'_>, targets: &Targets<'_>, key: u64, now_ns: u64) -> Vec<u16> {
        keys.check_integrity(targets).unwrap();
        keys.targets_of(key, now_ns, IDLE, targets).collect()
    }

    #[test]
    fn two_targets_are_remembered_and_the_third_replaces_the_first() {
        with(4, |mut keys, mut targets| {
            for (slot, expected) in [(2, vec![2]), (2, vec![2]), (0, vec![2, 0]), (2, vec![2, 0]), (3, vec![0, 3])] {
                keys.remember(7, slot, 5, IDLE, &mut targets);
                assert_eq!(known(&keys, &targets, 7, 6), expected);
            }
            assert_eq!(known(&keys, &targets, 8, 6).len(), 0);
        });
    }

    #[test]
    fn who_left_is_not_found_and_its_place_is_used_again() {
        with(3, |mut keys, mut targets| {
            keys.remember(7, 0, 5, IDLE, &mut targets);
            keys.remember(7, 1, 5, IDLE, &mut targets);
            targets.free(0);
            assert_eq!(known(&keys, &targets, 7, 6), [1]);
            assert_eq!(targets.claim(1), Some(0));
            assert_eq!(known(&keys, &targets, 7, 6), [1], "another worker in the same slot");
            keys.remember(7, 2, 5, IDLE, &mut targets);
            assert_eq!(known(&keys, &targets, 7, 6), [2, 1]);
        });
    }

    #[test]
    fn idle_keys_are_forgotten_by_use_and_by_sweeps() {
        with(2, |mut keys, mut targets| {
            keys.remember(7, 0, 5, IDLE, &mut targets);
            keys.remember(8, 0, 500, IDLE, &mut targets);
            assert_eq!(known(&keys, &targets, 7, 5 + IDLE), [0]);
            assert_eq!(known(&keys, &targets, 7, 6 + IDLE).len(), 0);
            keys.remember(7, 1, 6 + IDLE, IDLE, &mut targets);
            assert_eq!(known(&keys, &targets, 7, 6 + IDLE), [1]);
            keys.sweep(SETS, 501 + IDLE, IDLE, &mut targets);
            assert_eq!([0, 1].map(|slot| targets.get(Field::StickyKeys, slot)), [0, 1]);
        });
    }

    #[test]
    fn a_full_set_forgets_whoever_was_idle_for_longest() {
        with(2, |mut keys, mut targets| {
            let key = |n: usize| (9 + n * SETS) as u64;
            for n in 0..WAYS {
                keys.remember(key(n), 0, 100 - n as u64, u64::MAX, &mut targets);
            }
            keys.remember(key(WAYS), 1, 200, u64::MAX, &mut targets);
            assert_eq!(keys.targets_of(key(WAYS - 1), 200, u64::MAX, &targets).count(), 0);
            assert!((0..WAYS - 1).all(|n| keys.targets_of(key(n), 200, u64::MAX, &targets).eq([0])));
            keys.check_integrity(&targets).unwrap();
            let counts = [0, 1].map(|slot| targets.get(Field::StickyKeys, slot));
            targets.set(Field::StickyKeys, 0, 99);
            assert!(keys.check_integrity(&targets).is_err());
            keys.recount(&mut targets);
            assert_eq!([0, 1].map(|slot| targets.get(Field::StickyKeys, slot)), counts);
        });
    }
}
