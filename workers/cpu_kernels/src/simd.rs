//! Loops that the compiler turns into vector instructions, in three editions: for AVX-512, for AVX2 with FMA, and for whatever there is.
//!
//! A kernel is an `#[inline(always)]` function, generic in how it multiplies and adds; [`kernel!`] makes the editions of it. The first
//! two give the same bits.

use crate::block::Block;

/// How a product is added to a sum.
pub(crate) trait Fuse: Copy {
    /// [`LANES`] numbers at a time.
    type Block: Block;

    /// How many of them stay in registers, beside what they are made of.
    const BLOCKS: usize;

    /// `a` x `b` + `c`
    fn fuse(a: f32, b: f32, c: f32) -> f32;
}

/// With one rounding, which needs the instruction: without it this is a call of a slow function. In 32 registers of a block each.
#[derive(Clone, Copy)]
pub(crate) struct FusedWide;

/// The same in 16 registers of half a block each.
#[derive(Clone, Copy)]
pub(crate) struct Fused;

/// With two.
#[derive(Clone, Copy)]
pub(crate) struct Separate;

impl Fuse for FusedWide {
    #[cfg(target_arch = "x86_64")]
    type Block = crate::block::Whole;
    #[cfg(not(target_arch = "x86_64"))]
    type Block = [f32; LANES];

    const BLOCKS: usize = 24;

    #[inline(always)]
    fn fuse(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Fuse for Fused {
    #[cfg(target_arch = "x86_64")]
    type Block = crate::block::Half;
    #[cfg(not(target_arch = "x86_64"))]
    type Block = [f32; LANES];

    const BLOCKS: usize = 6;

    #[inline(always)]
    fn fuse(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Fuse for Separate {
    type Block = [f32; LANES];

    const BLOCKS: usize = 3;

    #[inline(always)]
    fn fuse(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// `pub(crate) fn $name(...)` that runs the edition of `$body` for this CPU.
macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident = $body:ident ( $($arg:ident : $type:ty),* $(,)? )) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "kernels take what they take")]
        pub(crate) fn $name($($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "kernels take what they take")]
                fn widest($($arg: $type),*) {
                    $body::<$crate::simd::FusedWide>($($arg),*);
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments, reason = "kernels take what they take")]
                fn wide($($arg: $type),*) {
                    $body::<$crate::simd::Fused>($($arg),*);
                }
                if $crate::simd::has_widest() {
                    #[allow(unsafe_code, reason = "the CPU has what it needs: the line above has asked")]
                    // SAFETY: as said.
                    return unsafe { widest($($arg),*) };
                }
                if $crate::simd::has_wide() {
                    #[allow(unsafe_code, reason = "the CPU has what it needs: the line above has asked")]
                    // SAFETY: as said.
                    return unsafe { wide($($arg),*) };
                }
            }
            $body::<$crate::simd::Separate>($($arg),*);
        }
    };
}
pub(crate) use kernel;

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_widest() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") && has_wide()
}

/// Whether products are fused here.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_wide() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn has_wide() -> bool {
    false
}

/// Numbers of a block; of a sum, as many are kept apart.
pub(crate) const LANES: usize = 16;

/// Bytes of a line of the cache.
pub(crate) const LINE: usize = 64;

/// Asks for as many bytes as `numbers` have, which begin `distance` bytes behind them.
#[inline(always)]
pub(crate) fn prefetch_later<T>(numbers: &[T], distance: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(numbers)).step_by(LINE) {
        let line = numbers.as_ptr().wrapping_byte_add(distance + line).cast();
        #[allow(unsafe_code, reason = "a hint, which does nothing where there is no memory")]
        // SAFETY: as below.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(line);
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (numbers, distance);
}

/// Asks for memory that will be read soon, into the core's own larger cache. Into the nearest one memory comes half as fast: fewer requests
/// can be under way.
#[inline(always)]
pub(crate) fn prefetch<T>(numbers: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in numbers.chunks(LINE / size_of::<T>()) {
        #[allow(unsafe_code, reason = "a hint, for an address that is valid")]
        // SAFETY: every x86-64 has the instruction, and it reads nothing that the program could see.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = numbers;
}

/// Brings memory into the core's own larger cache and returns when most of it is there. [`prefetch`] would not: of more than some 100 lines at
/// a time the core drops what it has no room to remember (walking through 8 MB took 40 us so, and reading them afterwards as long as ever).
pub(crate) fn read(bytes: &[u8]) {
    let sum = bytes.iter().step_by(LINE).fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    std::hint::black_box(sum);
}

/// Sum of products. The order of additions is fixed by the length alone.
#[inline(always)]
pub(crate) fn dot<F: Fuse>(a: &[f32], b: &[f32]) -> f32 {
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    // By blocks: the compiler's own vectors are two numbers long where it knows how many blocks there are.
    let mut sums = F::Block::zero();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        sums = sums.plus_products(F::Block::of(a), F::Block::of(b));
    }
    let mut sum = sums.sum();
    for (a, b) in a_rest.iter().zip(b_rest) {
        sum = F::fuse(*a, *b, sum);
    }
    sum
}

/// The sum; the order of additions is fixed by the length alone.
#[inline(always)]
pub(crate) fn sum<F: Fuse>(numbers: &[f32]) -> f32 {
    let (blocks, rest) = numbers.as_chunks::<LANES>();
    let mut sums = F::Block::zero();
    for block in blocks {
        sums = sums.plus(1.0, F::Block::of(block));
    }
    sums.sum() + rest.iter().sum::<f32>()
}

/// The largest number, none of which may be NaN; -inf of none.
#[inline(always)]
pub(crate) fn largest(numbers: &[f32]) -> f32 {
    let mut found = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = numbers.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            found[lane] = if block[lane] > found[lane] { block[lane] } else { found[lane] };
        }
    }
    found.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// e^x for x up to 88, to 2 units in the last place; 0 below -87. Cephes' reduction and polynomial (Moshier, 1992).
#[inline(always)]
pub(crate) fn exp<F: Fuse>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 x 2^23: adding it leaves a whole number
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = F::fuse(clamped, std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let rest = F::fuse(power, -0.693_359_4, clamped);
    let rest = F::fuse(power, 2.121_944_4e-4, rest);
    let mut sum = 1.987_569_1e-4_f32;
    for factor in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5] {
        sum = F::fuse(sum, rest, factor);
    }
    let value = F::fuse(sum, rest * rest, rest + 1.0);
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.0 { 0.0 } else { value * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_those_of_the_library() {
        for step in -8_700..8_800 {
            let x = step as f32 / 100.0 + 0.003;
            for ours in [exp::<Separate>(x), exp::<Fused>(x)] {
                let exact = f64::from(x).exp();
                assert!((f64::from(ours) - exact).abs() <= 4e-7 * exact, "e^{x}: {ours}, not {exact}");
            }
        }
        assert_eq!(exp::<Separate>(-100.0), 0.0);
        assert_eq!(exp::<Separate>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<Separate>(0.0), 1.0);
    }

    #[test]
    fn products_are_summed() {
        let numbers: Vec<f32> = (0..70).map(|n| n as f32).collect();
        for length in 0..70 {
            let exact: f32 = numbers[..length].iter().map(|n| n * n).sum();
            assert_eq!(dot::<Separate>(&numbers[..length], &numbers[..length]), exact);
        }
    }
}
