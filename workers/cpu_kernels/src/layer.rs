//! A decoder layer's decode step, from vectors to vectors.

use std::cell::RefCell;
use std::sync::Arc;

use crate::{Ahead, Cached, Matrix, Queries, add_and_norm, attend, norm_heads, rotate, silu_and_multiply, store};

/// Pre-norm attention with rotary positions, then a gated MLP: a rank's part of both.
pub struct Layer {
    /// Of the norm before the attention.
    pub attention_norm: Vec<f32>,
    /// To queries, keys and values, side by side.
    pub qkv: Arc<Matrix>,
    /// Of the norms of each head of queries and of keys, in families that have them.
    pub head_norms: Option<(Vec<f32>, Vec<f32>)>,
    /// From what the heads have seen.
    pub output: Arc<Matrix>,
    /// Of the norm before the MLP.
    pub mlp_norm: Vec<f32>,
    /// To gate and up, side by side.
    pub gate_up: Arc<Matrix>,
    /// From the inner numbers.
    pub down: Arc<Matrix>,
    /// Of all norms.
    pub eps: f32,
    /// What products of queries and keys are multiplied with.
    pub scale: f32,
    /// Query heads of this rank.
    pub heads: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
}

/// Where the tokens of a step are, one of each sequence: the same for all layers.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// See [`rotate`].
    pub cos: &'a [f32],
    /// See [`rotate`].
    pub sin: &'a [f32],
    /// Per token, where its key and value go.
    pub slots: &'a [i64],
    /// Per token, its sequence's row in the page table.
    pub rows: &'a [i64],
    /// Per token, how many it sees, itself included.
    pub visible: &'a [i64],
    /// See [`Cached`].
    pub page_table: &'a [i64],
    /// See [`Cached`].
    pub pages_per_row: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// To compute on.
    pub threads: usize,
}

thread_local! {
    /// What lies between the first and the last operation. Kept from call to call.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Layer {
    /// `x`, \[tokens, hidden\], becomes what it is after the layer. `keys` and `values`: the layer's pool. `sum` makes of a rank's part of a
    /// vector the sum of all ranks', twice; while it waits for them it can read the weights that are used next. `behind`: what those
    /// are behind this layer.
    ///
    /// # Errors
    /// What `sum` returns.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn decode<E>(
        &self,
        x: &mut [f32],
        keys: &mut [f32],
        values: &mut [f32],
        step: Step<'_>,
        behind: Option<&Matrix>,
        mut sum: impl FnMut(&mut [f32], Option<Ahead<'_>>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Self { head_dim: dim, heads, kv_heads, eps, scale, .. } = *self;
        let tokens = step.slots.len();
        let (query_width, kv_width, inner) = (heads * dim, kv_heads * dim, self.down.inputs());
        let width = query_width + 2 * kv_width;
        assert_eq!(x.len(), tokens * self.attention_norm.len());
        let sizes = [x.len(), tokens * width.max(2 * inner), tokens * query_width.max(inner), x.len()];
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(scratch.len().max(sizes.iter().sum()), 0.0);
            let (normed, rest) = scratch.split_at_mut(sizes[0]);
            let (wide, rest) = rest.split_at_mut(sizes[1]);
            let (narrow, rest) = rest.split_at_mut(sizes[2]);
            let part = &mut rest[..sizes[3]];

            let (qkv, seen) = (&mut wide[..tokens * width], &mut narrow[..tokens * query_width]);
            add_and_norm(x, &[], &self.attention_norm, eps, normed);
            self.qkv.multiply(normed, qkv, step.threads);
            if let Some((of_queries, of_keys)) = &self.head_norms {
                norm_heads(qkv, width, heads, of_queries, eps);
                norm_heads(&mut qkv[query_width..], width, kv_heads, of_keys, eps);
            }
            rotate(qkv, width, heads + kv_heads, dim, step.cos, step.sin);
            store(&qkv[query_width..], width, kv_width, step.slots, keys);
            store(&qkv[query_width + kv_width..], width, kv_width, step.slots, values);
            let Step { rows, visible, page_table, pages_per_row, page_size, .. } = step;
            attend(
                Queries { numbers: qkv, stride: width, heads, rows, visible, scale },
                Cached {
                    keys,
                    values,
                    heads: kv_heads,
                    key_dim: dim,
                    value_stride: dim,
                    value_dim: dim,
                    page_size,
                    page_table,
                    pages_per_row,
                },
                seen,
                step.threads,
            );
            self.output.multiply(seen, part, step.threads);
            sum(part, Some(self.gate_up.ahead()))?;

            let (gate_up, inner) = (&mut wide[..2 * tokens * inner], &mut narrow[..tokens * inner]);
            add_and_norm(x, part, &self.mlp_norm, eps, normed);
            self.gate_up.multiply(normed, gate_up, step.threads);
            silu_and_multiply(gate_up, inner, self.down.inputs());
            self.down.multiply(inner, part, step.threads);
            sum(part, behind.map(Matrix::ahead))?;
            x.iter_mut().zip(part).for_each(|(x, part)| *x += *part);
            Ok(())
        })
    }
}
