//! Attention of single queries over pages: each looks at the first so many tokens of its sequence.

use std::cell::RefCell;

use rayon::prelude::*;

use crate::simd::{Fuse, dot, exp, kernel, largest, prefetch, sum};

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

/// Page by page, all heads of it: a page is one piece of memory, which comes from far the first time and is near for the other heads.
#[inline(always)]
fn attend_query<F: Fuse>(
    queries: Queries<'_>,
    cached: Cached<'_>,
    index: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let Cached { heads: kv_heads, key_dim, value_stride, value_dim, page_size, .. } = cached;
    let visible = queries.visible[index] as usize;
    let row = queries.rows[index] as usize * cached.pages_per_row;
    let pages = &cached.page_table[row..][..visible.div_ceil(page_size)];
    let per_head = queries.heads / kv_heads;
    let query = &queries.numbers[index * queries.stride..][..queries.heads * key_dim];
    scores.resize(visible * queries.heads, 0.0);

    let page_of = |numbers: &'_ [f32], width: usize, page: usize| -> (usize, usize, usize) {
        let tokens = page_size.min(visible - page * page_size);
        let first = pages[page] as usize * page_size * width;
        if let Some(&next) = pages.get(page + 1) {
            prefetch(&numbers[next as usize * page_size * width..][..page_size * width]);
        }
        (page * page_size, first, tokens)
    };
    for page in 0..pages.len() {
        let (from, first, tokens) = page_of(cached.keys, kv_heads * key_dim, page);
        let keys = &cached.keys[first..][..tokens * kv_heads * key_dim];
        for (head, query) in query.chunks_exact(key_dim).enumerate() {
            let scores = &mut scores[head * visible + from..][..tokens];
            let (keys, stride) = (&keys[head / per_head * key_dim..], kv_heads * key_dim);
            // The usual sizes by themselves: loops of a known length stay in registers.
            match key_dim {
                32 => products::<F, 32>(query, keys, stride, queries.scale, scores),
                64 => products::<F, 64>(query, keys, stride, queries.scale, scores),
                128 => products::<F, 128>(query, keys, stride, queries.scale, scores),
                _ => {
                    for (score, key) in scores.iter_mut().zip(keys.chunks(stride)) {
                        *score = dot::<F>(query, &key[..key_dim]) * queries.scale;
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
        let factor = 1.0 / sum(scores);
        scores.iter_mut().for_each(|score| *score *= factor);
    }
    out.fill(0.0);
    for page in 0..pages.len() {
        let (from, first, tokens) = page_of(cached.values, kv_heads * value_stride, page);
        let values = &cached.values[first..][..tokens * kv_heads * value_stride];
        for (head, out) in out.chunks_exact_mut(value_dim).enumerate() {
            let scores = &scores[head * visible + from..][..tokens];
            let values = &values[head / per_head * value_stride..];
            for begin in (0..value_dim).step_by(WIDTH) {
                let out = &mut out[begin..(begin + WIDTH).min(value_dim)];
                add_weighted::<F>(scores, &values[begin..], kv_heads * value_stride, out);
            }
        }
    }
}

/// Products of a query with keys that begin `stride` apart.
#[inline(always)]
fn products<F: Fuse, const DIM: usize>(query: &[f32], keys: &[f32], stride: usize, scale: f32, scores: &mut [f32]) {
    let query = query.first_chunk::<DIM>().expect("a query is as long as a key");
    for (score, key) in scores.iter_mut().zip(keys.chunks(stride)) {
        let key = key.first_chunk::<DIM>().expect("a key is as long as it is");
        *score = dot::<F>(query, key) * scale;
    }
}

/// Numbers of a value that are summed at a time: as many as stay in registers.
const WIDTH: usize = 32;

/// `out` += the sum of score x value; values begin `stride` apart.
#[inline(always)]
fn add_weighted<F: Fuse>(scores: &[f32], values: &[f32], stride: usize, out: &mut [f32]) {
    let pairs = scores.iter().zip(values.chunks(stride));
    if let Ok(out) = <&mut [f32; WIDTH]>::try_from(&mut *out) {
        let mut sums = *out;
        for (score, value) in pairs {
            let value = value.first_chunk::<WIDTH>().expect("as wide as a value");
            for lane in 0..WIDTH {
                sums[lane] = F::fuse(*score, value[lane], sums[lane]);
            }
        }
        *out = sums;
        return;
    }
    for (score, value) in pairs {
        for (out, value) in out.iter_mut().zip(value) {
            *out = F::fuse(*score, *value, *out);
        }
    }
}
