//! The memory itself: zeroed words, of one process or shared through a file.
#![allow(unsafe_code, reason = "a view of memory that other processes map too")]

use std::fs::File;
use std::io;

use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

const WORD_BYTES: usize = size_of::<u64>();

/// Words that begin on a page. Pages come from the kernel as they are touched.
pub(crate) struct Mapping(MmapRaw);

impl Mapping {
    /// Of this process alone.
    pub(crate) fn private(words: usize) -> io::Result<Self> {
        Ok(Self(MmapOptions::new().len(words * WORD_BYTES).map_anon()?.into()))
    }

    /// Of whoever maps the same file, which must have the size of `words`.
    pub(crate) fn shared(file: &File, words: usize) -> io::Result<Self> {
        let bytes = (words * WORD_BYTES) as u64;
        let found = file.metadata()?.len();
        if found != bytes {
            let message = format!("the region has {found} bytes, not {bytes}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(Self(MmapOptions::new().len(words * WORD_BYTES).map_raw(file)?))
    }

    /// A file without a name for [`Mapping::shared`]; gone when nobody has it open or mapped any more.
    #[cfg(target_os = "linux")]
    pub(crate) fn memory_file(name: &str, words: usize) -> io::Result<File> {
        // Inherited by children on purpose: the descriptor is how they get the memory.
        let file = File::from(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::empty())?);
        file.set_len((words * WORD_BYTES) as u64)?;
        Ok(file)
    }

    pub(crate) fn start(&self) -> *mut u64 {
        self.0.as_mut_ptr().cast()
    }
    /// The words, to be used without a lock.
    pub(crate) fn atomics(&self) -> &[AtomicU64] {
        // SAFETY: an `AtomicU64` is laid out as a `u64`, the memory lives as long as `self`, and whoever uses it this way uses it
        // in no other.
        unsafe { std::slice::from_raw_parts(self.0.as_mut_ptr().cast::<AtomicU64>(), self.0.len() / WORD_BYTES) }
    }
}
