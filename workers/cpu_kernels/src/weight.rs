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
    fn kept(panels: Numbers<Self>) -> Panels {
        Panels::Float32(panels)
    }

    #[inline(always)]
    fn block<B: Block>(numbers: &[Self; LANES]) -> B {
        B::of(numbers)
    }
}

impl Weight for Bfloat16 {
    fn kept(panels: Numbers<Self>) -> Panels {
        Panels::Bfloat16(panels)
    }

    #[inline(always)]
    fn block<B: Block>(numbers: &[Self; LANES]) -> B {
        B::widened(numbers)
    }
}
