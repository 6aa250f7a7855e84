//! The registry: what the control process knows of the workers and the region's columns do not say (names, addresses), as one
//! text. One process writes it, the others read it anew when its version has changed.
//!
//! ```text
//! header    8 words: version, bytes of the text in each of two buffers
//! buffers   2 x CAPACITY bytes; the text of version v stands in buffer v mod 2
//! ```
//! Whoever dies while writing leaves the text of before: the version comes last.

use std::sync::atomic::{Ordering, compiler_fence};

/// Bytes that a text may have: some 400 for each of 4,096 targets. Pages that nobody uses cost nothing.
pub const CAPACITY: usize = 2 << 20;

const HEADER_WORDS: usize = 8;
const VERSION: usize = 0;
const LENGTHS: usize = 1;
const BUFFER_WORDS: usize = CAPACITY / size_of::<u64>();

pub(super) const WORDS: usize = HEADER_WORDS + 2 * BUFFER_WORDS;

/// A view of the registry's words.
pub struct RegistryText<'m> {
    words: &'m mut [u64],
}

impl<'m> RegistryText<'m> {
    pub(super) fn new(words: &'m mut [u64]) -> Self {
        Self { words }
    }

    /// Rises with every text; 0: there was none yet.
    pub fn version(&self) -> u64 {
        self.words[VERSION]
    }

    /// The text of this version.
    pub fn read(&self) -> Vec<u8> {
        let buffer = self.version() as usize % 2;
        let length = (self.words[LENGTHS + buffer] as usize).min(CAPACITY);
        let start = HEADER_WORDS + buffer * BUFFER_WORDS;
        let words = &self.words[start..start + length.div_ceil(size_of::<u64>())];
        let mut text: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        text.truncate(length);
        text
    }

    /// Put another text. False, and nothing is changed, when it is longer than [`CAPACITY`].
    pub(crate) fn write(&mut self, text: &[u8]) -> bool {
        if text.len() > CAPACITY {
            return false;
        }
        let version = self.version() + 1;
        let buffer = version as usize % 2;
        let start = HEADER_WORDS + buffer * BUFFER_WORDS;
        for (word, bytes) in self.words[start..].iter_mut().zip(text.chunks(size_of::<u64>())) {
            let mut padded = [0; size_of::<u64>()];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(padded);
        }
        self.words[LENGTHS + buffer] = text.len() as u64;
        compiler_fence(Ordering::SeqCst);
        self.words[VERSION] = version;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_text_is_read() {
        let mut words = vec![0; WORDS];
        let mut registry = RegistryText::new(&mut words);
        assert_eq!((registry.version(), registry.read()), (0, vec![]));
        for (version, text) in [(1, vec![7; 13]), (2, vec![]), (3, vec![9; CAPACITY]), (4, vec![1; 8])] {
            assert!(registry.write(&text));
            assert_eq!((registry.version(), registry.read()), (version, text));
        }
        assert!(!registry.write(&vec![0; CAPACITY + 1]));
        assert_eq!((registry.version(), registry.read()), (4, vec![1; 8]));
    }
}
