//! A stage's weights, and steps in which every token decodes, from ids to logits.
#![allow(unsafe_code, reason = "memory of tensors, by address")]
#![allow(clippy::too_many_arguments, reason = "a model takes what it takes")]

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use cpu_kernels::{Ahead, Bfloat16, Decoder, Layer, Matrix, Memory, Places, Tokens, rows_of};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rank_comm::{CommError, Dtype, Group};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::comm::{PyGroup, raised};
use crate::end::{End, bytes_of};
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
    /// What this rank, then what everybody says of the likeliest tokens.
    said: [Vec<u64>; 2],
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
            said: Default::default(),
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

    #[pyo3(signature = (ids, rows, starts, stop_ids, steps, seconds, x, threads, group, messages))]
    fn decode_on(
        &mut self,
        py: Python<'_>,
        ids: PyBuffer<i64>,
        rows: PyBuffer<i32>,
        starts: PyBuffer<i32>,
        stop_ids: PyBuffer<i64>,
        steps: usize,
        seconds: f64,
        x: usize,
        threads: usize,
        mut group: Option<PyRefMut<'_, PyGroup>>,
        messages: Option<RawFd>,
    ) -> PyResult<Vec<i64>> {
        let (ids, rows, starts) = (ids.to_vec(py)?, rows.to_vec(py)?, starts.to_vec(py)?);
        let whole = self.embedding.is_some() && self.end.is_some();
        if ids.is_empty() || ids.len() != rows.len() || ids.len() != starts.len() || !whole {
            return Err(PyValueError::new_err("there is one token of each sequence, and all of the model is here"));
        }
        let run = Run { stop_ids: stop_ids.to_vec(py)?, steps, seconds, messages };
        let group = group.as_mut().map(|group| &mut group.0);
        py.detach(|| self.decode_steps(ids, &rows, starts, &run, x, threads, group)).map_err(raised)
    }
}

/// How far steps go on without being told to.
struct Run {
    /// A token among these ends it.
    stop_ids: Vec<i64>,
    /// So many at most.
    steps: usize,
    /// Within so many.
    seconds: f64,
    /// Something to be read there ends it, too: somebody new waits, or wants no more. Only one rank has it.
    messages: Option<RawFd>,
}

impl Run {
    /// Whether this rank wants another one after so many steps.
    fn goes_on(&self, steps: usize, begin: Instant) -> bool {
        let per_step = begin.elapsed().as_secs_f64() / steps as f64;
        steps < self.steps && per_step * (steps + 1) as f64 <= self.seconds && !self.is_interrupted()
    }

    fn is_interrupted(&self) -> bool {
        self.messages.is_some_and(|fd| {
            // SAFETY: the caller keeps it open during the call.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
        })
    }
}

impl PyDecoder {
    /// Step after step, each with the likeliest tokens of the one before. The tokens of all, one step behind the other.
    fn decode_steps(
        &mut self,
        mut ids: Vec<i64>,
        rows: &[i32],
        mut starts: Vec<i32>,
        run: &Run,
        x: usize,
        threads: usize,
        mut group: Option<&mut Group>,
    ) -> Result<Vec<i64>, CommError> {
        let (count, begin) = (ids.len(), Instant::now());
        let mut drawn = Vec::with_capacity(run.steps * count);
        loop {
            self.run_layers(&ids, Tokens { rows, starts: &starts }, x, threads, group.as_deref_mut())?;
            let x = unsafe { numbers_mut(x, count * self.hidden) };
            let end = self.end.as_ref().expect("looked at before");
            let wanted = run.goes_on(drawn.len() / count + 1, begin);
            let (scratch, said) = (&mut self.scratch, &mut self.said);
            let more = end.likeliest(x, &mut ids, wanted, threads, scratch, said, group.as_deref_mut())?;
            drawn.extend_from_slice(&ids);
            if !more || ids.iter().any(|id| run.stop_ids.contains(id)) {
                return Ok(drawn);
            }
            starts.iter_mut().for_each(|start| *start += 1);
        }
    }

    fn decode_tokens(
        &mut self,
        ids: &[i64],
        tokens: Tokens<'_>,
        x: usize,
        out: Option<usize>,
        threads: usize,
        mut group: Option<&mut Group>,
    ) -> Result<(), CommError> {
        self.run_layers(ids, tokens, x, threads, group.as_deref_mut())?;
        let Some(end) = &self.end else { return Ok(()) };
        let x = unsafe { numbers_mut(x, ids.len() * self.hidden) };
        let count = ids.len() * end.widths.iter().sum::<usize>();
        let out = out.map(|out| unsafe { numbers_mut(out, count) });
        end.logits(x, ids.len(), out, threads, &mut self.scratch, group)
    }

    /// What stands in front of the layers, and those.
    fn run_layers(
        &mut self,
        ids: &[i64],
        tokens: Tokens<'_>,
        x: usize,
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
        self.decoder.decode(x, tokens, &mut memory, &mut self.places, threads, &mut sum)
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

fn sum_of_ranks(group: &mut Group, part: &mut [f32], mut ahead: Option<Ahead<'_>>) -> Result<(), CommError> {
    let mut more = || ahead.as_mut().is_some_and(Ahead::more);
    group.all_reduce_meanwhile(bytes_of(part), Dtype::Float32, &mut more)
}

pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyMatrix>()?;
    module.add_class::<PyLayer>()?;
    module.add_class::<PyDecoder>()
}
