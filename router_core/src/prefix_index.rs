//! Which target probably holds how much of a prompt in its KV cache: one bounded table, one walk that scores every target.
//!
//! **Owner and mutability.** All state lives in one slice of words that the caller lends ([`Layout::attach`]): memory of a region,
//! zeroed when new. `PrefixIndex` is a view of it without state of its own; whoever holds the region's lock may change it. Places
//! and sizes come from the [`Layout`], never from the memory; every number read from the memory is bounds-checked, so damaged
//! memory gives wrong hints, not crashes. Nothing is allocated here.
//!
//! **What is kept.** For each block key an entry of 16 bytes; in it the targets (holders) that were sent the prompt up to that
//! block, each with a stamp of the target's own clock. A holder is *resident* while its target has been sent less than one
//! capacity of new text since (`clock`). A key stands for the whole prompt up to its block, so entries may be lost one by one
//! without making a claim wrong, and a match is the deepest resident block, gaps or not.
//!
//! ```text
//! header   8 words: sweep cursor, sweep cycle, cursors of rows, dense rows and chunks, pause of those
//! clocks   8 words a target, and a face each
//! pages    a bit for each 64 buckets: whether anything was ever put there
//! buckets  4 entries of 2 words: (tag 48 | depth class 8 | kind 8), (holder 32, holder 32) or number of a row or dense row
//! rows     8 words: (count 8 | owner 56), 14 holders
//! dense    34 words: owner, marks, 128 chunk numbers of 16 bits
//! chunks   17 words: owner 32 | 32 bits; 32 stamps of 32 bits
//! holder   slot 12 | stamp 20
//! ```
//!
//! **Invariant.** No stored stamp is older than its 20 bits can tell: each advance of a clock sweeps the share of the table that it
//! owes (`clock::CYCLE_QUANTA`), and a sweep drops what is not resident.

mod clock;
mod dense;
mod matches;
mod rows;
mod store;
mod table;

use crate::prompt::Block;
use clock::{Clocks, Stamps};
use dense::Dense;
pub use matches::{Match, Matches};
use rows::Rows;
use store::Store;
use table::{Holder, Table};

/// Slots that a holder can name: 12 bits.
pub const MAX_TARGETS: usize = 1 << 12;

const HEADER_WORDS: usize = 8;
const SWEEP_WORDS: usize = 2;
const CURSOR: usize = 0;
const CYCLE: usize = 1;

/// One 64-byte row per 8 buckets of 64 bytes: rows are for blocks with three holders and more.
const BUCKETS_PER_ROW: usize = 8;

/// The share of the memory that is for blocks with more holders than a row has: of 16 MiB, what 1,024 targets need to hold two and a
/// half prefixes of 32 KB, or up to 256 targets to hold ten.
const DENSE_SHARE: usize = 16;
const CHUNKS_PER_DENSE_ROW: usize = 8;
/// A dense row and its chunks.
const DENSE_WORDS: usize = dense::ROW_WORDS + CHUNKS_PER_DENSE_ROW * dense::CHUNK_WORDS;

/// Places of a match at which is looked how old it is: one for so many blocks, but not more of them.
const BLOCKS_PER_PART: u32 = 8;
const LIFTED_PARTS: u32 = 4;

/// Buckets swept by each stamp whatever the clocks owe, so that an idle fleet's table is cleaned too.
const BUCKETS_PER_STAMP: usize = 2;

/// Blocks whose cache lines a lookup fetches side by side: two lines each, as many as a core has under way at once.
const BLOCKS_TOGETHER: usize = 16;

/// Where things are in the memory of an index. A function of its two sizes only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    targets: usize,
    buckets: usize,
    rows: usize,
    dense_rows: usize,
}

impl Layout {
    /// The layout of an index in about `memory_bytes` (rounded down, at least one row and its buckets) for slots `0..targets`.
    ///
    /// # Panics
    /// When `targets` is more than [`MAX_TARGETS`].
    pub fn new(memory_bytes: usize, targets: usize) -> Self {
        assert!(targets <= MAX_TARGETS, "a holder names its target in 12 bits");
        let fixed = (HEADER_WORDS + clock_words(targets)) * size_of::<u64>();
        let words = memory_bytes.saturating_sub(fixed) / size_of::<u64>();
        let words =
            words.saturating_sub(table::page_words(words / table::BUCKET_WORDS).next_multiple_of(table::BUCKET_WORDS));
        let dense_rows = (words / DENSE_SHARE / DENSE_WORDS).min(dense::MAX_CHUNKS / CHUNKS_PER_DENSE_ROW);
        let row_words = BUCKETS_PER_ROW * table::BUCKET_WORDS + rows::WORDS;
        // Positions of entries are kept in 32 bits.
        let rows = ((words - dense_rows * DENSE_WORDS) / row_words).clamp(1, 1 << 26);
        Self { targets, rows, buckets: rows * BUCKETS_PER_ROW, dense_rows }
    }

    /// Words of memory that an index of this layout takes.
    pub fn words(&self) -> usize {
        let index = self.buckets * table::BUCKET_WORDS + self.rows * rows::WORDS + self.dense_rows * DENSE_WORDS;
        HEADER_WORDS + clock_words(self.targets) + self.page_words() + index
    }

    /// A multiple of a cache line.
    fn page_words(&self) -> usize {
        table::page_words(self.buckets).next_multiple_of(table::BUCKET_WORDS)
    }

    /// Blocks that the table can hold.
    pub fn entries(&self) -> usize {
        self.buckets * table::ENTRIES
    }

    /// The index in `memory`. Zeroed memory is an empty index; 64-byte alignment makes it faster.
    ///
    /// # Panics
    /// When `memory` is not [`Layout::words`] long.
    pub fn attach<'m>(&self, memory: &'m mut [u64]) -> PrefixIndex<'m> {
        assert_eq!(memory.len(), self.words(), "memory of another layout");
        let (sweep, memory) = memory.split_at_mut(SWEEP_WORDS);
        let (cursors, memory) = memory.split_at_mut(HEADER_WORDS - SWEEP_WORDS);
        let (row_cursor, dense_cursors) = cursors.split_at_mut(1);
        let (clocks, memory) = memory.split_at_mut(self.targets * clock::WORDS);
        let (faces, memory) = memory.split_at_mut(face_words(self.targets));
        let (pages, memory) = memory.split_at_mut(self.page_words());
        let (buckets, memory) = memory.split_at_mut(self.buckets * table::BUCKET_WORDS);
        let (rows, memory) = memory.split_at_mut(self.rows * rows::WORDS);
        let (dense_rows, chunks) = memory.split_at_mut(self.dense_rows * dense::ROW_WORDS);
        let rows = Rows { cursor: &mut row_cursor[0], words: rows };
        let dense = Dense { cursors: dense_cursors, rows: dense_rows, chunks };
        PrefixIndex {
            sweep,
            clocks: Clocks { clocks, faces },
            store: Store { table: Table::new(pages, buckets), rows, dense },
        }
    }
}

fn clock_words(targets: usize) -> usize {
    targets * clock::WORDS + face_words(targets)
}

fn face_words(targets: usize) -> usize {
    targets.next_multiple_of(matches::GROUP)
}

/// What a stamp claimed, to be taken back if the worker never answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Claim {
    stamps: Stamps,
    from_block: u32,
}

/// The index in a region's memory.
pub struct PrefixIndex<'m> {
    sweep: &'m mut [u64],
    clocks: Clocks<'m>,
    store: Store<'m>,
}

impl PrefixIndex<'_> {
    /// A new worker stands in `slot`: it holds nothing, and at most `capacity_bytes` of text from now on. O(1).
    pub fn open_target(&mut self, slot: u16, capacity_bytes: u64) {
        self.forget_target(slot);
        self.clocks.set_capacity(slot, capacity_bytes);
    }

    /// The target in `slot` turned out to hold at most `capacity_bytes` of text. What it holds is kept as far as it fits. O(1).
    pub fn set_capacity(&mut self, slot: u16, capacity_bytes: u64) {
        self.clocks.set_capacity(slot, capacity_bytes);
    }

    /// The target in `slot` holds nothing any more: removed, restarted, flushed. O(1).
    pub fn forget_target(&mut self, slot: u16) {
        self.clocks.forget_at_next_tick(slot);
        self.tick(slot, 1);
    }

    /// The target in `slot` is credited with no more than the last `bytes` of text that it was sent, from now on; what comes later
    /// is added to that as far as the capacity goes. O(1).
    pub fn trim(&mut self, slot: u16, bytes: u64) {
        self.clocks.trim(slot, bytes);
    }

    /// How much of the prompt `blocks` each target holds, for all targets in one walk.
    pub fn lookup(&self, blocks: &[Block], matches: &mut Matches) {
        matches.clear();
        // From the deepest block up, so that each holder is met once, however many blocks it holds.
        let mut depth = blocks.len() as u32;
        for together in blocks.rchunks(BLOCKS_TOGETHER) {
            self.store.table.warm(together.iter().map(|block| block.key));
            for block in together.iter().rev() {
                if let Some(position) = self.store.table.find(block.key) {
                    let found = Match { blocks: depth, bytes: block.credit };
                    self.store.settle(position, found, &self.clocks, matches);
                }
                depth -= 1;
            }
        }
    }

    /// How long ago the target in `slot` was last sent the deepest block of `matched`, as a share of its capacity: what was sent
    /// since then may have driven it out. 0 if nothing is matched.
    pub fn age(&self, slot: u16, blocks: &[Block], matched: Match) -> f64 {
        let deepest = matched.blocks.checked_sub(1).and_then(|last| blocks.get(last as usize));
        let Some(position) = deepest.and_then(|block| self.store.table.find(block.key)) else { return 0.0 };
        self.store.holder(position, slot).map_or(0.0, |holder| self.clocks.age_share(holder))
    }

    /// The target in `slot` is asked for `matched` of the prompt again, which means something for everything else in its cache.
    ///
    /// An LRU cache drops what is below its capacity in the order of last use. To be used again lifts text from its place to the
    /// top, which pushes down what was used since, and nothing that was used before. So what lay at half of the horizon counts half
    /// for what will reach the horizon, and what is asked for all the time counts nothing (simulated: where caches are short by a
    /// third, 63 % of the prompts are found instead of 57 %).
    pub fn lift(&mut self, slot: u16, blocks: &[Block], matched: Match) {
        // A prompt's beginning is often younger than its end, since others share it.
        let parts = matched.blocks.div_ceil(BLOCKS_PER_PART).min(LIFTED_PARTS);
        let (mut lifted, mut begin) = (0.0, 0);
        for part in 1..=parts {
            let until = (u64::from(matched.blocks) * u64::from(part) / u64::from(parts)) as u32;
            let Some(last) = until.checked_sub(1).and_then(|last| blocks.get(last as usize)) else { break };
            let end = if part == parts { matched.bytes } else { last.end };
            let age = self.age(slot, blocks, Match { blocks: until, bytes: end });
            let since_used = age.min(1.0) - self.clocks.share(slot, last.end);
            lifted += f64::from(end.saturating_sub(begin)) * since_used.max(0.0);
            begin = end;
        }
        let quanta = self.clocks.quanta(slot, lifted as u64);
        self.clocks.count_lifted(slot, quanta);
        self.tick(slot, quanta);
    }

    /// The prompt `blocks` goes to the target in `slot`, which was found to hold `matched` of it; `uncached_bytes` of text are new
    /// to it (of a batch, in all its prompts).
    pub fn stamp(&mut self, slot: u16, blocks: &[Block], matched: Match, uncached_bytes: u64) -> Claim {
        self.advance(slot, uncached_bytes);
        self.evict(BUCKETS_PER_STAMP);
        let stamps = self.clocks.stamps(slot);
        for (index, block) in blocks.iter().enumerate() {
            let holder = Holder::new(slot, stamps.at(block.end));
            self.store.stamp(block.key, table::depth_class(index), holder, |other| self.clocks.age(other));
        }
        Claim { stamps, from_block: matched.blocks }
    }

    /// The worker never answered what `claim` was made for: what it was sent for the first time then, it does not hold. What it
    /// held before, and what it has been sent again since, stays.
    pub fn take_back(&mut self, slot: u16, blocks: &[Block], claim: Claim) {
        for block in blocks.get(claim.from_block as usize..).unwrap_or_default() {
            if let Some(position) = self.store.table.find(block.key) {
                self.store.remove(position, Holder::new(slot, claim.stamps.at(block.end)));
            }
        }
    }

    /// The target in `slot` says that it holds the block with this key, the `index`th of a prompt. It counts as used now.
    pub fn hold(&mut self, slot: u16, index: usize, key: u64) {
        let holder = Holder::new(slot, self.clocks.stamps(slot).at(0));
        self.store.stamp(key, table::depth_class(index), holder, |other| self.clocks.age(other));
    }

    /// The target in `slot` says that it does not hold the block with this key any more.
    pub fn give_up(&mut self, slot: u16, key: u64) {
        let Some(position) = self.store.table.find(key) else { return };
        if let Some(holder) = self.store.holder(position, slot) {
            self.store.remove(position, holder);
        }
    }

    /// The target in `slot` took in `bytes` of text that no prompt has brought: what it generates takes room in its cache too.
    pub fn advance(&mut self, slot: u16, bytes: u64) {
        let quanta = self.clocks.quanta(slot, bytes);
        self.tick(slot, quanta);
    }

    /// Reclaim what is past its horizon in the next `max_buckets` buckets; how many entries were freed.
    pub fn evict(&mut self, max_buckets: usize) -> usize {
        let (mut left, mut freed) = (max_buckets.min(self.store.table.buckets()), 0);
        while left > 0 {
            let passed = self.pass_unused(left);
            left -= passed;
            if left > 0 {
                freed += self.sweep_bucket();
                left -= 1;
            }
        }
        freed
    }

    /// How far the target's clock has come, and how far it may go on before what is used now does not count any more.
    pub fn clock(&self, slot: u16) -> (u64, u64) {
        self.clocks.now_and_horizon(slot)
    }

    /// Bytes of text that the target in `slot` is credited with: what it was sent since it came, at most its capacity.
    pub fn characters(&self, slot: u16) -> u64 {
        self.clocks.characters(slot)
    }

    /// Bytes of text that the target in `slot` can still take without driving out any.
    pub fn room(&self, slot: u16) -> u64 {
        self.clocks.capacity(slot).saturating_sub(self.clocks.characters(slot))
    }

    /// Buckets in all.
    pub fn buckets(&self) -> usize {
        self.store.table.buckets()
    }

    /// Add up in `counts`, by slot, how many blocks of the buckets from `first` to `end` each target holds.
    pub fn count_blocks(&self, first: usize, end: usize, counts: &mut [u64]) {
        let end = end.min(self.buckets());
        let mut bucket = self.store.table.next_in_use(first, end);
        while bucket < end {
            for position in Table::positions_of_bucket(bucket) {
                self.store.each_holder(position, |holder| {
                    if let (Some(_), Some(count)) =
                        (self.clocks.age(holder), counts.get_mut(usize::from(holder.slot())))
                    {
                        *count += 1;
                    }
                });
            }
            bucket = self.store.table.next_in_use(bucket + 1, end);
        }
    }

    /// Whether what comes next drives out what the target in `slot` holds now.
    pub fn is_full(&self, slot: u16) -> bool {
        self.clocks.is_full(slot)
    }

    /// Checks what must hold between any two calls; for tests, and for an operator who suspects damage. Walks the whole table.
    ///
    /// # Errors
    /// Names the first broken invariant.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.clocks.check_integrity()?;
        self.store.check_integrity()
    }

    /// Advance a clock, and sweep the share of the table that the advance owes.
    fn tick(&mut self, slot: u16, quanta: u64) {
        let cycle = self.sweep[CYCLE];
        let advanced = self.clocks.tick(slot, quanta, cycle).min(clock::CYCLE_QUANTA);
        let buckets = self.store.table.buckets() as u64;
        let owed = (advanced * buckets).div_ceil(clock::CYCLE_QUANTA);
        while self.sweep[CYCLE] == cycle && self.sweep[CURSOR] < owed {
            self.pass_unused((owed - self.sweep[CURSOR]) as usize);
            if self.sweep[CURSOR] < owed {
                self.sweep_bucket();
            }
        }
    }

    /// Move the cursor over what was never used, at most `max_buckets` and not beyond the table's end; how many were passed.
    fn pass_unused(&mut self, max_buckets: usize) -> usize {
        let last = self.store.table.buckets() - 1;
        let cursor = (self.sweep[CURSOR] as usize).min(last);
        let next = self.store.table.next_in_use(cursor, last.min(cursor + max_buckets));
        self.sweep[CURSOR] = next as u64;
        next - cursor
    }

    fn sweep_bucket(&mut self) -> usize {
        let buckets = self.store.table.buckets();
        let bucket = (self.sweep[CURSOR] as usize).min(buckets - 1);
        let mut freed = 0;
        for position in Table::positions_of_bucket(bucket) {
            if self.store.table.entry(position) != table::Entry::Empty {
                let empty = self.store.retain(position, |holder| self.clocks.age(holder).is_some());
                freed += usize::from(empty);
            }
        }
        if bucket + 1 == buckets {
            self.sweep[CURSOR] = 0;
            self.sweep[CYCLE] = self.sweep[CYCLE].wrapping_add(1);
        } else {
            self.sweep[CURSOR] = bucket as u64 + 1;
        }
        freed
    }
}
