//! Dense rows: the holders of a block that more targets hold than a row has places, with a place for every target.
//!
//! A dense row is a directory of chunks, each with the places of 32 slots; a chunk is there when a target of its slots holds the
//! block. So 1,024 holders take 4.6 KB, and 20 take 0.4 KB where they stand side by side, 3 KB where each has a chunk of its own.
//!
//! As in `rows`, a dense row carries the position of its entry and is valid only if the entry points back; a chunk carries the
//! dense row and the place in its directory, and is valid only if the row is and points back. What is not valid is free.

use super::clock::Clocks;
use super::matches::{GROUP, Match, Matches, ones};
use super::table::Holder;

/// A row: the position of its entry, marks, the directory.
pub(super) const ROW_WORDS: usize = DIRECTORY + PLACES / NAMES;
/// A chunk: a head (row 25 | place 7 | a bit for each slot that has a stamp), then the stamps.
pub(super) const CHUNK_WORDS: usize = 1 + CHUNK_SLOTS / 2;
/// Directories name chunks in 16 bits; 0 is none.
pub(super) const MAX_CHUNKS: usize = (1 << 16) - 1;

const CHUNK_SLOTS: usize = GROUP;
/// Places in a directory: enough for every slot.
const PLACES: usize = super::MAX_TARGETS / CHUNK_SLOTS;
const PLACE_BITS: u32 = 7;
/// Names in a word of a directory.
const NAMES: usize = 4;
const DIRECTORY: usize = 2;
/// The marks of the holders of a row, xored: equal marks, equal holders (but for one case in 2^64, where a lookup misses a holder).
const MARKS: usize = 1;

/// Rows or chunks looked at to find a free one.
const TRIES: usize = 8;
/// Searches left out after one in vain: where all is taken, blocks should not pay for finding that out one by one.
const PAUSE: u64 = 64;

type Row = [u64; ROW_WORDS];
type Chunk = [u64; CHUNK_WORDS];

pub(super) struct Dense<'m> {
    /// Where the searches for free rows and for free chunks go on, and how many are left out.
    pub(super) cursors: &'m mut [u64],
    pub(super) rows: &'m mut [u64],
    pub(super) chunks: &'m mut [u64],
}

impl Dense<'_> {
    /// A free dense row for the entry at `position`, without holders; `points_back(position, row)` says whether an entry uses a row.
    pub(super) fn claim(&mut self, position: u32, points_back: impl Fn(u32, u32) -> bool) -> Option<u32> {
        let row = self.search(0, self.rows.len() / ROW_WORDS, |dense, row| !dense.is_used(row, &points_back));
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
        let stamps = &mut words[1 + index / 2];
        let shift = 32 * (index % 2);
        *stamps = *stamps & !(0xFFFF_FFFF << shift) | u64::from(holder.stamp()) << shift;
        let is_new = words[0] >> index & 1 == 0;
        words[0] |= 1 << index;
        if is_new {
            self.flip_mark(row, holder.slot());
        }
        true
    }

    /// The holder in the place of `slot`.
    pub(super) fn get(&self, row: u32, slot: u16) -> Option<Holder> {
        let (place, index) = place_of(slot);
        let words = self.chunk(self.chunk_at(row, place)?)?;
        (words[0] >> index & 1 == 1).then(|| holder_at(words, place, index))
    }

    /// Empty the place of `holder`, if it is the one that stands there.
    pub(super) fn remove(&mut self, row: u32, holder: Holder) {
        if self.get(row, holder.slot()) != Some(holder) {
            return;
        }
        let (place, index) = place_of(holder.slot());
        if let Some(words) = self.chunk_at(row, place).and_then(|chunk| self.chunk_mut(chunk)) {
            words[0] &= !(1 << index);
            self.flip_mark(row, holder.slot());
        }
    }

    pub(super) fn holders(&self, row: u32) -> impl Iterator<Item = Holder> + '_ {
        let chunks = (0..PLACES).filter_map(move |place| Some((place, self.chunk(self.chunk_at(row, place)?)?)));
        chunks.flat_map(|(place, words)| ones(bits_of(words)).map(move |index| holder_at(words, place, index)))
    }

    /// The resident holders hold `found`, but for those that are settled.
    #[inline]
    pub(super) fn settle(&self, row: u32, found: Match, clocks: &Clocks<'_>, matches: &mut Matches) {
        let Some(directory) = self.row(row) else { return };
        // Most often those who hold a block hold the one before it too, and nobody else does.
        if directory[MARKS] == matches.settled_marks {
            return;
        }
        let mut open = 0;
        // Plain loops: they are the hot ones for what hundreds hold.
        for (group, &names) in directory[DIRECTORY..].iter().enumerate() {
            let mut names = names;
            let mut place = group * NAMES;
            while names != 0 {
                let chunk = (names & 0xFFFF) as u32;
                if let Some(words) = chunk.checked_sub(1).and_then(|chunk| self.chunk(chunk))
                    && owner_word(words) == owner_of(row, place)
                {
                    let unsettled = bits_of(words) & !matches.settled(place);
                    if unsettled != 0 {
                        let resident = clocks.resident(place, unsettled, stamps_of(words));
                        if resident != 0 {
                            matches.settle(place, resident, found);
                        }
                        open |= unsettled & !resident;
                    }
                }
                names >>= 16;
                place += 1;
            }
        }
        if open == 0 {
            matches.settled_marks = directory[MARKS];
        }
    }

    /// Keep the holders for which `keep` says so; how many are left.
    pub(super) fn retain(&mut self, row: u32, keep: impl Fn(Holder) -> bool) -> usize {
        let (mut left, mut marks) = (0, 0);
        for place in 0..PLACES {
            let Some(words) = self.chunk_at(row, place).and_then(|chunk| self.chunk_mut(chunk)) else { continue };
            for index in ones(bits_of(words)) {
                let holder = holder_at(words, place, index);
                if keep(holder) {
                    left += 1;
                    marks ^= mark(holder.slot());
                } else {
                    words[0] &= !(1 << index);
                }
            }
            if bits_of(words) == 0 {
                self.set_chunk(row, place, 0);
            }
        }
        if let Some(words) = self.row_mut(row) {
            words[MARKS] = marks;
        }
        left
    }

    pub(super) fn check_row(&self, row: u32) -> Result<(), String> {
        let Some(directory) = self.row(row) else { return Err(format!("there is no dense row {row}")) };
        match chunks_in(directory).find(|&(place, chunk)| self.chunk_at(row, place) != Some(chunk)) {
            Some((place, _)) => Err(format!("chunk {place} of dense row {row} does not point back")),
            None => Ok(()),
        }
    }

    fn claim_chunk(&mut self, row: u32, place: usize, points_back: impl Fn(u32, u32) -> bool) -> Option<u32> {
        let chunk = self.search(1, self.chunks.len() / CHUNK_WORDS, |dense, chunk| {
            let (row, place) = dense.chunk(chunk).map_or((0, 0), claimed_by);
            dense.chunk_at(row, place) != Some(chunk) || !dense.is_used(row, &points_back)
        })?;
        self.chunk_mut(chunk)?[0] = owner_of(row, place) << 32;
        self.set_chunk(row, place, chunk + 1);
        Some(chunk)
    }

    /// The first free one of the next [`TRIES`] of `count`.
    fn search(&mut self, cursor: usize, count: usize, is_free: impl Fn(&Self, u32) -> bool) -> Option<u32> {
        let pause = self.cursors[2].min(PAUSE);
        if pause > 0 {
            self.cursors[2] = pause - 1;
            return None;
        }
        for _ in 0..TRIES.min(count) {
            let candidate = self.cursors[cursor] % count as u64;
            self.cursors[cursor] = candidate + 1;
            if is_free(self, candidate as u32) {
                return Some(candidate as u32);
            }
        }
        self.cursors[2] = PAUSE;
        None
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
        (owner_word(self.chunk(chunk)?) == owner_of(row, place)).then_some(chunk)
    }

    fn set_chunk(&mut self, row: u32, place: usize, name: u32) {
        if let Some(words) = self.row_mut(row) {
            let word = &mut words[DIRECTORY + place / NAMES];
            let shift = 16 * (place % NAMES);
            *word = *word & !(0xFFFF << shift) | u64::from(name) << shift;
        }
    }

    fn flip_mark(&mut self, row: u32, slot: u16) {
        if let Some(words) = self.row_mut(row) {
            words[MARKS] ^= mark(slot);
        }
    }

    fn row(&self, row: u32) -> Option<&Row> {
        self.rows.get(row as usize * ROW_WORDS..)?.first_chunk()
    }

    fn row_mut(&mut self, row: u32) -> Option<&mut Row> {
        self.rows.get_mut(row as usize * ROW_WORDS..)?.first_chunk_mut()
    }

    fn chunk(&self, chunk: u32) -> Option<&Chunk> {
        self.chunks.get(chunk as usize * CHUNK_WORDS..)?.first_chunk()
    }

    fn chunk_mut(&mut self, chunk: u32) -> Option<&mut Chunk> {
        self.chunks.get_mut(chunk as usize * CHUNK_WORDS..)?.first_chunk_mut()
    }
}

/// The number of the chunk that a directory names at a place.
fn chunk_in(words: &Row, place: usize) -> Option<u32> {
    ((words[DIRECTORY + place / NAMES] >> (16 * (place % NAMES)) & 0xFFFF) as u32).checked_sub(1)
}

/// The places of a directory that name a chunk, and its number.
fn chunks_in(words: &Row) -> impl Iterator<Item = (usize, u32)> + '_ {
    let is_used = |&group: &usize| words[DIRECTORY + group] != 0;
    let places = (0..PLACES / NAMES).filter(is_used).flat_map(|group| NAMES * group..NAMES * (group + 1));
    places.filter_map(|place| Some((place, chunk_in(words, place)?)))
}

/// The place of a slot in the directory, and its index in the chunk there.
fn place_of(slot: u16) -> (usize, usize) {
    (usize::from(slot) / CHUNK_SLOTS % PLACES, usize::from(slot) % CHUNK_SLOTS)
}

fn holder_at(words: &Chunk, place: usize, index: usize) -> Holder {
    let stamp = (words[1 + index / 2] >> (32 * (index % 2))) as u32;
    Holder::new((place * CHUNK_SLOTS + index) as u16, stamp)
}

fn bits_of(words: &Chunk) -> u32 {
    words[0] as u32
}

fn stamps_of(words: &Chunk) -> &[u64; CHUNK_SLOTS / 2] {
    words.last_chunk().unwrap_or(&[0; CHUNK_SLOTS / 2])
}

fn owner_word(words: &Chunk) -> u64 {
    words[0] >> 32
}

/// What a chunk says that belongs at a place of the directory of a row.
fn owner_of(row: u32, place: usize) -> u64 {
    (u64::from(row) + 1) << PLACE_BITS | place as u64
}

/// The row and the place in its directory where a chunk says that it belongs; never claimed, any.
fn claimed_by(words: &Chunk) -> (u32, usize) {
    let owner = owner_word(words);
    ((owner >> PLACE_BITS).saturating_sub(1) as u32, owner as usize % PLACES)
}

/// What stands for a slot in the marks of a row: its number, scattered over 64 bits.
fn mark(slot: u16) -> u64 {
    let scattered = (u64::from(slot) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (scattered ^ scattered >> 32).wrapping_mul(0xD1B5_4A32_D192_ED03)
}
