//! A layer against its operations, one after the other, which `kernels.rs` holds against plain loops.
#![allow(missing_docs, reason = "tests")]

use std::sync::Arc;

use cpu_kernels::{
    Cached, Layer, Matrix, Queries, Step, add_and_norm, attend, norm_heads, rotate, silu_and_multiply, store,
};

const HIDDEN: usize = 24;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 8;
const INNER: usize = 40;
const PAGE: usize = 4;
const TOKENS: usize = 3;
const WIDTH: usize = (HEADS + 2 * KV_HEADS) * DIM;

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + seed * 104_729 + i * i * 31) % 1999) as f32 / 1000.0 - 1.0).collect()
}

fn matrix(outputs: usize, inputs: usize, seed: usize) -> Arc<Matrix> {
    Arc::new(Matrix::new(&numbers(outputs * inputs, seed), inputs, &numbers(outputs, seed + 50)))
}

fn layer(normed_heads: bool) -> Layer {
    Layer {
        attention_norm: numbers(HIDDEN, 1),
        qkv: matrix(WIDTH, HIDDEN, 2),
        head_norms: normed_heads.then(|| (numbers(DIM, 3), numbers(DIM, 4))),
        output: matrix(HIDDEN, HEADS * DIM, 5),
        mlp_norm: numbers(HIDDEN, 6),
        gate_up: matrix(2 * INNER, HIDDEN, 7),
        down: matrix(HIDDEN, INNER, 8),
        eps: 1e-5,
        scale: 0.35,
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: DIM,
    }
}

struct Place {
    cos: Vec<f32>,
    sin: Vec<f32>,
    page_table: Vec<i64>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

const SLOTS: [i64; TOKENS] = [6, 8, 15];
const ROWS: [i64; TOKENS] = [1, 0, 2];
const VISIBLE: [i64; TOKENS] = [7, 1, 4];

fn place() -> Place {
    let pool = 5 * PAGE * KV_HEADS * DIM;
    let page_table = vec![2, 0, 4, 1, 3, 0];
    Place {
        cos: numbers(TOKENS * DIM, 9),
        sin: numbers(TOKENS * DIM, 10),
        page_table,
        keys: numbers(pool, 11),
        values: numbers(pool, 12),
    }
}

impl Place {
    fn step(&self) -> Step<'_> {
        let Self { cos, sin, page_table, .. } = self;
        let (slots, rows, visible) = (&SLOTS, &ROWS, &VISIBLE);
        Step { cos, sin, slots, rows, visible, page_table, pages_per_row: 2, page_size: PAGE, threads: 1 }
    }
}

/// As another rank's part would change it.
fn sum(part: &mut [f32]) {
    part.iter_mut().for_each(|number| *number *= 1.5);
}

fn by_operations(layer: &Layer, x: &mut [f32], place: &mut Place) {
    let (mut normed, mut qkv) = (vec![0.0; x.len()], vec![0.0; TOKENS * WIDTH]);
    let (mut seen, mut part) = (vec![0.0; TOKENS * HEADS * DIM], vec![0.0; x.len()]);
    add_and_norm(x, &[], &layer.attention_norm, layer.eps, &mut normed);
    layer.qkv.multiply(&normed, &mut qkv, 1);
    if let Some((of_queries, of_keys)) = &layer.head_norms {
        norm_heads(&mut qkv, WIDTH, HEADS, of_queries, layer.eps);
        norm_heads(&mut qkv[HEADS * DIM..], WIDTH, KV_HEADS, of_keys, layer.eps);
    }
    rotate(&mut qkv, WIDTH, HEADS + KV_HEADS, DIM, &place.cos, &place.sin);
    store(&qkv[HEADS * DIM..], WIDTH, KV_HEADS * DIM, &SLOTS, &mut place.keys);
    store(&qkv[(HEADS + KV_HEADS) * DIM..], WIDTH, KV_HEADS * DIM, &SLOTS, &mut place.values);
    let cached = Cached {
        keys: &place.keys,
        values: &place.values,
        heads: KV_HEADS,
        key_dim: DIM,
        value_stride: DIM,
        value_dim: DIM,
        page_size: PAGE,
        page_table: &place.page_table,
        pages_per_row: 2,
    };
    let queries =
        Queries { numbers: &qkv, stride: WIDTH, heads: HEADS, rows: &ROWS, visible: &VISIBLE, scale: layer.scale };
    attend(queries, cached, &mut seen, 1);
    layer.output.multiply(&seen, &mut part, 1);
    sum(&mut part);
    let (mut gate_up, mut inner) = (vec![0.0; TOKENS * 2 * INNER], vec![0.0; TOKENS * INNER]);
    add_and_norm(x, &part, &layer.mlp_norm, layer.eps, &mut normed);
    layer.gate_up.multiply(&normed, &mut gate_up, 1);
    silu_and_multiply(&gate_up, &mut inner, INNER);
    layer.down.multiply(&inner, &mut part, 1);
    sum(&mut part);
    x.iter_mut().zip(&part).for_each(|(x, part)| *x += part);
}

#[test]
fn a_layer_has_the_bits_of_its_operations() {
    for normed_heads in [false, true] {
        let layer = layer(normed_heads);
        let (mut x, mut y, mut ours, mut theirs) =
            (numbers(TOKENS * HIDDEN, 13), numbers(TOKENS * HIDDEN, 13), place(), place());
        // Twice: the second time over what the first has stored and left in the scratch memory.
        for _ in 0..2 {
            let (mut keys, mut values) = (ours.keys.clone(), ours.values.clone());
            let mut sums = 0;
            let done: Result<(), ()> = layer.decode(&mut x, &mut keys, &mut values, ours.step(), None, |part, _| {
                sums += 1;
                sum(part);
                Ok(())
            });
            (ours.keys, ours.values) = (keys, values);
            assert_eq!((done, sums), (Ok(()), 2));
            by_operations(&layer, &mut y, &mut theirs);
            assert_eq!((&x, &ours.keys, &ours.values), (&y, &theirs.keys, &theirs.values));
        }
    }
}

#[test]
fn a_sum_that_fails_is_the_last_thing_done() {
    let (layer, place, mut x) = (layer(false), place(), numbers(TOKENS * HIDDEN, 13));
    let (mut keys, mut values) = (place.keys.clone(), place.values.clone());
    for failing in [1, 2] {
        let mut sums = 0;
        let done = layer.decode(&mut x, &mut keys, &mut values, place.step(), None, |_, _| {
            sums += 1;
            if sums == failing { Err("gone") } else { Ok(()) }
        });
        assert_eq!((done, sums), (Err("gone"), failing));
    }
}
