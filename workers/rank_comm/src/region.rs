//! The memory that all ranks map: who stops everybody, what each says of itself, and the slots of the groups.
#![allow(unsafe_code, reason = "memory that other processes map too")]

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};

use crate::status::STATUS_WORDS;
use crate::{Group, GroupPlan, RankStatus};

const HEADER_BYTES: usize = 4096;
const TEXT_AT: usize = 64;
const TEXT_BYTES: usize = 2048;
const STATUS_BYTES: usize = STATUS_WORDS * 8;

const RUNNING: u32 = 0;
const WRITING: u32 = 1;
const ABORTED: u32 = 2;

/// One mapping of the memory; every process makes its own.
#[derive(Clone)]
pub struct Region {
    map: Arc<MmapRaw>,
    ranks: usize,
    plans: Arc<[GroupPlan]>,
}

impl Region {
    /// Bytes that `ranks` ranks with these groups need.
    #[must_use]
    pub fn bytes(ranks: usize, plans: &[GroupPlan]) -> usize {
        HEADER_BYTES + (ranks * STATUS_BYTES).next_multiple_of(4096) + plans.iter().map(GroupPlan::bytes).sum::<usize>()
    }

    /// A file of that size without a name, all zero; it is gone when nobody has it open or mapped any more.
    ///
    /// # Errors
    /// The system's.
    pub fn memory_file(ranks: usize, plans: &[GroupPlan]) -> io::Result<File> {
        // Inherited by children on purpose: the descriptor is how they get the memory.
        let file = File::from(rustix::fs::memfd_create("warmroute-ranks", rustix::fs::MemfdFlags::empty())?);
        file.set_len(Self::bytes(ranks, plans) as u64)?;
        Ok(file)
    }

    /// Maps `file`, which [`Region::memory_file`] made for the same ranks and groups.
    ///
    /// # Errors
    /// The system's, or that the file has another size.
    pub fn open(file: &File, ranks: usize, plans: &[GroupPlan]) -> io::Result<Self> {
        let bytes = Self::bytes(ranks, plans);
        let found = file.metadata()?.len();
        if found != bytes as u64 {
            let message = format!("the memory of the ranks has {found} bytes, not {bytes}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let map = MmapOptions::new().len(bytes).map_raw(file)?;
        Ok(Self { map: Arc::new(map), ranks, plans: plans.into() })
    }

    /// How many ranks there are.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// What `rank` says of itself.
    ///
    /// # Panics
    /// If there is no such rank.
    #[must_use]
    pub fn status(&self, rank: usize) -> RankStatus<'_> {
        assert!(rank < self.ranks, "rank {rank} of {}", self.ranks);
        // SAFETY: the blocks of all ranks lie in the mapping, aligned to pages, and are used as atomics only.
        RankStatus(unsafe {
            let start = self.map.as_mut_ptr().add(HEADER_BYTES + rank * STATUS_BYTES);
            std::slice::from_raw_parts(start.cast::<AtomicU64>(), STATUS_WORDS)
        })
    }

    /// Stops everybody: each collective, also those that wait already, ends with `text`. The first caller's words stay.
    pub fn abort(&self, text: &str) {
        if self.state().compare_exchange(RUNNING, WRITING, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let mut end = text.len().min(TEXT_BYTES - 8);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        // SAFETY: the text's place lies in the header; whoever changed the state to WRITING is its only writer, and nobody reads it
        // before ABORTED is seen.
        unsafe {
            let place = self.map.as_mut_ptr().add(TEXT_AT);
            place.cast::<u64>().write(end as u64);
            std::ptr::copy_nonoverlapping(text.as_ptr(), place.add(8), end);
        }
        self.state().store(ABORTED, Ordering::Release);
    }

    /// Why everybody stops, if they do.
    #[must_use]
    pub fn aborted(&self) -> Option<String> {
        match self.state().load(Ordering::Acquire) {
            RUNNING => None,
            WRITING => Some("another rank stopped".to_owned()),
            _ => {
                // SAFETY: written once, before the state became ABORTED.
                let text = unsafe {
                    let place = self.map.as_mut_ptr().add(TEXT_AT);
                    let length = place.cast::<u64>().read() as usize;
                    std::slice::from_raw_parts(place.add(8), length.min(TEXT_BYTES - 8))
                };
                Some(String::from_utf8_lossy(text).into_owned())
            }
        }
    }

    /// `rank`'s end of the group numbered `group`.
    ///
    /// Whoever waits in it is awake for `spin` and gives up after `deadline`; None waits for ever, which is for those who wait for work.
    ///
    /// # Panics
    /// If `rank` is no member: the groups of a rank follow from the layout, not from input.
    #[must_use]
    pub fn group(&self, group: usize, rank: usize, spin: Duration, deadline: Option<Duration>) -> Group {
        let before: usize = self.plans[..group].iter().map(GroupPlan::bytes).sum();
        let start = HEADER_BYTES + (self.ranks * STATUS_BYTES).next_multiple_of(4096) + before;
        Group::new(self.clone(), self.plans[group].clone(), start, rank, spin, deadline)
    }

    fn state(&self) -> &AtomicU32 {
        // SAFETY: the first word of the mapping.
        unsafe { &*self.map.as_mut_ptr().cast::<AtomicU32>() }
    }

    /// The bytes from `offset` on; what may be done with them is the group's business.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.map.len());
        // SAFETY: inside the mapping.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }
}
