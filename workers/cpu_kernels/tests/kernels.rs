//! Each kernel against the same in double precision, written down without any thought of speed.
#![allow(missing_docs, reason = "tests")]

use cpu_kernels::{
    Bfloat16, Cached, Matrix, Queries, add_and_norm, attend, norm_heads, place_of_largest, rotate, silu_and_multiply,
    store,
};

/// Numbers between -1 and 1 that look random.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

fn close(ours: &[f32], exact: &[f64]) {
    assert_eq!(ours.len(), exact.len());
    for (index, (ours, exact)) in ours.iter().zip(exact).enumerate() {
        assert!((f64::from(*ours) - exact).abs() <= 2e-6 * exact.abs().max(1.0), "number {index}: {ours}, not {exact}");
    }
}

fn norm_of(row: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64;
    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
    row.iter().zip(weight).map(|(x, w)| f64::from(*x) * scale * f64::from(*w)).collect()
}

#[test]
fn norms() {
    for width in [1, 7, 16, 64, 100] {
        let (weight, before, delta) = (numbers(width, 1), numbers(3 * width, 2), numbers(3 * width, 3));
        let (mut x, mut out) = (before.clone(), vec![0.0; 3 * width]);
        add_and_norm(&mut x, &[], &weight, 1e-5, &mut out);
        assert_eq!(x, before);
        close(&out, &before.chunks(width).flat_map(|row| norm_of(row, &weight, 1e-5)).collect::<Vec<_>>());
        add_and_norm(&mut x, &delta, &weight, 1e-5, &mut out);
        let sums: Vec<f32> = before.iter().zip(&delta).map(|(a, b)| a + b).collect();
        assert_eq!(x, sums);
        close(&out, &sums.chunks(width).flat_map(|row| norm_of(row, &weight, 1e-5)).collect::<Vec<_>>());
    }
}

#[test]
fn norms_of_heads_leave_the_rest_of_a_row() {
    let (width, stride, weight, before) = (8, 40, numbers(8, 1), numbers(3 * 40, 2));
    let mut x = before.clone();
    norm_heads(&mut x, stride, 2, &weight, 1e-6);
    for (row, before) in x.chunks(stride).zip(before.chunks(stride)) {
        let exact: Vec<f64> = before[..2 * width].chunks(width).flat_map(|head| norm_of(head, &weight, 1e-6)).collect();
        close(&row[..2 * width], &exact);
        assert_eq!(row[2 * width..], before[2 * width..]);
    }
}

#[test]
fn pairs_are_turned() {
    let (dim, stride, rows) = (6, 20, 3);
    let before = numbers(rows * stride, 4);
    let angles: Vec<f32> = numbers(rows * dim / 2, 5);
    let (mut cos, mut sin) = (vec![], vec![]);
    for row in angles.chunks(dim / 2) {
        cos.extend(row.iter().chain(row).map(|angle| angle.cos()));
        sin.extend(row.iter().map(|angle| -angle.sin()).chain(row.iter().map(|angle| angle.sin())));
    }
    let mut x = before.clone();
    rotate(&mut x, stride, 2, dim, &cos, &sin);
    for row in 0..rows {
        for head in 0..2 {
            for i in 0..dim / 2 {
                let at = row * stride + head * dim + i;
                let (a, b, angle) =
                    (f64::from(before[at]), f64::from(before[at + dim / 2]), f64::from(angles[row * dim / 2 + i]));
                close(
                    &[x[at], x[at + dim / 2]],
                    &[a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()],
                );
            }
        }
        assert_eq!(
            x[row * stride + 2 * dim..][..stride - 2 * dim],
            before[row * stride + 2 * dim..][..stride - 2 * dim]
        );
    }
}

#[test]
fn rows_go_where_their_slots_are() {
    let mut pool = vec![0.0; 5 * 3];
    store(&[1.0, 2.0, 3.0, 9.0, 4.0, 5.0, 6.0], 4, 3, &[4, 1], &mut pool);
    assert_eq!(pool, [0., 0., 0., 4., 5., 6., 0., 0., 0., 0., 0., 0., 1., 2., 3.]);
}

#[test]
fn silu_of_the_first_half_times_the_second() {
    for width in [1, 5, 16, 33] {
        let x: Vec<f32> = numbers(2 * 2 * width, 6).iter().map(|x| x * 20.0).collect();
        let mut out = vec![0.0; 2 * width];
        silu_and_multiply(&x, &mut out, width);
        let exact: Vec<f64> = x
            .chunks(2 * width)
            .flat_map(|row| {
                (0..width).map(|i| {
                    let (gate, up) = (f64::from(row[i]), f64::from(row[width + i]));
                    gate / (1.0 + (-gate).exp()) * up
                })
            })
            .collect();
        close(&out, &exact);
    }
}

struct Case {
    heads: usize,
    kv_heads: usize,
    key_dim: usize,
    value_dim: usize,
    lengths: Vec<i64>,
}

const PAGE: usize = 4;

/// Runs a case and checks it; values are the keys' first numbers if `shared`.
fn check(case: &Case, shared: bool, threads: usize) -> Vec<f32> {
    let Case { heads, kv_heads, key_dim, value_dim, lengths } = case;
    let columns = 40;
    let slots = (lengths.len() * columns + 1) * PAGE;
    let keys = numbers(slots * kv_heads * key_dim, 7);
    let value_stride = if shared { *key_dim } else { *value_dim };
    let values = if shared { keys.clone() } else { numbers(slots * kv_heads * value_dim, 8) };
    // Each row's pages backwards, so that they do not stand in order.
    let table: Vec<i64> = (0..lengths.len() * columns).map(|i| (lengths.len() * columns - i) as i64).collect();
    let stride = heads * key_dim + 3;
    let numbers_of_queries = numbers(lengths.len() * stride, 9);
    let rows: Vec<i64> = (0..lengths.len() as i64).rev().collect();
    let scale = 0.3;
    let mut out = vec![f32::NAN; lengths.len() * heads * value_dim];
    attend(
        Queries { numbers: &numbers_of_queries, stride, heads: *heads, rows: &rows, visible: lengths, scale },
        Cached {
            keys: &keys,
            values: &values,
            heads: *kv_heads,
            key_dim: *key_dim,
            value_stride,
            value_dim: *value_dim,
            page_size: PAGE,
            page_table: &table,
            pages_per_row: columns,
        },
        &mut out,
        threads,
    );
    let mut exact = vec![];
    for (index, (&row, &visible)) in rows.iter().zip(lengths).enumerate() {
        for head in 0..*heads {
            let kv_head = head * kv_heads / heads;
            let query = &numbers_of_queries[index * stride + head * key_dim..][..*key_dim];
            let slot = |token: usize| table[row as usize * columns + token / PAGE] as usize * PAGE + token % PAGE;
            let weights: Vec<f64> = (0..visible as usize)
                .map(|token| {
                    let key = &keys[(slot(token) * kv_heads + kv_head) * key_dim..][..*key_dim];
                    let product: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    (product * f64::from(scale)).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            for i in 0..*value_dim {
                let sum: f64 = (0..visible as usize)
                    .map(|token| {
                        weights[token] * f64::from(values[(slot(token) * kv_heads + kv_head) * value_stride + i])
                    })
                    .sum();
                exact.push(sum / total);
            }
        }
    }
    close(&out, &exact);
    out
}

#[test]
fn attention_over_pages() {
    for (heads, kv_heads, key_dim, value_dim) in
        [(4, 2, 16, 16), (8, 1, 24, 24), (3, 3, 64, 64), (8, 4, 32, 32), (2, 1, 128, 128), (4, 2, 40, 40)]
    {
        check(&Case { heads, kv_heads, key_dim, value_dim, lengths: vec![1, 4, 5, 33, 160] }, false, 1);
    }
}

#[test]
fn attention_over_latent_rows() {
    check(&Case { heads: 4, kv_heads: 1, key_dim: 40, value_dim: 32, lengths: vec![1, 9, 100] }, true, 1);
    check(&Case { heads: 4, kv_heads: 1, key_dim: 72, value_dim: 64, lengths: vec![7] }, true, 1);
}

#[test]
fn threads_and_company_change_no_bit() {
    let case = |lengths: Vec<i64>| Case { heads: 4, kv_heads: 2, key_dim: 16, value_dim: 16, lengths };
    let together = check(&case(vec![40, 7, 19, 100]), false, 1);
    assert_eq!(check(&case(vec![40, 7, 19, 100]), false, 3), together);
}

fn product_of(x: &[f32], weight: &[f32], inputs: usize, bias: &[f32]) -> Vec<f64> {
    let sum = |(x, (output, weights)): (&[f32], (usize, &[f32]))| {
        let products = x.iter().zip(weights).map(|(x, weight)| f64::from(*x) * f64::from(*weight));
        products.sum::<f64>() + bias.get(output).map_or(0.0, |bias| f64::from(*bias))
    };
    x.chunks(inputs).flat_map(|x| weight.chunks(inputs).enumerate().map(move |weights| sum((x, weights)))).collect()
}

#[test]
fn products_with_matrices() {
    // Widths around blocks and panels; inputs around the length of a piece; rows around what is done at once.
    for (outputs, inputs) in [(1, 3), (15, 8), (16, 1), (17, 40), (63, 5), (64, 33), (65, 7), (200, 64), (80, 1300)] {
        let (weight, bias) = (numbers(outputs * inputs, 11), numbers(outputs, 12));
        let (plain, biased) = (Matrix::new(&weight, inputs, &[]), Matrix::new(&weight, inputs, &bias));
        for rows in [1, 2, 3, 4, 5, 6, 7, 13] {
            let x: Vec<f32> = numbers(rows * inputs, 13).iter().map(|x| x / 30.0).collect();
            for (matrix, bias) in [(&plain, &[][..]), (&biased, &bias[..])] {
                let mut out = vec![f32::NAN; rows * outputs];
                matrix.multiply(&x, &mut out, 1);
                close(&out, &product_of(&x, &weight, inputs, bias));
            }
        }
    }
}

#[test]
fn products_have_the_same_bits_in_any_company_and_on_any_number_of_threads() {
    let (outputs, inputs, rows) = (330, 1100, 19);
    let matrix = Matrix::new(&numbers(outputs * inputs, 14), inputs, &numbers(outputs, 15));
    let x = numbers(rows * inputs, 16);
    let alone: Vec<f32> = x
        .chunks(inputs)
        .flat_map(|x| {
            let mut out = vec![0.0; outputs];
            matrix.multiply(x, &mut out, 1);
            out
        })
        .collect();
    for count in 1..=rows {
        for threads in [1, 2, 3, 9] {
            let mut out = vec![f32::NAN; count * outputs];
            matrix.multiply(&x[..count * inputs], &mut out, threads);
            assert_eq!(out, alone[..count * outputs], "{count} rows, {threads} threads");
        }
    }
}

#[test]
fn products_with_a_matrix_kept_in_16_bits_have_the_bits_of_the_same_numbers_in_32() {
    for (outputs, inputs) in [(1, 3), (15, 8), (17, 40), (65, 7), (330, 1100)] {
        let halves = upper_halves(&numbers(outputs * inputs, 17));
        let whole: Vec<f32> = halves.iter().map(|&half| half.into()).collect();
        let bias = numbers(outputs, 18);
        let (half, whole) = (Matrix::new(&halves, inputs, &bias), Matrix::new(&whole, inputs, &bias));
        for rows in [1, 2, 3, 4, 5, 6, 7, 13] {
            let x = numbers(rows * inputs, 19);
            for threads in [1, 3] {
                let (mut out, mut wanted) = (vec![f32::NAN; rows * outputs], vec![0.0; rows * outputs]);
                half.multiply(&x, &mut out, threads);
                whole.multiply(&x, &mut wanted, threads);
                assert_eq!(out, wanted, "{outputs} x {inputs}, {rows} rows, {threads} threads");
            }
        }
    }
}

fn upper_halves(numbers: &[f32]) -> Vec<Bfloat16> {
    numbers.iter().map(|number| Bfloat16((number.to_bits() >> 16) as u16)).collect()
}

#[test]
fn rows_by_their_numbers() {
    let weight: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let (mut out, mut widened) = ([9.0; 12], [9.0; 12]);
    cpu_kernels::rows_of(&weight, 3, 10, &[11, 9, 13, 14], &mut out);
    cpu_kernels::rows_of(&upper_halves(&weight), 3, 10, &[11, 9, 13, 14], &mut widened);
    assert_eq!(out, [3.0, 4.0, 5.0, 0.0, 0.0, 0.0, 9.0, 10.0, 11.0, 0.0, 0.0, 0.0]);
    assert_eq!(out, widened);
}

#[test]
fn the_first_of_the_largest_is_found() {
    for width in [2, 15, 16, 17, 100, 1000] {
        for place in [1, width / 2, width - 1] {
            let mut row: Vec<f32> = numbers(width, 5).iter().map(|number| number - 2.0).collect();
            row[place] = 0.5;
            row[width - 1] = 0.5;
            assert_eq!(place_of_largest(&row), place);
            row[width / 2] = f32::NAN;
            row[width - 1] = f32::NAN;
            assert_eq!(place_of_largest(&row), width / 2);
        }
    }
    assert_eq!(place_of_largest(&[f32::NEG_INFINITY; 20]), 0);
}
