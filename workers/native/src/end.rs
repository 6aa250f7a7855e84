//! From a rank's vectors to logits, or to tokens, of all ranks.
#![allow(unsafe_code, reason = "numbers as bytes")]
#![allow(clippy::too_many_arguments, reason = "a step has what it has")]

use std::sync::Arc;

use cpu_kernels::{Matrix, add_and_norm, place_of_largest};
use rank_comm::{CommError, Group, Op};

/// Where vectors become logits.
pub(crate) struct End {
    pub norm: Vec<f32>,
    pub eps: f32,
    pub head: Arc<Matrix>,
    /// Logits that each rank makes.
    pub widths: Vec<usize>,
}

impl End {
    /// `out`: \[tokens, logits of all ranks\], where they are wanted.
    pub fn logits(
        &self,
        x: &mut [f32],
        tokens: usize,
        out: Option<&mut [f32]>,
        threads: usize,
        scratch: &mut [Vec<f32>; 3],
        group: Option<&mut Group>,
    ) -> Result<(), CommError> {
        let [normed, own, all] = scratch;
        self.norm(x, normed);
        let Some(group) = group else {
            if let Some(out) = out {
                self.head.multiply(normed, out, threads);
            }
            return Ok(());
        };
        own.resize(tokens * self.head.outputs(), 0.0);
        self.head.multiply(normed, own, threads);
        let sizes: Vec<_> = self.widths.iter().map(|width| tokens * width * size_of::<f32>()).collect();
        let wanted: Vec<_> = sizes.iter().map(|size| 0..if out.is_some() { *size } else { 0 }).collect();
        let Some(out) = out else {
            return group.exchange(Op::Gather, bytes_of(own), &sizes, &wanted, &mut []);
        };
        if tokens == 1 {
            return group.exchange(Op::Gather, bytes_of(own), &sizes, &wanted, bytes_of(out));
        }
        all.resize(out.len(), 0.0);
        group.exchange(Op::Gather, bytes_of(own), &sizes, &wanted, bytes_of(all))?;
        // Rank by rank, of each token by token; wanted is token by token.
        let (mut rest, mut column) = (&all[..], 0);
        for width in &self.widths {
            let (part, behind) = rest.split_at(tokens * width);
            for (from, to) in part.chunks_exact(*width).zip(out.chunks_exact_mut(self.widths.iter().sum())) {
                to[column..column + width].copy_from_slice(from);
            }
            (rest, column) = (behind, column + width);
        }
        Ok(())
    }

    /// `ids` become the likeliest tokens, at every rank: as [`place_of_largest`] of the logits of all has them. Of those each rank looks
    /// through its own and says a number of 64 bits for each sequence. Returns whether all ranks say `more`.
    pub fn likeliest(
        &self,
        x: &mut [f32],
        ids: &mut [i64],
        more: bool,
        threads: usize,
        scratch: &mut [Vec<f32>; 3],
        said: &mut [Vec<u64>; 2],
        group: Option<&mut Group>,
    ) -> Result<bool, CommError> {
        let ([normed, logits, _], [own, all]) = (scratch, said);
        self.norm(x, normed);
        let width = self.head.outputs();
        logits.resize(ids.len() * width, 0.0);
        self.head.multiply(normed, logits, threads);
        let places = logits.chunks_exact(width).map(|row| (place_of_largest(row), row));
        let Some(group) = group else {
            for ((place, _), id) in places.zip(ids) {
                *id = place as i64;
            }
            return Ok(more);
        };
        own.clear();
        own.push(u64::from(more));
        own.extend(places.map(|(place, row)| u64::from(row[place].to_bits()) << 32 | place as u64));
        let (ranks, count) = (self.widths.len(), own.len());
        all.resize(ranks * count, 0);
        let size = count * size_of::<u64>();
        let wanted: Vec<_> = (0..ranks).map(|_| 0..size).collect();
        group.exchange(Op::Gather, bytes_of(own), &vec![size; ranks], &wanted, bytes_of(all))?;
        for (row, id) in ids.iter_mut().enumerate() {
            *id = self.likeliest_of_ranks(all.chunks_exact(count).map(|of_rank| of_rank[row + 1]));
        }
        Ok(all.chunks_exact(count).all(|of_rank| of_rank[0] == 1))
    }

    /// Where the largest logit of a sequence stands among those of all ranks: the first of equal ones, or the first that is no number.
    fn likeliest_of_ranks(&self, said: impl Iterator<Item = u64>) -> i64 {
        let (mut most, mut found, mut first) = (f32::NEG_INFINITY, None, 0);
        for (one, width) in said.zip(&self.widths) {
            let logit = f32::from_bits((one >> 32) as u32);
            if found.is_none() || logit > most || logit.is_nan() {
                (most, found) = (logit, Some(first + (one & u64::from(u32::MAX)) as i64));
            }
            if logit.is_nan() {
                break;
            }
            first += *width as i64;
        }
        found.unwrap_or(0)
    }

    fn norm(&self, x: &mut [f32], normed: &mut Vec<f32>) {
        normed.resize(x.len(), 0.0);
        add_and_norm(x, &[], &self.norm, self.eps, normed);
    }
}

/// What any bytes are one of.
pub(crate) trait Number: Copy {}
impl Number for f32 {}
impl Number for u64 {}

pub(crate) fn bytes_of<N: Number>(numbers: &mut [N]) -> &mut [u8] {
    // SAFETY: every byte of a number is one, and as many bytes as it has are a number.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
