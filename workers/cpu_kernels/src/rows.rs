//! What is done to each row by itself.

use crate::simd::{Fuse, dot, exp, kernel, largest};
use crate::weight::Weight;

kernel! {
    /// `x` += `delta`, unless that is empty; `out` = `x` / sqrt(mean(x^2) + `eps`) x `weight`. All of rows as long as `weight`.
    add_and_norm_ = add_and_norm_rows(x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32])
}

/// `x` += `delta`, unless that is empty; `out` = `x` / sqrt(mean(x^2) + `eps`) x `weight`. All of rows as long as `weight`.
///
/// # Panics
/// If the sizes do not fit.
pub fn add_and_norm(x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    assert!(delta.is_empty() || delta.len() == x.len());
    add_and_norm_(x, delta, weight, eps, out);
}

#[inline(always)]
fn add_and_norm_rows<F: Fuse>(x: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (row, (x, out)) in x.chunks_exact_mut(width).zip(out.chunks_exact_mut(width)).enumerate() {
        if !delta.is_empty() {
            for (x, delta) in x.iter_mut().zip(&delta[row * width..]) {
                *x += delta;
            }
        }
        let scale = 1.0 / (dot::<F>(x, x) / width as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = *x * scale * weight;
        }
    }
}

kernel! {
    norm_heads_ = norm_heads_rows(x: &mut [f32], stride: usize, heads: usize, weight: &[f32], eps: f32)
}

/// The same norm, in place, of each of the first `heads` heads of rows that begin `stride` numbers apart; a head is as long as `weight`.
///
/// # Panics
/// If a row has no room for so many heads.
pub fn norm_heads(x: &mut [f32], stride: usize, heads: usize, weight: &[f32], eps: f32) {
    assert!(heads * weight.len() <= stride);
    norm_heads_(x, stride, heads, weight, eps);
}

#[inline(always)]
fn norm_heads_rows<F: Fuse>(x: &mut [f32], stride: usize, heads: usize, weight: &[f32], eps: f32) {
    let width = weight.len();
    for row in x.chunks_mut(stride) {
        for head in row[..heads * width].chunks_exact_mut(width) {
            let scale = 1.0 / (dot::<F>(head, head) / width as f32 + eps).sqrt();
            for (x, weight) in head.iter_mut().zip(weight) {
                *x = *x * scale * weight;
            }
        }
    }
}

kernel! {
    rotate_ = rotate_rows(x: &mut [f32], stride: usize, heads: usize, dim: usize, cos: &[f32], sin: &[f32])
}

/// Turns each of the first `heads` heads of rows that begin `stride` numbers apart. `cos` and `sin`: `dim` numbers per row; the first half of
/// `sin` is negative, so that number i becomes x\[i\] cos\[i\] + x\[i + dim/2\] sin\[i\] (modulo dim).
///
/// # Panics
/// If the sizes do not fit.
pub fn rotate(x: &mut [f32], stride: usize, heads: usize, dim: usize, cos: &[f32], sin: &[f32]) {
    assert!(heads * dim <= stride && dim.is_multiple_of(2));
    assert_eq!(cos.len(), sin.len());
    assert!(x.len().div_ceil(stride) * dim <= cos.len());
    rotate_(x, stride, heads, dim, cos, sin);
}

#[inline(always)]
fn rotate_rows<F: Fuse>(x: &mut [f32], stride: usize, heads: usize, dim: usize, cos: &[f32], sin: &[f32]) {
    let half = dim / 2;
    for (index, row) in x.chunks_mut(stride).enumerate() {
        let (cos_low, cos_high) = cos[index * dim..][..dim].split_at(half);
        let (sin_low, sin_high) = sin[index * dim..][..dim].split_at(half);
        for head in row[..heads * dim].chunks_exact_mut(dim) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = F::fuse(b, sin_low[i], a * cos_low[i]);
                high[i] = F::fuse(a, sin_high[i], b * cos_high[i]);
            }
        }
    }
}

/// Puts the first `width` numbers of each row of `x`, which begin `stride` apart, into `pool` at `slots`, each `width` wide.
///
/// # Panics
/// If a slot is beyond the pool.
pub fn store(x: &[f32], stride: usize, width: usize, slots: &[i64], pool: &mut [f32]) {
    for (row, &slot) in x.chunks(stride).zip(slots) {
        pool[slot as usize * width..][..width].copy_from_slice(&row[..width]);
    }
}

/// Rows of `weight`, `width` wide, whose number is in `ids`: the first row's number is `first`. What is not there is zero.
///
/// # Panics
/// If the sizes do not fit.
pub fn rows_of<W: Weight>(weight: &[W], width: usize, first: i64, ids: &[i64], out: &mut [f32]) {
    assert_eq!(out.len(), ids.len() * width);
    for (out, id) in out.chunks_exact_mut(width).zip(ids) {
        let found = usize::try_from(id - first).ok().and_then(|row| weight.chunks_exact(width).nth(row));
        match found {
            Some(row) => out.iter_mut().zip(row).for_each(|(out, number)| *out = (*number).into()),
            None => out.fill(0.0),
        }
    }
}

/// Where the largest number stands, the first of equal ones; the first that is none, if there is one, as torch has it.
#[must_use]
pub fn place_of_largest(row: &[f32]) -> usize {
    // Without a way out, so that it is done in vectors.
    let is_broken = row.iter().fold(false, |found, number| found | number.is_nan());
    let most = largest(row);
    row.iter().position(|number| if is_broken { number.is_nan() } else { *number == most }).unwrap_or(0)
}

kernel! {
    silu_and_multiply_ = silu_and_multiply_rows(x: &[f32], out: &mut [f32], width: usize)
}

/// Rows of `2 * width` numbers to rows of `width`: SiLU of the first half times the second.
///
/// # Panics
/// If the sizes do not fit.
pub fn silu_and_multiply(x: &[f32], out: &mut [f32], width: usize) {
    assert_eq!(x.len(), 2 * out.len());
    silu_and_multiply_(x, out, width);
}

#[inline(always)]
fn silu_and_multiply_rows<F: Fuse>(x: &[f32], out: &mut [f32], width: usize) {
    for (x, out) in x.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = x.split_at(width);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + exp::<F>(-gate)) * up;
        }
    }
}
