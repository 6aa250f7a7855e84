//! All layers of a rank's stage in one go, for steps in which every sequence has one token.

use std::sync::Arc;

use crate::layer::{Layer, Step};
use crate::{Ahead, Matrix};

/// A stage's layers, one behind the other.
pub struct Decoder {
    /// In the order in which they are computed. All have heads of the same size, and as many.
    pub layers: Vec<Arc<Layer>>,
    /// Tokens of a page of the pool.
    pub page_size: usize,
}

/// The tokens of a step, one of each sequence.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// The sequences' rows in the page table.
    pub rows: &'a [i32],
    /// How many tokens of each are stored before: the place of the new one.
    pub starts: &'a [i32],
}

/// What a stage reads beside its weights, and writes.
pub struct Memory<'a> {
    /// \[positions, numbers of a head\]
    pub cos: &'a [f32],
    /// The same, with the signs that [`crate::rotate`] wants.
    pub sin: &'a [f32],
    /// \[rows, pages\]
    pub page_table: &'a [i64],
    /// Pages of a row.
    pub pages_per_row: usize,
    /// \[layers, 2, slots, KV heads, numbers of a head\]: keys, then values.
    pub pool: &'a mut [f32],
}

/// What the layers have in common in a step. Kept from step to step.
#[derive(Default)]
pub struct Places {
    cos: Vec<f32>,
    sin: Vec<f32>,
    slots: Vec<i64>,
    rows: Vec<i64>,
    visible: Vec<i64>,
}

impl Decoder {
    /// The matrix that is read first.
    #[must_use]
    pub fn first(&self) -> Option<&Matrix> {
        self.layers.first().map(|layer| &*layer.qkv)
    }

    /// `x`, \[tokens, hidden\], becomes what it is after the last layer. `sum`: see [`Layer::decode`].
    ///
    /// # Errors
    /// What `sum` returns.
    ///
    /// # Panics
    /// If the sizes do not fit, or a token stands beyond the tables.
    pub fn decode<E>(
        &self,
        x: &mut [f32],
        tokens: Tokens<'_>,
        memory: &mut Memory<'_>,
        places: &mut Places,
        threads: usize,
        mut sum: impl FnMut(&mut [f32], Option<Ahead<'_>>) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(first) = self.layers.first() else { return Ok(()) };
        places.find(tokens, memory, first.head_dim, self.page_size);
        let step = Step {
            cos: &places.cos,
            sin: &places.sin,
            slots: &places.slots,
            rows: &places.rows,
            visible: &places.visible,
            page_table: memory.page_table,
            pages_per_row: memory.pages_per_row,
            page_size: self.page_size,
            threads,
        };
        let of_layer = memory.pool.len() / self.layers.len();
        for (number, (layer, pool)) in self.layers.iter().zip(memory.pool.chunks_exact_mut(of_layer)).enumerate() {
            let (keys, values) = pool.split_at_mut(of_layer / 2);
            let behind = self.layers.get(number + 1).map(|next| &*next.qkv);
            layer.decode(x, keys, values, step, behind, &mut sum)?;
        }
        Ok(())
    }
}

impl Places {
    fn find(&mut self, tokens: Tokens<'_>, memory: &Memory<'_>, dim: usize, page_size: usize) {
        let Self { cos, sin, slots, rows, visible } = self;
        [&mut *cos, &mut *sin].into_iter().for_each(Vec::clear);
        [&mut *slots, &mut *rows, &mut *visible].into_iter().for_each(Vec::clear);
        for (&row, &start) in tokens.rows.iter().zip(tokens.starts) {
            let at = usize::try_from(start).expect("a place in a sequence");
            let pages = &memory.page_table[row as usize * memory.pages_per_row..][..memory.pages_per_row];
            slots.push(pages[at / page_size] * page_size as i64 + (at % page_size) as i64);
            rows.push(row.into());
            visible.push(i64::from(start) + 1);
            cos.extend_from_slice(&memory.cos[at * dim..][..dim]);
            sin.extend_from_slice(&memory.sin[at * dim..][..dim]);
        }
    }
}
