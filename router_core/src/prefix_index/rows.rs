//! Rows: the holders of a block that has more than two, 14 to a cache line, in a fixed pool.
//!
//! A row carries the position of the entry it belongs to and is valid only if that entry points back; a row that is not valid is
//! free. So nobody keeps a list of free rows, and a row that a dying process left behind is found again.

use super::table::Holder;

pub(super) const WORDS: usize = 8;
/// Holders in a row.
pub(super) const HOLDERS: usize = 2 * (WORDS - 1);

/// Rows looked at to find a free one. Short of free rows a block keeps its two newest holders, which costs less than a search.
const TRIES: usize = 8;

pub(super) struct Rows<'m> {
    pub(super) cursor: &'m mut u64,
    pub(super) words: &'m mut [u64],
}

impl Rows<'_> {
    /// A free row for the entry at `position`, without holders; `points_back(position, row)` says whether an entry uses a row.
    pub(super) fn claim(&mut self, position: u32, points_back: impl Fn(u32, u32) -> bool) -> Option<u32> {
        let rows = (self.words.len() / WORDS) as u64;
        for _ in 0..TRIES {
            let row = (*self.cursor % rows) as u32;
            *self.cursor = (u64::from(row) + 1) % rows;
            let free = self.owner(row).is_none_or(|owner| !points_back(owner, row));
            if free {
                self.set_head(row, position, 0);
                return Some(row);
            }
        }
        None
    }

    pub(super) fn belongs(&self, row: u32, position: u32) -> bool {
        self.owner(row) == Some(position)
    }

    pub(super) fn release(&mut self, row: u32) {
        if let Some(words) = self.row_mut(row) {
            words[0] = 0;
        }
    }

    pub(super) fn count(&self, row: u32) -> usize {
        self.row(row).map_or(0, |words| ((words[0] >> 56) as usize).min(HOLDERS))
    }

    #[inline]
    pub(super) fn holders(&self, row: u32) -> impl Iterator<Item = Holder> + '_ {
        let words = self.row(row).unwrap_or(&[0; WORDS]);
        (0..self.count(row)).map(|index| holder_of(words, index))
    }

    pub(super) fn set(&mut self, row: u32, index: usize, holder: Holder) {
        if let Some(words) = self.row_mut(row) {
            let word = &mut words[1 + index / 2];
            let shift = 32 * (index % 2);
            *word = *word & !(0xFFFF_FFFF << shift) | u64::from(holder.0) << shift;
        }
    }

    pub(super) fn push(&mut self, row: u32, position: u32, holder: Holder) {
        let count = self.count(row);
        if count < HOLDERS {
            self.set(row, count, holder);
            self.set_head(row, position, count + 1);
        }
    }

    /// Keep the holders for which `keep` says so; how many are left.
    pub(super) fn retain(&mut self, row: u32, position: u32, keep: impl Fn(Holder) -> bool) -> usize {
        let count = self.count(row);
        let mut left = 0;
        for index in 0..count {
            let holder = self.row(row).map_or(Holder(0), |words| holder_of(words, index));
            if keep(holder) {
                self.set(row, left, holder);
                left += 1;
            }
        }
        if left != count {
            self.set_head(row, position, left);
        }
        left
    }

    fn owner(&self, row: u32) -> Option<u32> {
        u32::try_from((self.row(row)?[0] & ((1 << 56) - 1)).checked_sub(1)?).ok()
    }

    fn set_head(&mut self, row: u32, position: u32, count: usize) {
        if let Some(words) = self.row_mut(row) {
            words[0] = (count as u64) << 56 | (u64::from(position) + 1);
        }
    }

    fn row(&self, row: u32) -> Option<&[u64; WORDS]> {
        self.words.get(row as usize * WORDS..)?.first_chunk()
    }

    fn row_mut(&mut self, row: u32) -> Option<&mut [u64; WORDS]> {
        self.words.get_mut(row as usize * WORDS..)?.first_chunk_mut()
    }
}

fn holder_of(words: &[u64; WORDS], index: usize) -> Holder {
    Holder((words[1 + index / 2] >> (32 * (index % 2))) as u32)
}
