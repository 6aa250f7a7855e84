//! Memory for what is read from beginning to end in every step, in large pages where the system has them.
//!
//! Weights that come from memory are read a fifth faster so (95 MB by one core of an AMD EPYC in a virtual machine 2.5 ms instead of
//! 3.1, half of it by each of two at the same time 1.2 instead of 1.5): there is a walk through the page tables for every 2 MB, not for
//! every 4 KB. A page of 2 MB is more than many a matrix, so they share chunks.
#![allow(unsafe_code, reason = "several owners of parts of one mapping")]

use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapMut, MmapRaw};

use crate::simd::LINE;
use crate::weight::Weight;

/// Of what small matrices share. What is not used of it is never touched.
const CHUNK: usize = 32 << 20;

const LARGE_PAGE: usize = 2 << 20;

/// Where the next part goes: a chunk, and how much of it is taken.
static OPEN: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);

/// So many numbers, written once. A chunk is gone with the last of those in it.
pub struct Numbers<T> {
    chunk: Arc<MmapRaw>,
    start: usize,
    count: usize,
    of: PhantomData<T>,
}

impl<T: Weight> Numbers<T> {
    /// `fill` is given zeros.
    ///
    /// # Panics
    /// If there is no memory.
    pub(crate) fn new(count: usize, fill: impl FnOnce(&mut [T])) -> Self {
        let (chunk, start) = place(count * size_of::<T>());
        // SAFETY: `place` has given this part to nobody else, nothing refers to it yet, it lies inside the mapping, at a multiple of 64, and
        // is zero, which is a number of any kind.
        fill(unsafe { std::slice::from_raw_parts_mut(chunk.as_mut_ptr().add(start).cast(), count) });
        Self { chunk, start, count, of: PhantomData }
    }

    /// As they lie in memory.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: as below; every byte of a number is one.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), size_of_val::<[T]>(self)) }
    }
}

impl<T: Weight> Deref for Numbers<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: as above, and from now on nobody writes it.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.start).cast(), self.count) }
    }
}

/// A chunk with room for so many bytes, and where in it.
fn place(bytes: usize) -> (Arc<MmapRaw>, usize) {
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((chunk, taken)) = &mut *open
        && chunk.len() - *taken >= bytes
    {
        let start = *taken;
        *taken += bytes.next_multiple_of(LINE);
        *taken = (*taken).min(chunk.len());
        return (Arc::clone(chunk), start);
    }
    let map = MmapMut::map_anon(bytes.max(CHUNK) + LARGE_PAGE).expect("memory for weights");
    #[cfg(target_os = "linux")]
    // A wish: without large pages everything is the same but slower.
    let _ = map.advise(memmap2::Advice::HugePage);
    let chunk = Arc::new(MmapRaw::from(map));
    // To the next large page, so that nothing is in a small one.
    let start = chunk.as_ptr().addr().next_multiple_of(LARGE_PAGE) - chunk.as_ptr().addr();
    *open = Some((Arc::clone(&chunk), (start + bytes).next_multiple_of(LINE).min(chunk.len())));
    (chunk, start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_touch() {
        let sizes = [1, 15, 16, 17, 1000, CHUNK / 4, 100, CHUNK / 2, 3];
        let parts: Vec<Numbers<f32>> = sizes
            .iter()
            .enumerate()
            .map(|(index, &count)| {
                Numbers::new(count, |numbers| {
                    assert!(numbers.iter().all(|number| *number == 0.0));
                    numbers.fill(index as f32);
                })
            })
            .collect();
        for (index, (part, count)) in parts.iter().zip(sizes).enumerate() {
            assert_eq!(part.len(), count);
            assert!(part.iter().all(|number| *number == index as f32));
            assert!(part.as_ptr().addr().is_multiple_of(LINE));
        }
    }
}
