//! Sixteen numbers at a time, for loops that the compiler does not turn into vector instructions by itself: those over many sums that
//! must all stay in registers.

use crate::simd::LANES;

/// So many numbers.
pub(crate) trait Block: Copy {
    fn zero() -> Self;

    fn of(numbers: &[f32; LANES]) -> Self;

    /// `x` x `numbers` + `self`
    fn plus(self, x: f32, numbers: Self) -> Self;

    fn numbers(self) -> [f32; LANES];
}

/// For any CPU.
impl Block for [f32; LANES] {
    #[inline(always)]
    fn zero() -> Self {
        [0.0; LANES]
    }

    #[inline(always)]
    fn of(numbers: &[f32; LANES]) -> Self {
        *numbers
    }

    #[inline(always)]
    fn plus(mut self, x: f32, numbers: Self) -> Self {
        for lane in 0..LANES {
            self[lane] += x * numbers[lane];
        }
        self
    }

    #[inline(always)]
    fn numbers(self) -> [f32; LANES] {
        self
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Half, Whole};

#[cfg(target_arch = "x86_64")]
#[allow(
    unsafe_code,
    reason = "instructions that not every CPU has; only the editions of a kernel for those that do name these types"
)]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Block, LANES};

    /// A register of AVX-512.
    #[derive(Clone, Copy)]
    pub(crate) struct Whole(__m512);

    // SAFETY, of both: see above; loads and stores are of arrays of the right size.
    impl Block for Whole {
        #[inline(always)]
        fn zero() -> Self {
            Self(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        fn of(numbers: &[f32; LANES]) -> Self {
            Self(unsafe { _mm512_loadu_ps(numbers.as_ptr()) })
        }

        #[inline(always)]
        fn plus(self, x: f32, numbers: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(_mm512_set1_ps(x), numbers.0, self.0) })
        }

        #[inline(always)]
        fn numbers(self) -> [f32; LANES] {
            let mut numbers = [0.0; LANES];
            unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), self.0) };
            numbers
        }
    }

    /// Two registers of AVX2.
    #[derive(Clone, Copy)]
    pub(crate) struct Half(__m256, __m256);

    impl Block for Half {
        #[inline(always)]
        fn zero() -> Self {
            unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }

        #[inline(always)]
        fn of(numbers: &[f32; LANES]) -> Self {
            unsafe { Self(_mm256_loadu_ps(numbers.as_ptr()), _mm256_loadu_ps(numbers[LANES / 2..].as_ptr())) }
        }

        #[inline(always)]
        fn plus(self, x: f32, numbers: Self) -> Self {
            unsafe {
                let x = _mm256_set1_ps(x);
                Self(_mm256_fmadd_ps(x, numbers.0, self.0), _mm256_fmadd_ps(x, numbers.1, self.1))
            }
        }

        #[inline(always)]
        fn numbers(self) -> [f32; LANES] {
            let mut numbers = [0.0; LANES];
            unsafe {
                _mm256_storeu_ps(numbers.as_mut_ptr(), self.0);
                _mm256_storeu_ps(numbers[LANES / 2..].as_mut_ptr(), self.1);
            }
            numbers
        }
    }
}
