//! Products of rows with a matrix, from one row to hundreds, with one order of the matrix for all.
//!
//! A matrix is kept in panels: 64 outputs wide, all inputs long, input by input. A single row reads it from beginning to end, once, as
//! fast as memory gives it; more rows keep a piece of a panel near the core and their sums in registers. The additions of an output
//! follow from the number of inputs, whatever the number of rows or threads: its bits do not depend on company.

use crate::block::Block;
use crate::memory::Numbers;
use crate::simd::{Fuse, LANES, has_wide, kernel, prefetch_later, read};
use crate::weight::{Bfloat16, Panels, Weight};

/// Outputs of a panel: four blocks, so that six rows of sums are the 24 blocks that stay in registers with AVX-512. The last panel may
/// have fewer.
const PANEL: usize = 4 * LANES;

/// Inputs of a piece of a panel: 128 KB at most, which stay in the core's own cache while all rows are multiplied with it. Sums of pieces are
/// added up, which is more exact than one long chain of additions.
const PIECE: usize = 512;

/// A matrix in the order that [`Matrix::multiply`] reads it in, and what its sums begin with.
pub struct Matrix {
    outputs: usize,
    inputs: usize,
    /// Panel by panel; of each, input by input. The last is filled up with zeros to whole blocks.
    panels: Panels,
    /// As many as there are outputs, filled up in the same way.
    bias: Vec<f32>,
}

/// Whether products are fast on this CPU; elsewhere they are correct.
#[must_use]
pub fn products_are_fast() -> bool {
    has_wide()
}

impl Matrix {
    /// `weight`: \[outputs, inputs\]. `bias`: one per output, or empty.
    ///
    /// # Panics
    /// If the sizes do not fit.
    #[must_use]
    pub fn new<W: Weight>(weight: &[W], inputs: usize, bias: &[f32]) -> Self {
        assert!(inputs > 0 && weight.len().is_multiple_of(inputs));
        let outputs = weight.len() / inputs;
        assert!(bias.is_empty() || bias.len() == outputs);
        let filled = outputs.next_multiple_of(LANES);
        let panels = Numbers::new(filled * inputs, |panels: &mut [W]| {
            for (panel, rows) in panels.chunks_mut(PANEL * inputs).zip(weight.chunks(PANEL * inputs)) {
                let width = panel.len() / inputs;
                for (place, row) in rows.chunks_exact(inputs).enumerate() {
                    for (number, into) in row.iter().zip(panel[place..].iter_mut().step_by(width)) {
                        *into = *number;
                    }
                }
            }
        });
        let mut begin = vec![0.0; filled];
        begin[..bias.len()].copy_from_slice(bias);
        Self { outputs, inputs, panels: W::kept(panels), bias: begin }
    }

    /// To be read soon, by one thread.
    #[must_use]
    pub fn ahead(&self) -> Ahead<'_> {
        let bytes = match &self.panels {
            Panels::Float32(panels) => panels.bytes(),
            Panels::Bfloat16(panels) => panels.bytes(),
        };
        Ahead { rest: &bytes[..bytes.len().min(AHEAD)] }
    }

    /// Numbers that come out of a row.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Numbers of a row.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// `out` = `x` W^T + b, of rows. On `threads` threads.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn multiply(&self, x: &[f32], out: &mut [f32], threads: usize) {
        assert!(x.len().is_multiple_of(self.inputs));
        assert_eq!(out.len(), x.len() / self.inputs * self.outputs);
        match &self.panels {
            Panels::Float32(panels) => self.multiply_by(panels, float32_panels, x, out, threads),
            Panels::Bfloat16(panels) => self.multiply_by(panels, bfloat16_panels, x, out, threads),
        }
    }

    fn multiply_by<W: Weight>(&self, panels: &[W], kernel: Kernel<W>, x: &[f32], out: &mut [f32], threads: usize) {
        let width = self.bias.len().div_ceil(PANEL).div_ceil(threads.max(1)) * PANEL;
        let panels = panels.chunks(width * self.inputs).zip(self.bias.chunks(width));
        let mut parts: Vec<Part<'_, W>> = panels.map(|(panels, bias)| Part { panels, bias, out: vec![] }).collect();
        for row in out.chunks_exact_mut(self.outputs) {
            for (part, piece) in parts.iter_mut().zip(row.chunks_mut(width)) {
                part.out.push(piece);
            }
        }
        let multiply = |part: &mut Part<'_, W>| kernel(x, self.inputs, part.panels, part.bias, &mut part.out);
        let (own, others) = parts.split_first_mut().expect("there is one output at least");
        if others.is_empty() {
            // Without a scope, which would make a pool of threads.
            multiply(own);
            return;
        }
        rayon::in_place_scope(|scope| {
            for part in others {
                scope.spawn(|_| multiply(part));
            }
            multiply(own);
        });
    }
}

/// Bytes of a matrix that are read before they are used: half of a core's own cache.
const AHEAD: usize = 512 << 10;

/// Of these at a time: some 150 ns from memory.
const AT_A_TIME: usize = 4 << 10;

/// The beginning of a matrix, read into the core's own cache while there is nothing better to do.
pub struct Ahead<'a> {
    rest: &'a [u8],
}

impl Ahead<'_> {
    /// Reads some more of it; false: there is no more.
    pub fn more(&mut self) -> bool {
        let (some, rest) = self.rest.split_at(self.rest.len().min(AT_A_TIME));
        self.rest = rest;
        read(some);
        !rest.is_empty()
    }
}

/// What one thread does.
struct Part<'a, W> {
    panels: &'a [W],
    bias: &'a [f32],
    /// Its piece of every row.
    out: Vec<&'a mut [f32]>,
}

/// See [`multiply_panels`].
type Kernel<W> = fn(&[f32], usize, &[W], &[f32], &mut [&mut [f32]]);

kernel! {
    float32_panels = multiply_float32(x: &[f32], inputs: usize, panels: &[f32], bias: &[f32], out: &mut [&mut [f32]])
}

kernel! {
    bfloat16_panels = multiply_bfloat16(x: &[f32], inputs: usize, panels: &[Bfloat16], bias: &[f32], out: &mut [&mut [f32]])
}

#[inline(always)]
fn multiply_float32<F: Fuse>(x: &[f32], inputs: usize, panels: &[f32], bias: &[f32], out: &mut [&mut [f32]]) {
    multiply_panels::<F, f32>(x, inputs, panels, bias, out);
}

#[inline(always)]
fn multiply_bfloat16<F: Fuse>(x: &[f32], inputs: usize, panels: &[Bfloat16], bias: &[f32], out: &mut [&mut [f32]]) {
    multiply_panels::<F, Bfloat16>(x, inputs, panels, bias, out);
}

#[inline(always)]
fn multiply_panels<F: Fuse, W: Weight>(x: &[f32], inputs: usize, panels: &[W], bias: &[f32], out: &mut [&mut [f32]]) {
    for (number, (panel, bias)) in panels.chunks(PANEL * inputs).zip(bias.chunks(PANEL)).enumerate() {
        let (first, width) = (number * PANEL, bias.len());
        for out in out.iter_mut() {
            let end = out.len().min(first + width);
            out[first..end].copy_from_slice(&bias[..end - first]);
        }
        for (place, piece) in panel.chunks(PIECE * width).enumerate() {
            let (mut row, from) = (0, place * PIECE);
            while row < out.len() {
                let (x, out) = (&x[row * inputs + from..], &mut out[row..]);
                row += if row == 0 {
                    add_some::<F, W, true>(x, inputs, piece, width, first, out)
                } else {
                    add_some::<F, W, false>(x, inputs, piece, width, first, out)
                };
            }
        }
    }
}

/// As many rows as sums of them stay in registers. `FIRST`: nobody has read `piece` before in this step. Returns how many.
#[inline(always)]
fn add_some<F: Fuse, W: Weight, const FIRST: bool>(
    x: &[f32],
    stride: usize,
    piece: &[W],
    width: usize,
    first: usize,
    out: &mut [&mut [f32]],
) -> usize {
    match out.len() {
        1 => add_rows::<F, W, 1, FIRST>(x, stride, piece, width, first, out),
        2 => add_rows::<F, W, 2, FIRST>(x, stride, piece, width, first, out),
        3 => add_rows::<F, W, 3, FIRST>(x, stride, piece, width, first, out),
        4 => add_rows::<F, W, 4, FIRST>(x, stride, piece, width, first, out),
        5 => add_rows::<F, W, 5, FIRST>(x, stride, piece, width, first, out),
        _ => add_rows::<F, W, 6, FIRST>(x, stride, piece, width, first, out),
    }
}

/// As many blocks at a time as there are registers for. Returns how many rows have been done.
#[inline(always)]
fn add_rows<F: Fuse, W: Weight, const ROWS: usize, const FIRST: bool>(
    x: &[f32],
    stride: usize,
    piece: &[W],
    width: usize,
    first: usize,
    out: &mut [&mut [f32]],
) -> usize {
    if width == PANEL && ROWS * 4 <= F::BLOCKS.max(4) {
        add::<F, W, ROWS, 4, FIRST>(x, stride, piece, width, 0, first, out);
    } else if width == PANEL && ROWS * 2 <= F::BLOCKS {
        add::<F, W, ROWS, 2, FIRST>(x, stride, piece, width, 0, first, out);
        add::<F, W, ROWS, 2, FIRST>(x, stride, piece, width, 2 * LANES, first, out);
    } else {
        for column in (0..width).step_by(LANES) {
            add::<F, W, ROWS, 1, FIRST>(x, stride, piece, width, column, first, out);
        }
    }
    ROWS
}

/// To the outputs from `first` + `column` on, of the first `ROWS` rows, what `piece` makes of the inputs that `x` begins with.
#[inline(always)]
fn add<F: Fuse, W: Weight, const ROWS: usize, const BLOCKS: usize, const FIRST: bool>(
    x: &[f32],
    stride: usize,
    piece: &[W],
    width: usize,
    column: usize,
    first: usize,
    out: &mut [&mut [f32]],
) {
    let inputs = piece.len() / width;
    let x: [&[f32]; ROWS] = std::array::from_fn(|row| &x[row * stride..][..inputs]);
    let mut sums = [[F::Block::zero(); BLOCKS]; ROWS];
    let blocks = piece.as_chunks::<LANES>().0;
    for (input, weights) in (0..inputs).zip(blocks.chunks_exact(width / LANES)) {
        let weights = weights[column / LANES..].first_chunk::<BLOCKS>().expect("a panel is wide enough");
        if FIRST {
            prefetch_later(weights, W::BEFORE);
        }
        // Not by `map`: a function that is handed over does not become part of this edition, and is not inlined then.
        let mut blocks = [F::Block::zero(); BLOCKS];
        for (block, weights) in blocks.iter_mut().zip(weights) {
            *block = W::block(weights);
        }
        for row in 0..ROWS {
            for block in 0..BLOCKS {
                sums[row][block] = sums[row][block].plus(x[row][input], blocks[block]);
            }
        }
    }
    for (sums, out) in sums.iter().zip(out) {
        for (sums, out) in sums.iter().zip(out[first + column..].chunks_mut(LANES)) {
            if let Some(out) = out.first_chunk_mut::<LANES>() {
                *out = F::Block::of(out).plus(1.0, *sums).numbers();
            } else {
                // The last block of a matrix may be longer than what is wanted of it.
                out.iter_mut().zip(sums.numbers()).for_each(|(out, sum)| *out += sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Fused, Separate};

    fn of_rows(out: &mut [f32], width: usize) -> Vec<&mut [f32]> {
        out.chunks_mut(width).collect()
    }

    /// What the edition `F` makes of rows `x`.
    fn made_by<F: Fuse>(matrix: &Matrix, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len() / matrix.inputs * matrix.outputs];
        let rows = &mut of_rows(&mut out, matrix.outputs);
        match &matrix.panels {
            Panels::Float32(panels) => multiply_panels::<F, _>(x, matrix.inputs, panels, &matrix.bias, rows),
            Panels::Bfloat16(panels) => multiply_panels::<F, _>(x, matrix.inputs, panels, &matrix.bias, rows),
        }
        out
    }

    #[test]
    fn editions_agree() {
        for (outputs, inputs) in [(200, 64), (17, 700), (64, 33)] {
            let weight: Vec<f32> = (0..outputs * inputs).map(|i| (i * 7919 % 1999) as f32 / 1000.0 - 1.0).collect();
            let halves: Vec<Bfloat16> = weight.iter().map(|number| Bfloat16((number.to_bits() >> 16) as u16)).collect();
            for matrix in [Matrix::new(&weight, inputs, &[]), Matrix::new(&halves, inputs, &[])] {
                for rows in 1..8 {
                    let x: Vec<f32> = (0..rows * inputs).map(|i| (i * 104_729 % 997) as f32 / 500.0 - 1.0).collect();
                    let mut out = vec![0.0; rows * outputs];
                    matrix.multiply(&x, &mut out, 1);
                    let any = made_by::<Separate>(&matrix, &x);
                    assert!(out.iter().zip(&any).all(|(a, b)| (a - b).abs() < 1e-4));
                    if has_wide() {
                        assert_eq!(out, made_by::<Fused>(&matrix, &x));
                    }
                }
            }
        }
    }
}
