//! Attention of single queries over pages: each looks at the first so many tokens of its sequence.

use std::cell::RefCell;

use rayon::prelude::*;

use crate::block::Block;
use crate::simd::{Fuse, LANES, dot, exp, kernel, largest, prefetch, sum};

/// Keys and values of a layer, and who has which pages.
#[derive(Clone, Copy)]
pub struct Cached<'a> {
    /// \[slots, kv heads, key dim\]
    pub keys: &'a [f32],
    /// \[slots, kv heads, value stride\], of which the first `value_dim` count; may be the keys themselves.
    pub values: &'a [f32],
    /// KV heads of a token.
    pub heads: usize,
    /// Numbers of a key.
    pub key_dim: usize,
    /// Numbers from one value to the next.
    pub value_stride: usize,
    /// Numbers of a value.
    pub value_dim: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// \[rows, `pages_per_row`\]: the page of tokens n x `page_size` and following of the sequence in a row.
    pub page_table: &'a [i64],
    /// Columns of the table.
    pub pages_per_row: usize,
}

/// The queries of a step.
#[derive(Clone, Copy)]
pub struct Queries<'a> {
    /// Query heads of token i begin at i x `stride`.
    pub numbers: &'a [f32],
    /// Numbers from one token's queries to the next one's.
    pub stride: usize,
    /// Query heads of a token: a multiple of the KV heads, each of which serves a run of them.
    pub heads: usize,
    /// Per query, its sequence's row in the page table.
    pub rows: &'a [i64],
    /// Per query, how many tokens it sees.
    pub visible: &'a [i64],
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
}

/// Softmax(q k) v for every query and head: `out` is \[queries, heads, value dim\]. On `threads` threads.
///
/// # Panics
/// If the sizes do not fit, or a page is beyond the pool.
pub fn attend(queries: Queries<'_>, cached: Cached<'_>, out: &mut [f32], threads: usize) {
    let width = queries.heads * cached.value_dim;
    assert!(queries.heads.is_multiple_of(cached.heads));
    assert_eq!(queries.rows.len(), queries.visible.len());
    assert_eq!(out.len(), queries.rows.len() * width);
    let one = |(index, out): (usize, &mut [f32])| {
        SCORES.with_borrow_mut(|scores| attend_one(queries, cached, index, scores, out))
    };
    if threads > 1 && queries.rows.len() > 1 {
        out.par_chunks_mut(width).enumerate().for_each(one);
    } else {
        out.chunks_mut(width).enumerate().for_each(one);
    }
}

thread_local! {
    /// \[query heads, tokens\]. Kept from call to call: fresh memory of this size would come from the system each time.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

kernel! {
    attend_one = attend_query(
        queries: Queries<'_>, cached: Cached<'_>, index: usize, scores: &mut Vec<f32>, out: &mut [f32],
    )
}

/// What of a page belongs to one KV head: a key or value of each of so many tokens.
#[derive(Clone, Copy)]
struct Run<'a> {
    numbers: &'a [f32],
    /// Numbers from one token's to the next one's.
    stride: usize,
    tokens: usize,
    /// The same of a page that will be read soon, or nothing. A token's part is asked for while this page's one is used: a whole page at
    /// once would have to wait for itself. 264 tokens of 8 sequences, 4 heads of 64, from memory: 320 us; all at once 600 (AMD EPYC).
    later: &'a [f32],
}

impl<'a> Run<'a> {
    /// Token by token, `width` numbers each.
    #[inline(always)]
    fn tokens(self, width: usize) -> impl Iterator<Item = &'a [f32]> {
        self.numbers.chunks(self.stride).take(self.tokens).enumerate().map(move |(token, numbers)| {
            if let Some(later) = self.later.get(token * self.stride..token * self.stride + width) {
                prefetch(later);
            }
            &numbers[..width]
        })
    }
}

/// Tokens before a key or value is used that it is asked for.
const BEFORE: usize = 16;

/// Where the tokens are that a query sees.
struct Seen<'a> {
    pages: &'a [i64],
    page_size: usize,
    tokens: usize,
}

impl Seen<'_> {
    /// Of `numbers`, which are `stride` for a token, what belongs to the page `number` of the sequence, of each token from `first` on.
    #[inline(always)]
    fn run<'a>(&self, numbers: &'a [f32], stride: usize, number: usize, first: usize) -> Run<'a> {
        let whole = self.page_size * stride;
        let of = |page: i64| &numbers[page as usize * whole..][first..whole];
        let later = self.pages.get(number + BEFORE.div_ceil(self.page_size));
        Run {
            numbers: of(self.pages[number]),
            stride,
            tokens: self.page_size.min(self.tokens - number * self.page_size),
            later: later.map_or(&[], |page| of(*page)),
        }
    }
}

/// Page by page, all heads of it: a page is one piece of memory.
#[inline(always)]
fn attend_query<F: Fuse>(
    queries: Queries<'_>,
    cached: Cached<'_>,
    index: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let Cached { keys, values, heads: kv_heads, key_dim, value_stride, value_dim, page_size, .. } = cached;
    let visible = queries.visible[index] as usize;
    let row = queries.rows[index] as usize * cached.pages_per_row;
    let pages = &cached.page_table[row..][..visible.div_ceil(page_size)];
    let seen = Seen { pages, page_size, tokens: visible };
    let per_head = queries.heads / kv_heads;
    let query = &queries.numbers[index * queries.stride..][..queries.heads * key_dim];
    scores.resize(visible * queries.heads, 0.0);

    for page in 0..pages.len() {
        for (head, queries_of_head) in query.chunks_exact(per_head * key_dim).enumerate() {
            let keys = seen.run(keys, kv_heads * key_dim, page, head * key_dim);
            let scores = &mut scores[head * per_head * visible + page * page_size..];
            // The usual sizes by themselves: loops of a known length are unrolled.
            match key_dim {
                32 => products::<F, 32>(queries_of_head, keys, queries.scale, scores, visible),
                64 => products::<F, 64>(queries_of_head, keys, queries.scale, scores, visible),
                128 => products::<F, 128>(queries_of_head, keys, queries.scale, scores, visible),
                _ => {
                    for (token, key) in keys.tokens(key_dim).enumerate() {
                        for (head, query) in queries_of_head.chunks_exact(key_dim).enumerate() {
                            scores[head * visible + token] = dot::<F>(query, key) * queries.scale;
                        }
                    }
                }
            }
        }
    }
    for scores in scores.chunks_exact_mut(visible) {
        let largest = largest(scores);
        for score in scores.iter_mut() {
            *score = exp::<F>(*score - largest);
        }
        let factor = 1.0 / sum::<F>(scores);
        scores.iter_mut().for_each(|score| *score *= factor);
    }
    out.fill(0.0);
    for page in 0..pages.len() {
        for (kv_head, out) in out.chunks_exact_mut(per_head * value_dim).enumerate() {
            let values = seen.run(values, kv_heads * value_stride, page, kv_head * value_stride);
            let scores = &scores[kv_head * per_head * visible + page * page_size..];
            let (mut head, most) = (0, F::BLOCKS / BLOCKS);
            while head < per_head {
                let (scores, out) = (&scores[head * visible..], &mut out[head * value_dim..]);
                head += match per_head - head {
                    4.. if most >= 4 => add_weighted::<F, 4>(scores, visible, values, value_dim, out),
                    2.. if most >= 2 => add_weighted::<F, 2>(scores, visible, values, value_dim, out),
                    _ => add_weighted::<F, 1>(scores, visible, values, value_dim, out),
                };
            }
        }
    }
}

/// Products of several queries with the same keys; their scores begin `apart` from each other.
#[inline(always)]
fn products<F: Fuse, const DIM: usize>(queries: &[f32], keys: Run<'_>, scale: f32, scores: &mut [f32], apart: usize) {
    for (token, key) in keys.tokens(DIM).enumerate() {
        let key = key.first_chunk::<DIM>().expect("a key is as long as it is");
        for (head, query) in queries.as_chunks::<DIM>().0.iter().enumerate() {
            scores[head * apart + token] = dot::<F>(query, key) * scale;
        }
    }
}

/// Blocks of a value that are summed at a time, for several heads: as many sums as stay in registers, and enough of them that none waits
/// for its last addition.
const BLOCKS: usize = 4;

/// `out` += the sum of score x value, for so many heads; their scores begin `apart` from each other. Returns how many.
#[inline(always)]
fn add_weighted<F: Fuse, const HEADS: usize>(
    scores: &[f32],
    apart: usize,
    values: Run<'_>,
    width: usize,
    out: &mut [f32],
) -> usize {
    let scores: [&[f32]; HEADS] = std::array::from_fn(|head| &scores[head * apart..][..values.tokens]);
    let mut from = 0;
    while width - from >= BLOCKS * LANES {
        add_blocks::<F, HEADS, BLOCKS>(scores, values, width, from, out);
        from += BLOCKS * LANES;
    }
    while width - from >= LANES {
        add_blocks::<F, HEADS, 1>(scores, values, width, from, out);
        from += LANES;
    }
    for (scores, out) in scores.iter().zip(out.chunks_mut(width)) {
        for (score, value) in scores.iter().zip(values.tokens(width)) {
            for (out, value) in out[from..].iter_mut().zip(&value[from..]) {
                *out = F::fuse(*score, *value, *out);
            }
        }
    }
    HEADS
}

/// The same, of the numbers from `from` on.
#[inline(always)]
fn add_blocks<F: Fuse, const HEADS: usize, const MANY: usize>(
    scores: [&[f32]; HEADS],
    values: Run<'_>,
    width: usize,
    from: usize,
    out: &mut [f32],
) {
    let mut sums = [[F::Block::zero(); MANY]; HEADS];
    for (token, value) in values.tokens(width).enumerate() {
        let value = value[from..].as_chunks::<LANES>().0.first_chunk::<MANY>().expect("as wide as a value");
        for block in 0..MANY {
            let value = F::Block::of(&value[block]);
            for head in 0..HEADS {
                sums[head][block] = sums[head][block].plus(scores[head][token], value);
            }
        }
    }
    for (sums, out) in sums.iter().zip(out.chunks_mut(width)) {
        let out = out[from..].as_chunks_mut::<LANES>().0;
        for (sum, out) in sums.iter().zip(out) {
            *out = F::Block::of(out).plus(1.0, *sum).numbers();
        }
    }
}
