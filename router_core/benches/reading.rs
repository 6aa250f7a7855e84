//! What reading a body costs, by what the prompt is made of. `cargo bench --bench reading [-- FILTER]`.

mod bodies;

use std::hint::black_box;

use bodies::{CHINESE, ESCAPED, LATIN, SIZES, chat, ids};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use router_core::prompt::{Endpoint, PromptReader};

/// In turn, so that no body is the one that was read last.
const BODIES: usize = 16;

fn reading(criterion: &mut Criterion) {
    let texts = [("escape per 60 bytes", LATIN), ("UTF-8 Chinese", CHINESE), ("every character escaped", ESCAPED)];
    for (name, size) in SIZES {
        for (text, unit) in texts {
            let body = |seed| chat(&format!("{seed} {}", unit.repeat(size / unit.len())));
            time(criterion, text, name, Endpoint::Chat, (0..BODIES).map(body).collect());
        }
        let bodies = (0..BODIES).map(|seed| ids(size, seed as u32, 0)).collect();
        time(criterion, "token ids", name, Endpoint::Generate, bodies);
    }
}

fn time(criterion: &mut Criterion, case: &str, size: &str, endpoint: Endpoint, bodies: Vec<Vec<u8>>) {
    let reader = PromptReader::new(7);
    let mut turn = 0;
    criterion.benchmark_group("read").bench_function(BenchmarkId::new(case, size), |bencher| {
        bencher.iter(|| {
            turn = (turn + 1) % BODIES;
            reader.read(endpoint, black_box(&bodies[turn])).expect("a valid body")
        });
    });
}

criterion_group!(benches, reading);
criterion_main!(benches);
