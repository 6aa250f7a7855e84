//! One block of memory that holds every number a decision reads.
//!
//! **Owner and mutability.** The region owns the block; [`Region::lock`] lends it out, to one thread of one process at a time.
//! Everything in it has its place from the [`Layout`], a function of sizes alone: offsets, no pointers, so that several processes
//! can map it. A process that dies leaves nothing to repair: loads are sums of columns, one per process, that
//! [`Region::clear_process`] zeroes; index entries are hints that are checked at use.
//!
//! ```text
//! header     8 words: magic, layout hash, words in all, processes, state of the generator, hash seed, process that has the lock,
//!            boot id
//! lock       a cache line                                        (region/robust_lock.rs)
//! models     names as hashes, availability bitsets               (model.rs)
//! targets    loads, records [slot], and [process][slot]          (target.rs)
//! admission  what runs and waits, [process]                     (admission.rs)
//! keys       whom routing keys were given to                      (sticky_keys.rs)
//! registry   what the control process knows of the workers           (region/registry.rs)
//! index      prefix index                                        (prefix_index.rs)
//! ```
#![allow(unsafe_code, reason = "slices of memory that other processes map too")]

mod file;
mod registry;
mod robust_lock;

pub use file::Found;
pub use registry::RegistryText;

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;
use std::slice;
use std::time::Duration;

use crate::admission::{self, Admission};
use crate::error::Error;
use crate::mapping::Mapping;
use crate::model::{self, Models};
use crate::prefix_index::{self, PrefixIndex};
use crate::random::Random;
use crate::sticky_keys::{self, StickyKeys};
use crate::target::{self, Targets};
use robust_lock::{Locked, RobustLock};

/// Slots of targets. As many as a holder in the prefix index can name.
pub const MAX_TARGETS: usize = prefix_index::MAX_TARGETS;

const MAGIC: u64 = u64::from_le_bytes(*b"warmrout");
/// Changes with every change of what stands where that sizes do not show.
const LAYOUT_VERSION: u64 = 6;

/// A cache line. Sections begin on one: the index counts on it.
const LINE_WORDS: usize = 8;

const HEADER_WORDS: usize = 8;
const MAGIC_WORD: usize = 0;
const LAYOUT_WORD: usize = 1;
const SIZE_WORD: usize = 2;
const PROCESSES_WORD: usize = 3;
const RANDOM_WORD: usize = 4;
const HASH_SEED_WORD: usize = 5;
/// Which process has the lock, counted from 1; for whoever looks at a region that hangs.
const HOLDER_WORD: usize = 6;
/// Of regions in files: which start of the machine its times are of.
const BOOT_WORD: usize = 7;

/// Decisions take microseconds: a lock that is not had by then is somebody's who hangs.
const LOCK_TIMEOUT: Duration = Duration::from_millis(100);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Layout {
    processes: usize,
    models: Range<usize>,
    targets: Range<usize>,
    admission: Range<usize>,
    sticky_keys: Range<usize>,
    registry: Range<usize>,
    index: Range<usize>,
    index_layout: prefix_index::Layout,
}

impl Layout {
    /// For `processes` processes that route, and an index of about `index_memory_bytes`.
    pub fn new(processes: usize, index_memory_bytes: usize) -> Self {
        let index_layout = prefix_index::Layout::new(index_memory_bytes, MAX_TARGETS);
        let section = |start: usize, words: usize| start..start + words;
        let models = section(HEADER_WORDS + robust_lock::WORDS, model::WORDS);
        let targets = section(models.end.next_multiple_of(LINE_WORDS), target::words(processes));
        let admission = section(targets.end.next_multiple_of(LINE_WORDS), admission::words(processes));
        let sticky_keys = section(admission.end.next_multiple_of(LINE_WORDS), sticky_keys::WORDS);
        let registry = section(sticky_keys.end.next_multiple_of(LINE_WORDS), registry::WORDS);
        let index = section(registry.end.next_multiple_of(LINE_WORDS), index_layout.words());
        Self { processes, models, targets, admission, sticky_keys, registry, index, index_layout }
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
    lock: RobustLock,
    memory: Mapping,
}

// SAFETY: the memory is read and written only through a guard, which has the lock.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Memory of this process alone: empty, with the generator at `seed`.
    ///
    /// # Panics
    /// When the system has no memory left, as any allocation.
    pub fn anonymous(index_memory_bytes: usize, seed: u64, hash_seed: u64) -> Self {
        let layout = Layout::new(1, index_memory_bytes);
        let made = Mapping::private(layout.words()).and_then(|memory| Self::format(layout, memory, seed, hash_seed));
        #[allow(clippy::expect_used, reason = "as an allocation that fails")]
        made.expect("memory for the region")
    }

    /// Memory that `processes` processes share: empty, with the generator at `seed`. This one is process 0, the others
    /// [`Region::attach`] the file, whose descriptor children inherit.
    ///
    /// # Errors
    /// What the system says.
    #[cfg(target_os = "linux")]
    pub fn shared(processes: usize, index_memory_bytes: usize, seed: u64, hash_seed: u64) -> io::Result<(Self, File)> {
        let layout = Layout::new(processes.max(1), index_memory_bytes);
        let file = Mapping::memory_file("warmroute-region", layout.words())?;
        let memory = Mapping::shared(&file, layout.words())?;
        Ok((Self::format(layout, memory, seed, hash_seed)?, file))
    }

    /// The region that another process has made in `file`, as its process `process`.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::InvalidData`] with what differs when it is not such a region.
    pub fn attach(file: &File, processes: usize, index_memory_bytes: usize, process: usize) -> io::Result<Self> {
        let invalid = |message: String| io::Error::new(io::ErrorKind::InvalidData, message);
        if process >= processes {
            return Err(invalid(format!("process {process} of a region for {processes}")));
        }
        let layout = Layout::new(processes, index_memory_bytes);
        let memory = Mapping::shared(file, layout.words())?;
        let words = word_at(&memory, HEADER_WORDS);
        // SAFETY: the lock's words are used by nothing else, and whoever made the file made the lock.
        let lock = unsafe { RobustLock::attach(words) };
        let region = Self { layout, process, lock, memory };
        region.check_header().map_err(invalid)?;
        Ok(region)
    }

    fn format(layout: Layout, memory: Mapping, seed: u64, hash_seed: u64) -> io::Result<Self> {
        // SAFETY: nobody else has the memory yet, and the lock's words are used by nothing else.
        let lock = unsafe { RobustLock::create(word_at(&memory, HEADER_WORDS)) }?;
        let region = Self { layout, process: 0, lock, memory };
        // SAFETY: as above.
        let header = unsafe { region.words(0..HEADER_WORDS) };
        header[LAYOUT_WORD] = region.layout.hash();
        header[SIZE_WORD] = region.layout.words() as u64;
        header[PROCESSES_WORD] = region.layout.processes as u64;
        header[RANDOM_WORD] = seed;
        header[HASH_SEED_WORD] = hash_seed;
        header[MAGIC_WORD] = MAGIC;
        Ok(region)
    }

    /// Of the keys of prompts, as whoever made the region chose it.
    pub fn hash_seed(&self) -> u64 {
        // SAFETY: this word is written before anybody else has the region, and never after.
        unsafe { word_at(&self.memory, HASH_SEED_WORD).read() }
    }

    /// The memory, until the guard is dropped.
    ///
    /// # Errors
    /// [`Error::RegionBusy`] when it was not had in time.
    pub fn lock(&self) -> Result<Guard<'_>, Error> {
        let locked = self.lock.lock(LOCK_TIMEOUT);
        let (locked, waited_ns) = locked;
        if locked == Locked::Busy {
            return Err(Error::RegionBusy);
        }
        let from_the_dead = locked == Locked::FromTheDead;
        let mut guard = Guard { region: self, from_the_dead, waited_ns, thread: PhantomData };
        guard.header()[HOLDER_WORD] = self.process as u64 + 1;
        if guard.from_the_dead {
            // It may have died between a column and its total.
            let mut state = guard.state();
            state.targets.recount();
            state.sticky_keys.recount(&mut state.targets);
        }
        Ok(guard)
    }

    /// Process `process` is dead, and whatever it had in flight with it.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn clear_process(&self, process: usize) -> Result<(), Error> {
        let mut guard = self.lock()?;
        let mut state = guard.state();
        state.targets.clear_process(process);
        state.admission.clear_process(process);
        state.targets.recount();
        Ok(())
    }

    /// # Errors
    /// Names what of the header is wrong.
    pub fn check_header(&self) -> Result<(), String> {
        let layout = &self.layout;
        let expected = [MAGIC, layout.hash(), layout.words() as u64, layout.processes as u64];
        for (word, expected) in expected.into_iter().enumerate() {
            // SAFETY: these words are written before anybody else has the region, and never after.
            let found = unsafe { word_at(&self.memory, word).read() };
            if found != expected {
                return Err(format!("header word {word} is {found:#x}, not {expected:#x}"));
            }
        }
        Ok(())
    }

    /// # Safety
    /// The caller has the lock, or is the only one who has the region; the range is not the lock's.
    #[allow(clippy::mut_from_ref, reason = "the lock makes it exclusive")]
    unsafe fn words(&self, range: Range<usize>) -> &mut [u64] {
        debug_assert!(range.end <= self.layout.words());
        // SAFETY: within the mapping, and exclusive by the caller's promise.
        unsafe { slice::from_raw_parts_mut(self.memory.start().add(range.start), range.len()) }
    }
}

fn word_at(memory: &Mapping, word: usize) -> NonNull<u64> {
    let start = NonNull::new(memory.start()).unwrap_or(NonNull::dangling());
    // SAFETY: callers name words of the header and the lock, which every mapping has.
    unsafe { start.add(word) }
}

/// The lock, held.
pub struct Guard<'r> {
    region: &'r Region,
    from_the_dead: bool,
    waited_ns: u64,
    /// Whoever locks unlocks.
    thread: PhantomData<*const ()>,
}

impl Guard<'_> {
    /// Whether the last holder died with the lock: what is derived from other words must be derived again.
    pub fn from_the_dead(&self) -> bool {
        self.from_the_dead
    }

    /// How long somebody else had the lock first.
    pub fn waited_ns(&self) -> u64 {
        self.waited_ns
    }

    /// Views of everything in the region.
    pub fn state(&mut self) -> State<'_> {
        let layout = &self.region.layout;
        let process = self.region.process;
        // SAFETY: the guard has the lock, and the sections do not overlap.
        let (header, models, targets, admission, keys, registry, index) = unsafe {
            let words = |range: &Range<usize>| self.region.words(range.clone());
            let (models, targets) = (words(&layout.models), words(&layout.targets));
            let (header, admission) = (self.region.words(0..HEADER_WORDS), words(&layout.admission));
            let (keys, registry) = (words(&layout.sticky_keys), words(&layout.registry));
            (header, models, targets, admission, keys, registry, words(&layout.index))
        };
        State {
            random: Random(&mut header[RANDOM_WORD]),
            models: Models::new(models),
            targets: Targets::new(targets, layout.processes, process),
            admission: Admission::new(admission, process),
            sticky_keys: StickyKeys::new(keys),
            registry: RegistryText::new(registry),
            index: layout.index_layout.attach(index),
        }
    }

    fn header(&mut self) -> &mut [u64] {
        // SAFETY: the guard has the lock.
        unsafe { self.region.words(0..HEADER_WORDS) }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.header()[HOLDER_WORD] = 0;
        self.region.lock.unlock();
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
    /// What runs and waits, of what is limited.
    pub admission: Admission<'m>,
    /// Whom routing keys were given to.
    pub sticky_keys: StickyKeys<'m>,
    /// What the control process knows of the workers.
    pub registry: RegistryText<'m>,
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
        let region = Region::anonymous(1 << 20, 5, 0);
        let first = region.lock().unwrap().state().random.draw();
        let mut guard = region.lock().unwrap();
        assert_ne!(guard.state().random.draw(), first);
        drop(guard);
        region.check_header().unwrap();
        assert!(region.memory.start().addr().is_multiple_of(64));
        for section in [
            &region.layout.models,
            &region.layout.targets,
            &region.layout.sticky_keys,
            &region.layout.registry,
            &region.layout.index,
        ] {
            assert!(section.start.is_multiple_of(LINE_WORDS));
        }
    }
}
