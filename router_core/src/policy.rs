//! Policies: which of the targets that can get a request gets it.
//!
//! A policy sees what is known and picks; it changes nothing but the generator and its own turn. Who is a candidate, and what
//! happens to the one picked, is the router's business.

mod balance;
mod cache_aware;
mod consistent_hashing;
mod least_cost;
mod least_load;
mod manual;
mod power_of_two;
mod random;
mod ranks;
mod round_robin;

pub use balance::Balance;
pub use manual::Assignment;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::model::{SET_WORDS, bits};
use crate::prefix_index::{Matches, PrefixIndex};
use crate::prompt::Block;
use crate::random::Random;
use crate::sticky_keys::StickyKeys;
use crate::target::Targets;

/// Picks a target.
pub trait Policy: Send + Sync {
    /// One of the candidates, of which there is at least one.
    fn pick(&self, choice: &mut Choice<'_, '_>) -> u16;

    /// Which rule picked it, for people; asked after `pick`, and only when somebody wants to know.
    fn reason(&self, choice: &Choice<'_, '_>, picked: u16) -> &'static str;

    /// What the request would cost at a candidate, of policies that weigh costs.
    fn cost_seconds(&self, _choice: &Choice<'_, '_>, _slot: u16) -> Option<f64> {
        None
    }

    /// Whether the region shall remember whom a routing key was given to.
    fn keeps_keys(&self) -> bool {
        false
    }
}

/// What policies can be told. Each reads what it has a use for.
#[derive(Clone, Copy, Debug)]
pub struct Parameters {
    /// A match must be more than this share of the prompt to decide.
    pub cache_threshold: f64,
    /// When loads count as out of balance.
    pub balance: Balance,
    /// Who gets a new routing key.
    pub assignment: Assignment,
    /// For how long a routing key is remembered after its last use.
    pub max_idle_ns: u64,
}

/// Makes a policy; by name, in the order of the names.
type Build = fn(&Parameters) -> Box<dyn Policy>;

const POLICIES: [(&str, Build); 8] = [
    ("cache_aware", |parameters| Box::new(cache_aware::CacheAware::new(parameters))),
    ("consistent_hashing", |_| Box::new(consistent_hashing::ConsistentHashing)),
    ("least_cost", |_| Box::new(least_cost::LeastCost)),
    ("least_load", |_| Box::new(least_load::LeastLoad)),
    ("manual", |parameters| Box::new(manual::Manual::new(parameters))),
    ("power_of_two", |_| Box::new(power_of_two::PowerOfTwo)),
    ("random", |_| Box::new(random::Uniform)),
    ("round_robin", |_| Box::new(round_robin::RoundRobin)),
];

/// One policy of each name: the fleet's own, and those that models ask for instead.
pub(crate) struct Policies {
    built: Vec<Box<dyn Policy>>,
    default: usize,
}

impl Policies {
    /// None when no policy is called `default`.
    pub(crate) fn new(default: &str, parameters: &Parameters) -> Option<Self> {
        let default = number(default)?;
        Some(Self { built: POLICIES.iter().map(|(_, build)| build(parameters)).collect(), default })
    }

    /// The policy that [`Policies::word_of`] stands for; the fleet's own for 0.
    pub(crate) fn get(&self, word: u64) -> &dyn Policy {
        &*self.built[self.place(word)]
    }

    /// Its name.
    pub(crate) fn name(&self, word: u64) -> &'static str {
        POLICIES[self.place(word)].0
    }

    /// What stands for a policy in the region: 0 for none named, None for one that is not known.
    pub(crate) fn word_of(name: Option<&str>) -> Option<u64> {
        name.map_or(Some(0), |name| number(name).map(|number| number as u64 + 1))
    }

    fn place(&self, word: u64) -> usize {
        let asked = usize::try_from(word).ok().and_then(|word| word.checked_sub(1));
        asked.filter(|&asked| asked < self.built.len()).unwrap_or(self.default)
    }
}

fn number(name: &str) -> Option<usize> {
    POLICIES.iter().position(|(known, _)| *known == name)
}

/// The policies there are.
pub fn names() -> impl Iterator<Item = &'static str> {
    POLICIES.iter().map(|(name, _)| *name)
}

/// The policy of that name.
pub fn by_name(name: &str, parameters: &Parameters) -> Option<Box<dyn Policy>> {
    number(name).map(|number| POLICIES[number].1(parameters))
}

/// What a policy knows when it picks.
pub struct Choice<'a, 'm> {
    /// Who can get the request.
    pub candidates: &'a Candidates,
    /// The prompt in blocks.
    pub blocks: &'a [Block],
    /// How much of the prompt each target holds.
    pub matches: &'a Matches,
    /// Length of the prompt in bytes of text.
    pub prompt_bytes: u32,
    /// Loads, and what else is known of targets.
    pub targets: &'a Targets<'m>,
    /// What each target is credited with in all.
    pub index: &'a PrefixIndex<'m>,
    /// Whom routing keys were given to.
    pub sticky_keys: &'a StickyKeys<'m>,
    /// What the client says that the request belongs to.
    pub routing_key: Option<u64>,
    /// CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// Behind every random choice.
    pub random: &'a mut Random<'m>,
    /// Of the model that was asked for: the slot after the one that had the last turn.
    pub turn: &'a mut u64,
}

impl Choice<'_, '_> {
    /// The one of `slots` with the smallest key; one at random of those that share it. None of none.
    fn least<K: Ord>(
        &mut self,
        slots: impl Iterator<Item = u16> + Clone,
        key: impl Fn(&Self, u16) -> K,
    ) -> Option<u16> {
        // Internal iteration throughout: of chained iterators, `for` would ask each for the next one, slot by slot. And one draw
        // in the end, not one for each equal: of 512 equals it would be a third of the decision.
        let keys = slots.clone().map(|slot| key(self, slot));
        let (least, equals) = keys.fold((None, 0), |(least, equals), candidate| match &least {
            Some(known) if candidate > *known => (least, equals),
            Some(known) if candidate == *known => (least, equals + 1),
            _ => (Some(candidate), 1),
        });
        let least = least?;
        let mut after = if equals > 1 { self.random.below(equals) } else { 0 };
        let mut slots = slots;
        slots.find(|&slot| {
            let is_equal = key(self, slot) == least;
            let is_it = is_equal && after == 0;
            after -= usize::from(is_equal && !is_it);
            is_it
        })
    }
}

/// Weighs a slot for a key: the heaviest of any set is chosen at random by the key, and stays the heaviest when others leave or
/// join (rendezvous hashing; Thaler and Ravishankar, 1998).
fn rendezvous(key: u64, slot: u16) -> u64 {
    xxh3_64_with_seed(&slot.to_le_bytes(), key)
}

/// A set of slots, in order.
#[derive(Clone, Debug)]
pub struct Candidates {
    words: [u64; SET_WORDS],
    /// Words that can have a bit.
    used: usize,
}

impl Candidates {
    /// The slots of a set of the region, of which those from `slot_end` on are free.
    pub fn new(set: &[u64], slot_end: usize) -> Self {
        let used = slot_end.div_ceil(u64::BITS as usize).min(SET_WORDS).min(set.len());
        let mut words = [0; SET_WORDS];
        words[..used].copy_from_slice(&set[..used]);
        Self { words, used }
    }

    /// Leave a slot out.
    pub fn remove(&mut self, slot: u16) {
        if let Some(word) = self.words.get_mut(usize::from(slot / 64)) {
            *word &= !(1 << (slot % 64));
        }
    }

    /// Whether a slot is in.
    pub fn contains(&self, slot: u16) -> bool {
        self.words.get(usize::from(slot / 64)).is_some_and(|word| word & 1 << (slot % 64) != 0)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.words[..self.used].iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The least and the greatest of the candidates' values in a column.
    pub fn extremes(&self, column: &[u64]) -> (u64, u64) {
        let wider = |(least, greatest): (u64, u64), value: u64| (least.min(value), greatest.max(value));
        let groups = self.words[..self.used].iter().zip(column.chunks_exact(u64::BITS as usize));
        groups.fold((u64::MAX, 0), |extremes, (&word, values)| match word {
            0 => extremes,
            // A plain walk where all are candidates: a third of the time.
            u64::MAX => values.iter().copied().fold(extremes, wider),
            _ => bits(word).map(|bit| values[bit]).fold(extremes, wider),
        })
    }

    /// The slots, from the lowest.
    pub fn iter(&self) -> impl Iterator<Item = u16> + Clone + '_ {
        self.from(0)
    }

    /// The slots from `start` on.
    pub fn from(&self, start: u16) -> impl Iterator<Item = u16> + Clone + '_ {
        let first = usize::from(start / 64);
        let word_bits = move |(index, &word): (usize, &u64)| {
            let mask = if index == first { u64::MAX << (start % 64) } else { u64::MAX };
            Bits { word: word & mask, base: index as u16 * 64 }
        };
        self.words[..self.used].iter().enumerate().skip(first).flat_map(word_bits)
    }

    /// The `rank`th slot, counted from 0.
    pub fn nth(&self, mut rank: usize) -> Option<u16> {
        for (index, &word) in self.words[..self.used].iter().enumerate() {
            let count = word.count_ones() as usize;
            if rank < count {
                return bits(word).nth(rank).map(|bit| (index * 64 + bit) as u16);
            }
            rank -= count;
        }
        None
    }
}

#[derive(Clone)]
struct Bits {
    word: u64,
    base: u16,
}

impl Iterator for Bits {
    type Item = u16;

    #[inline]
    fn next(&mut self) -> Option<u16> {
        let bit = (self.word != 0).then(|| self.word.trailing_zeros() as u16)?;
        self.word &= self.word - 1;
        Some(self.base + bit)
    }
}

#[cfg(test)]
mod fleet;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_known_by_their_names() {
        let parameters = Parameters {
            cache_threshold: 0.5,
            balance: Balance { absolute: 1, relative: 1.0 },
            assignment: Assignment::Random,
            max_idle_ns: 1,
        };
        assert!(names().all(|name| by_name(name, &parameters).is_some()));
        assert!(by_name("smallest_tree", &parameters).is_none());
    }

    #[test]
    fn a_set_of_slots() {
        let mut set = [0; SET_WORDS];
        for slot in [0, 5, 63, 64, 130] {
            set[slot / 64] |= 1 << (slot % 64);
        }
        let mut candidates = Candidates::new(&set, 131);
        assert_eq!(candidates.iter().collect::<Vec<_>>(), [0, 5, 63, 64, 130]);
        assert_eq!(candidates.from(6).collect::<Vec<_>>(), [63, 64, 130]);
        assert_eq!(candidates.from(64).collect::<Vec<_>>(), [64, 130]);
        assert_eq!(candidates.from(131).count(), 0);
        assert_eq!((candidates.nth(0), candidates.nth(3), candidates.nth(5)), (Some(0), Some(64), None));
        candidates.remove(63);
        assert!(!candidates.contains(63) && candidates.contains(64) && !candidates.contains(4095));
        assert_eq!(candidates.count(), 4);
    }
}
