//! Kernels. All are for float32; sizes are checked in Python, by tensor, before an address is taken.
#![allow(unsafe_code, reason = "memory of tensors, by address")]
#![allow(clippy::too_many_arguments, reason = "kernels take what they take")]

use cpu_kernels::{Bfloat16, Cached, Queries};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;

use crate::memory::{numbers, numbers_mut};

// SAFETY, of all functions here: the caller's tensors are float32 (or int64), contiguous where their size says so, live during the call,
// and are not used by anybody else: the engine computes on one thread, and the one for collectives in the background has tensors of its own.

/// x += delta (0: nothing); out = norm of x.
#[pyfunction]
fn add_and_norm(x: usize, delta: usize, weight: usize, out: usize, rows: usize, width: usize, eps: f32) {
    let count = rows * width;
    let added = if delta == 0 { 0 } else { count };
    unsafe {
        cpu_kernels::add_and_norm(
            numbers_mut(x, count),
            numbers(delta, added),
            numbers(weight, width),
            eps,
            numbers_mut(out, count),
        );
    }
}

#[pyfunction]
fn norm_heads(x: usize, rows: usize, stride: usize, heads: usize, weight: usize, width: usize, eps: f32) {
    unsafe {
        cpu_kernels::norm_heads(
            numbers_mut(x, span(rows, stride, heads * width)),
            stride,
            heads,
            numbers(weight, width),
            eps,
        )
    }
}

#[pyfunction]
fn rotate(x: usize, rows: usize, stride: usize, heads: usize, dim: usize, cos: usize, sin: usize) {
    unsafe {
        let (cos, sin) = (numbers(cos, rows * dim), numbers(sin, rows * dim));
        cpu_kernels::rotate(numbers_mut(x, span(rows, stride, heads * dim)), stride, heads, dim, cos, sin);
    }
}

#[pyfunction]
fn store(x: usize, rows: usize, stride: usize, width: usize, slots: usize, pool: usize, pool_slots: usize) {
    unsafe {
        let x = numbers(x, span(rows, stride, width));
        cpu_kernels::store(x, stride, width, numbers(slots, rows), numbers_mut(pool, pool_slots * width));
    }
}

#[pyfunction]
fn rows_of(weight: usize, rows: usize, width: usize, first: i64, ids: usize, count: usize, out: usize, bfloat16: bool) {
    unsafe {
        let (ids, out) = (numbers(ids, count), numbers_mut(out, count * width));
        if bfloat16 {
            cpu_kernels::rows_of::<Bfloat16>(numbers(weight, rows * width), width, first, ids, out);
        } else {
            cpu_kernels::rows_of::<f32>(numbers(weight, rows * width), width, first, ids, out);
        }
    }
}

#[pyfunction]
fn likeliest(py: Python<'_>, logits: usize, rows: usize, width: usize, out: PyBuffer<i64>) -> PyResult<()> {
    let logits = unsafe { numbers(logits, rows * width) };
    let place = |row| cpu_kernels::place_of_largest(row) as i64;
    let found: Vec<i64> = py.detach(|| logits.chunks_exact(width).map(place).collect());
    out.copy_from_slice(py, &found)
}

#[pyfunction]
fn silu_and_multiply(x: usize, out: usize, rows: usize, width: usize) {
    unsafe { cpu_kernels::silu_and_multiply(numbers(x, 2 * rows * width), numbers_mut(out, rows * width), width) }
}

#[pyfunction]
fn products_are_fast() -> bool {
    cpu_kernels::products_are_fast()
}

/// `queries`: address, tokens, stride, heads. `pool`: addresses of keys and values, slots, heads, key dim, value stride, value dim, page
/// size. `table`: address, rows, columns.
#[pyfunction]
fn attend(
    py: Python<'_>,
    queries: (usize, usize, usize, usize),
    pool: (usize, usize, usize, usize, usize, usize, usize, usize),
    table: (usize, usize, usize),
    rows: usize,
    visible: usize,
    scale: f32,
    out: usize,
    threads: usize,
) {
    let (query, count, stride, heads) = queries;
    let (keys, values, slots, kv_heads, key_dim, value_stride, value_dim, page_size) = pool;
    let (page_table, table_rows, pages_per_row) = table;
    py.detach(|| unsafe {
        let queries = Queries {
            numbers: numbers(query, span(count, stride, heads * key_dim)),
            stride,
            heads,
            rows: numbers(rows, count),
            visible: numbers(visible, count),
            scale,
        };
        let cached = Cached {
            keys: numbers(keys, slots * kv_heads * key_dim),
            values: numbers(values, slots * kv_heads * value_stride),
            heads: kv_heads,
            key_dim,
            value_stride,
            value_dim,
            page_size,
            page_table: numbers(page_table, table_rows * pages_per_row),
            pages_per_row,
        };
        cpu_kernels::attend(queries, cached, numbers_mut(out, count * heads * value_dim), threads);
    });
}

/// Numbers from the first row's beginning to the last one's end.
fn span(rows: usize, stride: usize, width: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1) * stride + width }
}

pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(add_and_norm, module)?)?;
    module.add_function(wrap_pyfunction!(norm_heads, module)?)?;
    module.add_function(wrap_pyfunction!(rotate, module)?)?;
    module.add_function(wrap_pyfunction!(store, module)?)?;
    module.add_function(wrap_pyfunction!(rows_of, module)?)?;
    module.add_function(wrap_pyfunction!(likeliest, module)?)?;
    module.add_function(wrap_pyfunction!(silu_and_multiply, module)?)?;
    module.add_function(wrap_pyfunction!(products_are_fast, module)?)?;
    module.add_function(wrap_pyfunction!(attend, module)?)
}
