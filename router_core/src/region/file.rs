//! A region in a file: what is in it outlives the router, so that a router that was restarted knows whose cache is warm.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::{BOOT_WORD, HASH_SEED_WORD, HEADER_WORDS, LAYOUT_WORD, Layout, MAGIC, MAGIC_WORD, Region, word_at};
use crate::mapping::Mapping;

/// What a region's file was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing in it: the region is new.
    New,
    /// A region that goes on.
    Kept,
    /// A region that cannot go on, and why: a new one has taken its place.
    Replaced(String),
}

impl Region {
    /// The region in the file at `path`, for one router at a time: the file is locked as long as the region lives. A file that is
    /// not there is made, for its owner alone. With `any_hash_seed`, `hash_seed` is only for a region that is made.
    ///
    /// Of a region that goes on, requests in flight are forgotten; what else must not outlive a router is its business.
    ///
    /// # Errors
    /// What the system says; [`io::ErrorKind::InvalidData`] when something else than a region is in the file, which is then left
    /// alone; [`io::ErrorKind::ResourceBusy`] when another router has it.
    pub fn in_file(
        path: &Path,
        processes: usize,
        index_memory_bytes: usize,
        seed: u64,
        hash_seed: u64,
        any_hash_seed: bool,
    ) -> io::Result<(Self, File, Found)> {
        let layout = Layout::new(processes.max(1), index_memory_bytes);
        let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).clone();
        let file = options.open(path)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            let message = "another router has it open";
            if error == rustix::io::Errno::WOULDBLOCK {
                io::Error::new(io::ErrorKind::ResourceBusy, message)
            } else {
                error.into()
            }
        })?;
        let boot = boot_id()?;
        let found = look(&file, &layout, boot, (!any_hash_seed).then_some(hash_seed))?;
        if found != Found::Kept {
            file.set_len(0)?;
            let bytes = layout.words() as u64 * size_of::<u64>() as u64;
            allocate(&file, bytes)?;
        }
        let memory = Mapping::shared(&file, layout.words())?;
        let hash_seed = match found {
            // SAFETY: the file is this router's alone.
            Found::Kept => unsafe { word_at(&memory, HASH_SEED_WORD).read() },
            _ => hash_seed,
        };
        // The lock is made anew in any case: whoever had it is dead.
        let region = Self::format(layout, memory, seed, hash_seed)?;
        let mut guard = region.lock().map_err(io::Error::other)?;
        guard.header()[BOOT_WORD] = boot;
        for process in 0..region.layout.processes {
            guard.state().targets.clear_process(process);
            guard.state().admission.clear_process(process);
        }
        guard.state().targets.recount();
        drop(guard);
        Ok((region, file, found))
    }
}

fn look(file: &File, layout: &Layout, boot: u64, hash_seed: Option<u64>) -> io::Result<Found> {
    let mut header = [0; HEADER_WORDS];
    let mut bytes = [0; HEADER_WORDS * size_of::<u64>()];
    let length = file.metadata()?.len();
    if length == 0 {
        return Ok(Found::New);
    }
    if length >= bytes.len() as u64 {
        std::os::unix::fs::FileExt::read_exact_at(file, &mut bytes, 0)?;
        for (word, bytes) in header.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
    }
    if header[MAGIC_WORD] != MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a region of a router, and is left alone"));
    }
    let words = length / size_of::<u64>() as u64;
    let reason = if header[LAYOUT_WORD] != layout.hash() || words != layout.words() as u64 {
        "it was made by another version, or for another --index-memory"
    } else if header[BOOT_WORD] != boot {
        "it was made before this machine was started"
    } else if hash_seed.is_some_and(|given| given != header[HASH_SEED_WORD]) {
        "it was made with another --hash-seed"
    } else {
        return Ok(Found::Kept);
    };
    Ok(Found::Replaced(reason.to_owned()))
}

/// Not a file with holes: to be short of room is an error now, and would be the death of the router later.
#[cfg(target_os = "linux")]
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes)?)
}

#[cfg(not(target_os = "linux"))]
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    file.set_len(bytes)
}

/// Stands for the time since the machine was started: times in a region mean nothing after it.
#[cfg(target_os = "linux")]
fn boot_id() -> io::Result<u64> {
    std::fs::read("/proc/sys/kernel/random/boot_id").map(|text| xxhash_rust::xxh3::xxh3_64(&text))
}

#[cfg(not(target_os = "linux"))]
fn boot_id() -> io::Result<u64> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "regions in files are for Linux only"))
}
