//! One block of memory that holds every number a decision reads.
//!
//! **Owner and mutability.** The region owns the block; [`Region::lock`] lends it out, to one at a time. Everything in it has its
//! place from the [`Layout`], a function of sizes alone: offsets, no pointers, so that the block can be a mapping that several
//! processes share. It is anonymous memory of one process for now, and the lock a plain mutex; both change in this file only.
//!
//! ```text
//! header     8 words: magic, layout hash, words in all, processes, state of the generator
//! models     names as hashes, availability bitsets               (model.rs)
//! targets    columns [slot], and per process [process][slot]     (target.rs)
//! index      prefix index                                        (prefix_index.rs)
//! ```

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::model::{self, Models};
use crate::prefix_index::{self, PrefixIndex};
use crate::random::Random;
use crate::target::{self, Targets};

/// Slots of targets. As many as a holder in the prefix index can name.
pub const MAX_TARGETS: usize = prefix_index::MAX_TARGETS;

const MAGIC: u64 = u64::from_le_bytes(*b"warmrout");
/// Changes with every change of what stands where that sizes do not show.
const LAYOUT_VERSION: u64 = 1;

/// A cache line. Sections begin on one: the index counts on it.
const LINE_WORDS: usize = 8;

const HEADER_WORDS: usize = 8;
const MAGIC_WORD: usize = 0;
const LAYOUT_WORD: usize = 1;
const SIZE_WORD: usize = 2;
const PROCESSES_WORD: usize = 3;
const RANDOM_WORD: usize = 4;

/// Where things are.
#[derive(Clone, Debug)]
pub struct Layout {
    processes: usize,
    models: Range<usize>,
    targets: Range<usize>,
    index: Range<usize>,
    index_layout: prefix_index::Layout,
}

impl Layout {
    /// For `processes` processes that route, and an index of about `index_memory_bytes`.
    pub fn new(processes: usize, index_memory_bytes: usize) -> Self {
        let index_layout = prefix_index::Layout::new(index_memory_bytes, MAX_TARGETS);
        let section = |start: usize, words: usize| start..start + words;
        let models = section(HEADER_WORDS, model::WORDS);
        let targets = section(models.end.next_multiple_of(LINE_WORDS), target::words(processes));
        let index = section(targets.end.next_multiple_of(LINE_WORDS), index_layout.words());
        Self { processes, models, targets, index, index_layout }
    }

    /// Of the whole block.
    pub fn words(&self) -> usize {
        self.index.end
    }

    /// Differs between layouts that would read each other's memory wrongly.
    pub fn hash(&self) -> u64 {
        let parts = [LAYOUT_VERSION, self.processes as u64, self.models.end as u64, self.targets.end as u64];
        let parts = parts.into_iter().chain([self.index.end as u64, self.index_layout.entries() as u64]);
        parts.fold(MAGIC, |hash, part| (hash ^ part).wrapping_mul(0x0000_0100_0000_01B3).rotate_left(23))
    }
}

/// The block, and the right to lend it.
pub struct Region {
    layout: Layout,
    /// Which column of the per-process columns is written here.
    process: usize,
    memory: Mutex<Memory>,
}

struct Memory {
    words: Vec<u64>,
    /// Words skipped at the start so that the block begins on a cache line.
    start: usize,
}

impl Region {
    /// Anonymous memory: empty, for one process, with the generator at `seed`.
    pub fn anonymous(index_memory_bytes: usize, seed: u64) -> Self {
        let layout = Layout::new(1, index_memory_bytes);
        // Zeroed by the kernel, page by page as it is touched.
        let mut words = vec![0; layout.words() + LINE_WORDS - 1];
        let start = words.as_ptr().align_offset(LINE_WORDS * size_of::<u64>()).min(LINE_WORDS - 1);
        let header = &mut words[start..start + HEADER_WORDS];
        header[MAGIC_WORD] = MAGIC;
        header[LAYOUT_WORD] = layout.hash();
        header[SIZE_WORD] = layout.words() as u64;
        header[PROCESSES_WORD] = layout.processes as u64;
        header[RANDOM_WORD] = seed;
        Self { layout, process: 0, memory: Mutex::new(Memory { words, start }) }
    }

    /// The memory, until the guard is dropped.
    ///
    /// # Errors
    /// [`Error::RegionBusy`] when it was not had in time.
    pub fn lock(&self) -> Result<Guard<'_>, Error> {
        // A holder that died left nothing to repair: loads are sums of columns, index entries are hints.
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Guard { region: self, memory })
    }
}

/// The lock, held.
pub struct Guard<'r> {
    region: &'r Region,
    memory: MutexGuard<'r, Memory>,
}

impl Guard<'_> {
    /// Views of everything in the region.
    pub fn state(&mut self) -> State<'_> {
        let layout = &self.region.layout;
        let start = self.memory.start;
        let block = &mut self.memory.words[start..start + layout.words()];
        let (header, rest) = block.split_at_mut(layout.models.start);
        let (models, rest) = rest.split_at_mut(layout.targets.start - layout.models.start);
        let (targets, index) = rest.split_at_mut(layout.index.start - layout.targets.start);
        State {
            random: Random(&mut header[RANDOM_WORD]),
            models: Models::new(models),
            targets: Targets::new(targets, layout.processes, self.region.process),
            index: layout.index_layout.attach(index),
        }
    }

    /// # Errors
    /// Names what of the header is wrong.
    pub fn check_header(&self) -> Result<(), String> {
        let layout = &self.region.layout;
        let header = &self.memory.words[self.memory.start..];
        let expected = [MAGIC, layout.hash(), layout.words() as u64, layout.processes as u64];
        for (word, (found, expected)) in header.iter().zip(expected).enumerate() {
            if *found != expected {
                return Err(format!("header word {word} is {found:#x}, not {expected:#x}"));
            }
        }
        Ok(())
    }
}

/// Everything in the region, as views that hold no state of their own.
pub struct State<'m> {
    /// Behind every random choice.
    pub random: Random<'m>,
    /// Which models there are, and who can serve them now.
    pub models: Models<'m>,
    /// What is known of each target.
    pub targets: Targets<'m>,
    /// What each target probably holds in its cache.
    pub index: PrefixIndex<'m>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_that_differ_have_other_hashes() {
        let layouts = [Layout::new(1, 1 << 20), Layout::new(2, 1 << 20), Layout::new(1, 1 << 21)];
        for (first, second) in [(0, 1), (0, 2), (1, 2)] {
            assert_ne!(layouts[first].hash(), layouts[second].hash());
        }
        assert_eq!(layouts[0].hash(), Layout::new(1, 1 << 20).hash());
    }

    #[test]
    fn sections_begin_on_cache_lines_and_what_is_written_stays() {
        let region = Region::anonymous(1 << 20, 5);
        let first = region.lock().unwrap().state().random.draw();
        let mut guard = region.lock().unwrap();
        assert_ne!(guard.state().random.draw(), first);
        guard.check_header().unwrap();
        assert!(guard.memory.words[guard.memory.start..].as_ptr().addr().is_multiple_of(64));
        for section in [&region.layout.models, &region.layout.targets, &region.layout.index] {
            assert!(section.start.is_multiple_of(LINE_WORDS));
        }
    }
}
