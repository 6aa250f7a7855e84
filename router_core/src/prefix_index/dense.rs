//! Dense rows: the holders of a block that more targets hold than a row has places, with a place for every target.
//!
//! A dense row is a cache line: a directory of chunks, each with the places of 256 slots; a chunk is there when a target of its
//! slots holds the block. A chunk has a stamp for each slot, and a bit, so that slots of no interest are passed over 64 at a time.
//!
//! As in `rows`, a dense row carries the position of its entry and is valid only if the entry points back; a chunk carries the
//! dense row and the place in its directory, and is valid only if the row is and points back. What is not valid is free.

use super::table::Holder;

pub(super) const ROW_WORDS: usize = 8;
pub(super) const CHUNK_WORDS: usize = HEAD_WORDS + CHUNK_SLOTS / 2;
/// Directories name chunks in 16 bits; 0 is none.
pub(super) const MAX_CHUNKS: usize = (1 << 16) - 1;

const CHUNK_SLOTS: usize = 256;
/// Places in a directory: enough for every slot.
const PLACES: usize = super::MAX_TARGETS / CHUNK_SLOTS;

/// A row: the position of its entry, the directory, and the marks of its holders xored: equal marks, equal holders (but for one
/// case in 2^64, where a lookup misses a holder).
const DIRECTORY: usize = 1;
const MARKS: usize = DIRECTORY + PLACES / 4;
/// A chunk: whose it is, a bit for each slot that has a stamp, nothing up to the end of the cache line, then the stamps.
const BITS: usize = 1;
const BITS_WORDS: usize = CHUNK_SLOTS / 64;
const HEAD_WORDS: usize = 8;

/// Rows or chunks looked at to find a free one.
const TRIES: usize = 8;

type Chunk = [u64; CHUNK_WORDS];

/// Targets of which a lookup need not hear again.
#[derive(Clone, Debug)]
pub(super) struct Settled {
    /// A bit for each slot; those past the last target are always set.
    bits: Vec<u64>,
    targets: usize,
    /// Of a dense row whose holders are all settled; 0 is that of a row without any.
    marks: u64,
}

impl Settled {
    pub(super) fn new(targets: usize) -> Self {
        let mut settled = Self { bits: vec![0; targets.div_ceil(64)], targets, marks: 0 };
        settled.clear();
        settled
    }

    pub(super) fn clear(&mut self) {
        self.marks = 0;
        self.bits.fill(0);
        if let Some(last) = self.bits.last_mut().filter(|_| self.targets % 64 > 0) {
            *last = u64::MAX << (self.targets % 64);
        }
    }

    /// Show `holder` to `settle` if it is not settled, and settle it where that says so.
    #[inline]
    pub(super) fn settle(&mut self, holder: Holder, settle: impl FnOnce(Holder) -> bool) {
        let Some(bits) = self.bits.get_mut(usize::from(holder.slot()) / 64) else { return };
        let bit = 1 << (holder.slot() % 64);
        if *bits & bit == 0 && settle(holder) {
            *bits |= bit;
        }
    }
}

/// As many rows as chunks: a row without a chunk is of no use.
pub(super) struct Dense<'m> {
    /// Where the searches for free rows and for free chunks go on.
    pub(super) cursors: &'m mut [u64],
    pub(super) rows: &'m mut [u64],
    pub(super) chunks: &'m mut [u64],
}

impl Dense<'_> {
    /// A free dense row for the entry at `position`, without holders; `points_back(position, row)` says whether an entry uses a row.
    pub(super) fn claim(&mut self, position: u32, points_back: impl Fn(u32, u32) -> bool) -> Option<u32> {
        let rows = self.rows.len() / ROW_WORDS;
        let (row, cursor) = search(self.cursors[0], rows, |row| !self.is_used(row, &points_back));
        self.cursors[0] = cursor;
        let words = self.row_mut(row?)?;
        *words = [0; ROW_WORDS];
        words[0] = u64::from(position) + 1;
        row
    }

    pub(super) fn belongs(&self, row: u32, position: u32) -> bool {
        self.owner(row) == Some(position)
    }

    /// Put `holder` in its place. False if there is no chunk for it.
    pub(super) fn put(&mut self, row: u32, holder: Holder, points_back: impl Fn(u32, u32) -> bool) -> bool {
        let (place, index) = place_of(holder.slot());
        let Some(chunk) = self.chunk_at(row, place).or_else(|| self.claim_chunk(row, place, points_back)) else {
            return false;
        };
        let Some(words) = self.chunk_mut(chunk) else { return false };
        let stamps = &mut words[HEAD_WORDS + index / 2];
        let shift = 32 * (index % 2);
        *stamps = *stamps & !(0xFFFF_FFFF << shift) | u64::from(holder.stamp()) << shift;
        let is_new = words[BITS + index / 64] >> (index % 64) & 1 == 0;
        words[BITS + index / 64] |= 1 << (index % 64);
        if is_new {
            self.flip_mark(row, holder.slot());
        }
        true
    }

    /// The holder in the place of `slot`.
    pub(super) fn get(&self, row: u32, slot: u16) -> Option<Holder> {
        let (place, index) = place_of(slot);
        let words = self.chunk(self.chunk_at(row, place)?)?;
        (words[BITS + index / 64] >> (index % 64) & 1 == 1).then(|| holder_at(words, place, index))
    }

    /// Empty the place of `holder`, if it is the one that stands there.
    pub(super) fn remove(&mut self, row: u32, holder: Holder) {
        if self.get(row, holder.slot()) != Some(holder) {
            return;
        }
        let (place, index) = place_of(holder.slot());
        if let Some(words) = self.chunk_at(row, place).and_then(|chunk| self.chunk_mut(chunk)) {
            words[BITS + index / 64] &= !(1 << (index % 64));
            self.flip_mark(row, holder.slot());
        }
    }

    pub(super) fn holders(&self, row: u32) -> impl Iterator<Item = Holder> + '_ {
        (0..PLACES).filter_map(move |place| Some((place, self.chunk(self.chunk_at(row, place)?)?))).flat_map(
            |(place, words)| {
                let bits = (0..BITS_WORDS).flat_map(|word| ones(words[BITS + word]).map(move |bit| 64 * word + bit));
                bits.map(move |index| holder_at(words, place, index))
            },
        )
    }

    /// Show the holders that are not yet in `settled` to `settle`, and add those for which it says so.
    #[inline]
    pub(super) fn settle(&self, row: u32, settled: &mut Settled, mut settle: impl FnMut(Holder) -> bool) {
        let Some(directory) = self.row(row) else { return };
        // Most often those who hold a block hold the one before it too, and nobody else does.
        if directory[MARKS] == settled.marks {
            return;
        }
        let mut open = 0;
        for (place, bits) in settled.bits.chunks_mut(BITS_WORDS).take(PLACES).enumerate() {
            let Some(words) = chunk_in(directory, place).and_then(|chunk| self.chunk(chunk)) else { continue };
            if words[0] != owner_word(row, place) {
                continue;
            }
            for (word, bits) in bits.iter_mut().enumerate() {
                for bit in ones(words[BITS + word] & !*bits) {
                    let is_settled = settle(holder_at(words, place, 64 * word + bit));
                    *bits |= u64::from(is_settled) << bit;
                }
                open |= words[BITS + word] & !*bits;
            }
        }
        if open == 0 {
            settled.marks = directory[MARKS];
        }
    }

    /// Keep the holders for which `keep` says so; how many are left.
    pub(super) fn retain(&mut self, row: u32, keep: impl Fn(Holder) -> bool) -> usize {
        let mut left = 0;
        let mut marks = 0;
        for place in 0..PLACES {
            let Some(words) = self.chunk_at(row, place).and_then(|chunk| self.chunk_mut(chunk)) else { continue };
            let mut in_chunk = 0;
            for word in 0..BITS_WORDS {
                let gone = ones(words[BITS + word])
                    .filter(|bit| !keep(holder_at(words, place, 64 * word + bit)))
                    .fold(0, |gone, bit| gone | 1 << bit);
                words[BITS + word] &= !gone;
                for bit in ones(words[BITS + word]) {
                    in_chunk += 1;
                    marks ^= mark(holder_at(words, place, 64 * word + bit).slot());
                }
            }
            if in_chunk == 0 {
                self.set_chunk(row, place, 0);
            }
            left += in_chunk;
        }
        if let Some(words) = self.row_mut(row) {
            words[MARKS] = marks;
        }
        left
    }

    pub(super) fn check_row(&self, row: u32) -> Result<(), String> {
        let Some(directory) = self.row(row) else { return Err(format!("there is no dense row {row}")) };
        for place in 0..PLACES {
            if chunk_in(directory, place).is_some() && self.chunk_at(row, place).is_none() {
                return Err(format!("chunk {place} of dense row {row} does not point back"));
            }
        }
        Ok(())
    }

    fn claim_chunk(&mut self, row: u32, place: usize, points_back: impl Fn(u32, u32) -> bool) -> Option<u32> {
        let chunks = self.chunks.len() / CHUNK_WORDS;
        let (chunk, cursor) = search(self.cursors[1], chunks, |chunk| {
            let owner = self.chunk(chunk).and_then(|words| owner_of(words[0]));
            !owner
                .is_some_and(|(row, place)| self.chunk_at(row, place) == Some(chunk) && self.is_used(row, &points_back))
        });
        self.cursors[1] = cursor;
        let words = self.chunk_mut(chunk?)?;
        words[..HEAD_WORDS].fill(0);
        words[0] = owner_word(row, place);
        self.set_chunk(row, place, chunk? + 1);
        chunk
    }

    fn is_used(&self, row: u32, points_back: impl Fn(u32, u32) -> bool) -> bool {
        self.owner(row).is_some_and(|owner| points_back(owner, row))
    }

    fn owner(&self, row: u32) -> Option<u32> {
        u32::try_from(self.row(row)?[0].checked_sub(1)?).ok()
    }

    /// The chunk at a place of a directory, if it points back.
    fn chunk_at(&self, row: u32, place: usize) -> Option<u32> {
        let chunk = chunk_in(self.row(row)?, place)?;
        (self.chunk(chunk)?[0] == owner_word(row, place)).then_some(chunk)
    }

    fn set_chunk(&mut self, row: u32, place: usize, name: u32) {
        if let Some(words) = self.row_mut(row) {
            let word = &mut words[DIRECTORY + place / 4];
            let shift = 16 * (place % 4);
            *word = *word & !(0xFFFF << shift) | u64::from(name) << shift;
        }
    }

    fn flip_mark(&mut self, row: u32, slot: u16) {
        if let Some(words) = self.row_mut(row) {
            words[MARKS] ^= mark(slot);
        }
    }

    fn row(&self, row: u32) -> Option<&[u64; ROW_WORDS]> {
        self.rows.get(row as usize * ROW_WORDS..)?.first_chunk()
    }

    fn row_mut(&mut self, row: u32) -> Option<&mut [u64; ROW_WORDS]> {
        self.rows.get_mut(row as usize * ROW_WORDS..)?.first_chunk_mut()
    }

    fn chunk(&self, chunk: u32) -> Option<&Chunk> {
        self.chunks.get(chunk as usize * CHUNK_WORDS..)?.first_chunk()
    }

    fn chunk_mut(&mut self, chunk: u32) -> Option<&mut Chunk> {
        self.chunks.get_mut(chunk as usize * CHUNK_WORDS..)?.first_chunk_mut()
    }
}

/// The first free one of the next [`TRIES`] of `count`, and where to go on next time.
fn search(cursor: u64, count: usize, is_free: impl Fn(u32) -> bool) -> (Option<u32>, u64) {
    let mut cursor = cursor as usize;
    for _ in 0..TRIES.min(count) {
        let candidate = cursor % count;
        cursor = candidate + 1;
        if is_free(candidate as u32) {
            return (Some(candidate as u32), cursor as u64);
        }
    }
    (None, cursor as u64)
}

/// The number of the chunk that a directory names at a place.
fn chunk_in(words: &[u64; ROW_WORDS], place: usize) -> Option<u32> {
    ((words[DIRECTORY + place / 4] >> (16 * (place % 4)) & 0xFFFF) as u32).checked_sub(1)
}

/// The place of a slot in the directory, and its index in the chunk there.
fn place_of(slot: u16) -> (usize, usize) {
    (usize::from(slot) / CHUNK_SLOTS % PLACES, usize::from(slot) % CHUNK_SLOTS)
}

fn holder_at(words: &Chunk, place: usize, index: usize) -> Holder {
    let stamp = (words[HEAD_WORDS + index / 2] >> (32 * (index % 2))) as u32;
    Holder::new((place * CHUNK_SLOTS + index) as u16, stamp)
}

fn owner_word(row: u32, place: usize) -> u64 {
    (u64::from(row) + 1) << 8 | place as u64
}

fn owner_of(word: u64) -> Option<(u32, usize)> {
    let row = u32::try_from((word >> 8).checked_sub(1)?).ok()?;
    Some((row, (word & 0xFF) as usize % PLACES))
}

/// The numbers of the bits that are 1.
fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = bits.trailing_zeros() as usize;
        bits &= bits.wrapping_sub(1);
        (bit < 64).then_some(bit)
    })
}

/// What stands for a slot in the marks of a row: its number, scattered over 64 bits.
fn mark(slot: u16) -> u64 {
    let scattered = (u64::from(slot) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (scattered ^ scattered >> 32).wrapping_mul(0xD1B5_4A32_D192_ED03)
}
