//! A stage's weights, and steps in which every token decodes, from ids to logits.
#![allow(unsafe_code, reason = "memory of tensors, by address")]
#![allow(clippy::too_many_arguments, reason = "a model takes what it takes")]

use std::sync::Arc;

use cpu_kernels::{Ahead, Bfloat16, Decoder, Layer, Matrix, Memory, Places, Tokens, add_and_norm, rows_of};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rank_comm::{CommError, Dtype, Group, Op};

use crate::comm::{PyGroup, raised};
use crate::memory::{numbers, numbers_mut};

// SAFETY, of all here: the caller's tensors are float32 unless it says so, contiguous, live as long as what was made of their addresses, and
// are not used by anybody else during a call.

#[pyclass(frozen, name = "Matrix", module = "warmroute_worker._native")]
pub(crate) struct PyMatrix(Arc<Matrix>);

#[pymethods]
impl PyMatrix {
    #[new]
    fn new(weight: usize, outputs: usize, inputs: usize, bias: usize, bfloat16: bool) -> Self {
        let (count, biases) = (outputs * inputs, if bias == 0 { 0 } else { outputs });
        Self(Arc::new(unsafe {
            let bias = numbers(bias, biases);
            if bfloat16 {
                Matrix::new::<Bfloat16>(numbers(weight, count), inputs, bias)
            } else {
                Matrix::new::<f32>(numbers(weight, count), inputs, bias)
            }
        }))
    }

    fn multiply(&self, py: Python<'_>, x: usize, rows: usize, out: usize, threads: usize) {
        let matrix = &self.0;
        py.detach(|| unsafe {
            matrix.multiply(numbers(x, rows * matrix.inputs()), numbers_mut(out, rows * matrix.outputs()), threads);
        });
    }
}

#[pyclass(frozen, name = "Layer", module = "warmroute_worker._native")]
pub(crate) struct PyLayer(Arc<Layer>);

#[pymethods]
impl PyLayer {
    #[new]
    #[pyo3(signature = (matrices, norms, head_norms, eps, scale, heads))]
    fn new(
        matrices: [PyRef<'_, PyMatrix>; 4],
        norms: (Vec<f32>, Vec<f32>),
        head_norms: Option<(Vec<f32>, Vec<f32>)>,
        eps: f32,
        scale: f32,
        heads: (usize, usize, usize),
    ) -> Self {
        let [qkv, output, gate_up, down] = matrices.map(|matrix| Arc::clone(&matrix.0));
        let (attention_norm, mlp_norm) = norms;
        let (heads, kv_heads, head_dim) = heads;
        Self(Arc::new(Layer {
            attention_norm,
            qkv,
            head_norms,
            output,
            mlp_norm,
            gate_up,
            down,
            eps,
            scale,
            heads,
            kv_heads,
            head_dim,
        }))
    }
}

/// Where token ids become vectors.
struct Embedding {
    weight: usize,
    rows: usize,
    /// The number of the first row.
    first: i64,
    bfloat16: bool,
}

/// Where vectors become logits.
struct End {
    norm: Vec<f32>,
    eps: f32,
    head: Arc<Matrix>,
    /// Logits that each rank makes.
    widths: Vec<usize>,
}

/// Of the norm its weight and epsilon, the head, and the logits that each rank makes.
type PyEnd<'py> = (Vec<f32>, f32, PyRef<'py, PyMatrix>, Vec<usize>);

#[pyclass(name = "Decoder", module = "warmroute_worker._native")]
pub(crate) struct PyDecoder {
    decoder: Decoder,
    hidden: usize,
    embedding: Option<Embedding>,
    end: Option<End>,
    /// Addresses of cos and sin, and their positions.
    turns: (usize, usize, usize),
    /// Address, rows, columns.
    table: (usize, usize, usize),
    /// Address, numbers.
    pool: (usize, usize),
    places: Places,
    /// The vectors behind the last norm, then this rank's logits, then everybody's.
    scratch: [Vec<f32>; 3],
}

#[pymethods]
impl PyDecoder {
    #[new]
    #[pyo3(signature = (layers, hidden, embedding, end, turns, table, page_size, pool))]
    fn new(
        layers: Vec<PyRef<'_, PyLayer>>,
        hidden: usize,
        embedding: Option<(usize, usize, i64, bool)>,
        end: Option<PyEnd<'_>>,
        turns: (usize, usize, usize),
        table: (usize, usize, usize),
        page_size: usize,
        pool: (usize, usize),
    ) -> Self {
        let layers = layers.iter().map(|layer| Arc::clone(&layer.0)).collect();
        Self {
            decoder: Decoder { layers, page_size },
            hidden,
            embedding: embedding.map(|(weight, rows, first, bfloat16)| Embedding { weight, rows, first, bfloat16 }),
            end: end.map(|(norm, eps, head, widths)| End { norm, eps, head: Arc::clone(&head.0), widths }),
            turns,
            table,
            pool,
            places: Places::default(),
            scratch: Default::default(),
        }
    }

    #[pyo3(signature = (ids, rows, starts, x, out, threads, group))]
    fn decode(
        &mut self,
        py: Python<'_>,
        ids: PyBuffer<i64>,
        rows: PyBuffer<i32>,
        starts: PyBuffer<i32>,
        x: usize,
        out: Option<usize>,
        threads: usize,
        mut group: Option<PyRefMut<'_, PyGroup>>,
    ) -> PyResult<()> {
        let (ids, rows, starts) = (ids.to_vec(py)?, rows.to_vec(py)?, starts.to_vec(py)?);
        if ids.len() != rows.len() || ids.len() != starts.len() {
            return Err(PyValueError::new_err("there is one token of each sequence"));
        }
        let group = group.as_mut().map(|group| &mut group.0);
        py.detach(|| self.decode_tokens(&ids, Tokens { rows: &rows, starts: &starts }, x, out, threads, group))
            .map_err(raised)
    }
}

impl PyDecoder {
    fn decode_tokens(
        &mut self,
        ids: &[i64],
        tokens: Tokens<'_>,
        x: usize,
        out: Option<usize>,
        threads: usize,
        mut group: Option<&mut Group>,
    ) -> Result<(), CommError> {
        let x = unsafe { numbers_mut(x, ids.len() * self.hidden) };
        let mut sum = |part: &mut [f32], ahead: Option<Ahead<'_>>| match &mut group {
            Some(group) => sum_of_ranks(group, part, ahead),
            None => Ok(()),
        };
        if let Some(embedding) = &self.embedding {
            embedding.look_up(ids, self.hidden, x);
            sum(x, self.decoder.first().map(Matrix::ahead))?;
        }
        let ((cos, sin, positions), (table, rows, columns)) = (self.turns, self.table);
        let numbers_of_turn = positions * self.decoder.layers.first().map_or(0, |layer| layer.head_dim);
        let mut memory = unsafe {
            Memory {
                cos: numbers(cos, numbers_of_turn),
                sin: numbers(sin, numbers_of_turn),
                page_table: numbers(table, rows * columns),
                pages_per_row: columns,
                pool: numbers_mut(self.pool.0, self.pool.1),
            }
        };
        self.decoder.decode(x, tokens, &mut memory, &mut self.places, threads, &mut sum)?;
        let Some(end) = &self.end else { return Ok(()) };
        let count = ids.len() * end.widths.iter().sum::<usize>();
        let out = out.map(|out| unsafe { numbers_mut(out, count) });
        end.logits(x, ids.len(), out, threads, &mut self.scratch, group)
    }
}

impl Embedding {
    fn look_up(&self, ids: &[i64], width: usize, out: &mut [f32]) {
        let count = self.rows * width;
        unsafe {
            if self.bfloat16 {
                rows_of::<Bfloat16>(numbers(self.weight, count), width, self.first, ids, out);
            } else {
                rows_of::<f32>(numbers(self.weight, count), width, self.first, ids, out);
            }
        }
    }
}

impl End {
    /// `out`: \[tokens, logits of all ranks\], where they are wanted.
    fn logits(
        &self,
        x: &mut [f32],
        tokens: usize,
        out: Option<&mut [f32]>,
        threads: usize,
        scratch: &mut [Vec<f32>; 3],
        group: Option<&mut Group>,
    ) -> Result<(), CommError> {
        let [normed, own, all] = scratch;
        normed.resize(x.len(), 0.0);
        add_and_norm(x, &[], &self.norm, self.eps, normed);
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
}

fn sum_of_ranks(group: &mut Group, part: &mut [f32], mut ahead: Option<Ahead<'_>>) -> Result<(), CommError> {
    let mut more = || ahead.as_mut().is_some_and(Ahead::more);
    group.all_reduce_meanwhile(bytes_of(part), Dtype::Float32, &mut more)
}

fn bytes_of(numbers: &mut [f32]) -> &mut [u8] {
    // SAFETY: every byte of a number is one, and every four bytes are a number.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyMatrix>()?;
    module.add_class::<PyLayer>()?;
    module.add_class::<PyDecoder>()
}
