//! Sixteen numbers at a time, for loops that the compiler does not turn into vector instructions by itself: those over many sums that
//! must all stay in registers.

use crate::simd::LANES;
use crate::weight::Bfloat16;

/// So many numbers.
pub trait Block: Copy {
    fn zero() -> Self;

    fn of(numbers: &[f32; LANES]) -> Self;

    fn widened(numbers: &[Bfloat16; LANES]) -> Self;

    /// `x` x `numbers` + `self`
    fn plus(self, x: f32, numbers: Self) -> Self;

    /// `a` x `b` + `self`, number by number.
    fn plus_products(self, a: Self, b: Self) -> Self;

    /// Of all numbers, halves first.
    fn sum(self) -> f32;

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
    fn widened(numbers: &[Bfloat16; LANES]) -> Self {
        numbers.map(f32::from)
    }

    #[inline(always)]
    fn plus(mut self, x: f32, numbers: Self) -> Self {
        for lane in 0..LANES {
            self[lane] += x * numbers[lane];
        }
        self
    }

    #[inline(always)]
    fn plus_products(mut self, a: Self, b: Self) -> Self {
        for lane in 0..LANES {
            self[lane] += a[lane] * b[lane];
        }
        self
    }

    #[inline(always)]
    fn sum(mut self) -> f32 {
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                self[lane] += self[lane + width];
            }
            width /= 2;
        }
        self[0]
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

    use super::{Bfloat16, Block, LANES};

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
        fn widened(numbers: &[Bfloat16; LANES]) -> Self {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(numbers.as_ptr().cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }

        #[inline(always)]
        fn plus(self, x: f32, numbers: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(_mm512_set1_ps(x), numbers.0, self.0) })
        }

        #[inline(always)]
        fn plus_products(self, a: Self, b: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe { Half(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0)) }.sum()
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
        fn widened(numbers: &[Bfloat16; LANES]) -> Self {
            unsafe {
                let first = _mm256_cvtepu16_epi32(_mm_loadu_si128(numbers.as_ptr().cast()));
                let second = _mm256_cvtepu16_epi32(_mm_loadu_si128(numbers[LANES / 2..].as_ptr().cast()));
                let [first, second] = [_mm256_slli_epi32::<16>(first), _mm256_slli_epi32::<16>(second)];
                Self(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second))
            }
        }

        #[inline(always)]
        fn plus(self, x: f32, numbers: Self) -> Self {
            unsafe {
                let x = _mm256_set1_ps(x);
                Self(_mm256_fmadd_ps(x, numbers.0, self.0), _mm256_fmadd_ps(x, numbers.1, self.1))
            }
        }

        #[inline(always)]
        fn plus_products(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe {
                let eight = _mm256_add_ps(self.0, self.1);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
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
