//! What a lookup finds: how much of the prompt each target holds.

use super::table::Holder;

/// Slots whose bits stand together: as many as a chunk of a dense row has.
pub(super) const GROUP: usize = 32;

/// How much of a prompt a target holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// Blocks of the chain, from its start.
    pub blocks: u32,
    /// Bytes of prompt text, the answer after the last block included.
    pub bytes: u32,
}

/// Targets of one group that hold equally much.
#[derive(Clone, Copy, Debug)]
struct Run {
    group: u16,
    /// The number of the run of the same group that was found before it, plus one; 0: none.
    before: u16,
    bits: u32,
    found: Match,
}

/// The result of a lookup: scratch memory of the caller, reused from lookup to lookup.
///
/// Holders are kept in runs, those that hold most first: what hundreds hold alike is found and written 32 at a time.
#[derive(Clone, Debug)]
pub struct Matches {
    runs: Vec<Run>,
    /// By group: the number of its last run, plus one; 0: none.
    last: Vec<u16>,
    /// By group: who need not be looked at again. Those past the last target are always in.
    settled: Vec<u32>,
    targets: usize,
    /// Of a dense row whose holders are all settled; 0 is that of a row without any.
    pub(super) settled_marks: u64,
}

impl Matches {
    /// Room for matches of slots `0..targets`.
    pub fn new(targets: usize) -> Self {
        let groups = targets.div_ceil(GROUP);
        let (runs, last) = (Vec::with_capacity(targets), vec![0; groups]);
        let mut matches = Self { runs, last, settled: vec![0; groups], targets, settled_marks: 0 };
        matches.clear();
        matches
    }

    /// What the target in `slot` holds.
    pub fn of(&self, slot: u16) -> Match {
        let (group, index) = (usize::from(slot) / GROUP, usize::from(slot) % GROUP);
        let mut number = self.last.get(group).copied().unwrap_or_default();
        while let Some(run) = usize::from(number).checked_sub(1).and_then(|number| self.runs.get(number)) {
            if run.bits >> index & 1 == 1 {
                return run.found;
            }
            number = run.before;
        }
        Match::default()
    }

    /// The targets that hold at least one block, those that hold most first.
    pub fn holders(&self) -> impl Iterator<Item = (u16, Match)> + Clone + '_ {
        self.runs.iter().flat_map(|run| {
            let slot = move |index| (usize::from(run.group) * GROUP + index) as u16;
            ones(run.bits).map(move |index| (slot(index), run.found))
        })
    }

    pub(super) fn clear(&mut self) {
        for run in self.runs.drain(..) {
            self.last[usize::from(run.group)] = 0;
        }
        self.settled_marks = 0;
        self.settled.fill(0);
        if let Some(last) = self.settled.last_mut().filter(|_| !self.targets.is_multiple_of(GROUP)) {
            *last = u32::MAX << (self.targets % GROUP);
        }
    }

    /// Of a group, the targets that are settled already.
    #[inline]
    pub(super) fn settled(&self, group: usize) -> u32 {
        self.settled.get(group).copied().unwrap_or(u32::MAX)
    }

    /// `bits` of a group hold `found`; none of them is settled.
    #[inline]
    pub(super) fn settle(&mut self, group: usize, bits: u32, found: Match) {
        if let (Some(settled), Some(last)) = (self.settled.get_mut(group), self.last.get_mut(group)) {
            *settled |= bits;
            self.runs.push(Run { group: group as u16, before: *last, bits, found });
            *last = self.runs.len() as u16;
        }
    }

    /// `holder` holds `found`, if it is not settled and `is_resident`.
    #[inline]
    pub(super) fn settle_one(&mut self, holder: Holder, found: Match, is_resident: impl FnOnce(Holder) -> bool) {
        let (group, bit) = (usize::from(holder.slot()) / GROUP, 1 << (usize::from(holder.slot()) % GROUP));
        if self.settled(group) & bit == 0 && is_resident(holder) {
            self.settle(group, bit, found);
        }
    }
}

/// The numbers of the bits that are 1.
pub(super) fn ones(mut bits: u32) -> impl Iterator<Item = usize> + Clone {
    std::iter::from_fn(move || {
        let bit = bits.trailing_zeros() as usize;
        bits &= bits.wrapping_sub(1);
        (bit < GROUP).then_some(bit)
    })
}
