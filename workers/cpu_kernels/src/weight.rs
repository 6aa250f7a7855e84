//! Numbers as weights are kept: in 32 bits, or in the 16 that are all a published checkpoint has.

use crate::block::Block;
use crate::memory::Numbers;
use crate::simd::LANES;

/// The upper half of a float32: what is multiplied is that float32 exactly.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(transparent)]
pub struct Bfloat16(pub u16);

impl From<Bfloat16> for f32 {
    fn from(number: Bfloat16) -> Self {
        Self::from_bits(u32::from(number.0) << 16)
    }
}

/// What a matrix may consist of. Zero is all bits zero.
pub trait Weight: Copy + Send + Sync + Into<f32> + 'static {
    /// How far before they are used weights are asked for, in bytes. One rank's step of hidden 512 x 8 layers, one sequence, ms: in 32 bits
    /// 6 KB 3.1, 12 KB 3.5, not at all 3.4; in 16 bits 6 KB 1.75, 12 KB 1.5, not at all 1.55. With the hint that these are for one use, as
    /// long as Python lay between two steps the best, 3.35 and 1.75.
    #[doc(hidden)]
    const BEFORE: usize;

    #[doc(hidden)]
    fn kept(panels: Numbers<Self>) -> Panels;

    #[doc(hidden)]
    fn block<B: Block>(numbers: &[Self; LANES]) -> B;
}

/// Whatever a matrix consists of.
#[doc(hidden)]
pub enum Panels {
    Float32(Numbers<f32>),
    Bfloat16(Numbers<Bfloat16>),
}

impl Weight for f32 {
    const BEFORE: usize = 6 << 10;

    fn kept(panels: Numbers<Self>) -> Panels {
        Panels::Float32(panels)
    }

    #[inline(always)]
    fn block<B: Block>(numbers: &[Self; LANES]) -> B {
        B::of(numbers)
    }
}

impl Weight for Bfloat16 {
    const BEFORE: usize = 12 << 10;

    fn kept(panels: Numbers<Self>) -> Panels {
        Panels::Bfloat16(panels)
    }

    #[inline(always)]
    fn block<B: Block>(numbers: &[Self; LANES]) -> B {
        B::widened(numbers)
    }
}
