//! Entries: one for each known block, in buckets of a cache line; each key has two buckets it may stand in.

use std::sync::atomic::{Ordering, compiler_fence};

use super::clock::STAMP_BITS;

pub(super) const BUCKET_WORDS: usize = 8;
/// Entries in a bucket.
pub(super) const ENTRIES: usize = BUCKET_WORDS / 2;

const TAG_BITS: u32 = 48;
const KIND_MASK: u64 = 0xFF;

const EMPTY: u64 = 0;
const ONE: u64 = 1;
const TWO: u64 = 2;
const ROW: u64 = 3;
const DENSE: u64 = 4;

/// A target that was sent a block, and when by its own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder(pub(super) u32);

impl Holder {
    pub(super) fn new(slot: u16, stamp: u32) -> Self {
        Self(u32::from(slot) << STAMP_BITS | stamp & ((1 << STAMP_BITS) - 1))
    }

    pub(super) fn slot(self) -> u16 {
        (self.0 >> STAMP_BITS) as u16
    }

    pub(super) fn stamp(self) -> u32 {
        self.0 & ((1 << STAMP_BITS) - 1)
    }
}

/// Who holds the block of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Empty,
    One(Holder),
    Two([Holder; 2]),
    Row(u32),
    Dense(u32),
}

/// A block's depth in its chain in 8 bits: exact up to 127, in steps of 32 from there.
pub(super) fn depth_class(index: usize) -> u8 {
    if index < 128 { index as u8 } else { (124 + (index >> 5)).min(255) as u8 }
}

/// Buckets that stand or fall together as to whether anything was ever put there: a page of memory.
const PAGE_BUCKETS: usize = 64;

/// Words that say which pages of so many buckets are in use.
pub(super) fn page_words(buckets: usize) -> usize {
    buckets.div_ceil(PAGE_BUCKETS).div_ceil(64)
}

/// Positions are entry numbers: bucket times [`ENTRIES`] plus place.
pub(super) struct Table<'m> {
    /// A bit for each page that something was ever put into: who walks the table does not make the system fill in the others.
    pages: &'m mut [u64],
    words: &'m mut [u64],
}

impl<'m> Table<'m> {
    pub(super) fn new(pages: &'m mut [u64], words: &'m mut [u64]) -> Self {
        Self { pages, words }
    }

    /// From `bucket` on the first that is not in a page that was never used, at most `end`.
    pub(super) fn next_in_use(&self, mut bucket: usize, end: usize) -> usize {
        while bucket < end {
            let page = bucket / PAGE_BUCKETS;
            if self.pages[page / 64] >> (page % 64) & 1 == 1 {
                return bucket;
            }
            bucket = (page + 1) * PAGE_BUCKETS;
        }
        end
    }

    pub(super) fn buckets(&self) -> usize {
        self.words.len() / BUCKET_WORDS
    }

    pub(super) fn positions_of_bucket(bucket: usize) -> std::ops::Range<u32> {
        let first = (bucket * ENTRIES) as u32;
        first..first + ENTRIES as u32
    }

    /// The two buckets in which `key` may stand.
    #[inline]
    pub(super) fn candidates(&self, key: u64) -> [usize; 2] {
        let buckets = self.buckets() as u64;
        let scale = |hash: u64| (((hash >> 32) * buckets) >> 32) as usize;
        [scale(key), scale(key.wrapping_mul(0x9E37_79B9_7F4A_7C15))]
    }

    #[inline]
    pub(super) fn find(&self, key: u64) -> Option<u32> {
        let tag = tag_of(key);
        for bucket in self.candidates(key) {
            let words = &self.words[bucket * BUCKET_WORDS..][..BUCKET_WORDS];
            for place in 0..ENTRIES {
                let word = words[2 * place];
                if word >> (64 - TAG_BITS) == tag && word & KIND_MASK != EMPTY {
                    return Some((bucket * ENTRIES + place) as u32);
                }
            }
        }
        None
    }

    /// How many places of a bucket are free, and the position of one of them.
    pub(super) fn free_places(&self, bucket: usize) -> (usize, u32) {
        let words = &self.words[bucket * BUCKET_WORDS..][..BUCKET_WORDS];
        let (mut count, mut free) = (0, 0);
        for place in 0..ENTRIES {
            if words[2 * place] & KIND_MASK == EMPTY {
                count += 1;
                free = bucket * ENTRIES + place;
            }
        }
        (count, free as u32)
    }

    /// Bring the buckets of `keys` near: their cache lines are fetched side by side here, where finding the keys one by one would
    /// wait for each.
    #[inline]
    pub(super) fn warm(&self, keys: impl Iterator<Item = u64>) {
        let lines = keys.flat_map(|key| self.candidates(key)).map(|bucket| self.words[bucket * BUCKET_WORDS]);
        // The loads are the purpose, not what they add up to.
        std::hint::black_box(lines.fold(0, |all, word| all ^ word));
    }

    /// The entry at a position; empty if there is no such position or what stands there cannot be an entry.
    #[inline]
    pub(super) fn entry(&self, position: u32) -> Entry {
        let at = position as usize * 2;
        let Some(&[head, body]) = self.words.get(at..).and_then(|words| words.first_chunk()) else {
            return Entry::Empty;
        };
        let holders = [Holder(body as u32), Holder((body >> 32) as u32)];
        match head & KIND_MASK {
            ONE => Entry::One(holders[0]),
            TWO => Entry::Two(holders),
            ROW => Entry::Row(body as u32),
            DENSE => Entry::Dense(body as u32),
            _ => Entry::Empty,
        }
    }

    pub(super) fn depth_class(&self, position: u32) -> u8 {
        self.words.get(position as usize * 2).map_or(0, |head| (head >> 8) as u8)
    }

    /// Say anew who holds the block of the entry at `position`.
    pub(super) fn set(&mut self, position: u32, entry: Entry) {
        let at = position as usize * 2;
        let Some([head, body]) = self.words.get_mut(at..).and_then(|words| words.first_chunk_mut()) else { return };
        let (kind, new_body) = match entry {
            Entry::Empty => {
                *head = 0;
                return;
            }
            Entry::One(holder) => (ONE, u64::from(holder.0)),
            Entry::Two([first, second]) => (TWO, u64::from(second.0) << 32 | u64::from(first.0)),
            Entry::Row(row) => (ROW, u64::from(row)),
            Entry::Dense(row) => (DENSE, u64::from(row)),
        };
        if *head & KIND_MASK != kind {
            // Whoever dies in between leaves an empty entry, not a body that is read as another kind.
            *head &= !KIND_MASK;
            compiler_fence(Ordering::SeqCst);
            *body = new_body;
            compiler_fence(Ordering::SeqCst);
            *head |= kind;
        } else {
            *body = new_body;
        }
    }

    /// Put the block of `key` where another stood.
    pub(super) fn replace(&mut self, position: u32, key: u64, class: u8, holder: Holder) {
        let page = position as usize / ENTRIES / PAGE_BUCKETS;
        if let Some(pages) = self.pages.get_mut(page / 64) {
            *pages |= 1 << (page % 64);
        }
        let at = position as usize * 2;
        if let Some(head) = self.words.get_mut(at) {
            *head = tag_of(key) << (64 - TAG_BITS) | u64::from(class) << 8;
        }
        self.set(position, Entry::One(holder));
    }

    /// Whether no other entry of the same bucket has the tag of the entry at `position`.
    pub(super) fn is_alone(&self, position: u32) -> bool {
        let head = |position: u32| self.words[position as usize * 2];
        let bucket = position as usize / ENTRIES;
        Self::positions_of_bucket(bucket).all(|other| {
            other == position
                || self.entry(other) == Entry::Empty
                || head(other) >> (64 - TAG_BITS) != head(position) >> (64 - TAG_BITS)
        })
    }
}

fn tag_of(key: u64) -> u64 {
    key & ((1 << TAG_BITS) - 1)
}
