//! What a decision costs: `read` + `select` + `release`, on one core. `cargo bench --bench decisions [-- FILTER]`.
//!
//! Bodies are chats of natural text with one escape per 60 bytes. *known*: the prefix is held, the last KB is new; *new*: all is.
//! The index has 64 MiB, so that 220 KB of prefix can be held by 512 targets.

mod bodies;

use std::hint::black_box;
use std::sync::Arc;

use bodies::{CHINESE, ESCAPED, LATIN, SIZES, chat, ids, new_bytes};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use router_core::breaker::Limits;
use router_core::health::Thresholds;
use router_core::outcome::{Outcome, OutcomeKind};
use router_core::policy::{Assignment, Balance, Parameters};
use router_core::prompt::Endpoint;
use router_core::router::{Lease, Router, Settings};

const SECOND: u64 = 1_000_000_000;
/// In turn, so that no body is the one that was read last.
const PREFIXES: usize = 2;
const BODIES: usize = 512;

fn router(policy: &str, targets: usize) -> Arc<Router> {
    let router = Router::new(Settings {
        policy: policy.to_owned(),
        shadow_policy: None,
        policy_parameters: Parameters {
            cache_threshold: 0.5,
            balance: Balance { absolute: 32, relative: 1.5 },
            assignment: Assignment::Random,
            max_idle_ns: SECOND,
        },
        max_tree_size: 1 << 26,
        eviction_interval_ns: 120 * SECOND,
        index_memory_bytes: 64 << 20,
        hash_seed: 1,
        seed: 1,
        strict_model: false,
        health: Thresholds { failure: 3, success: 1 },
        breaker: Limits { enabled: false, failures: 10, successes: 3, timeout_ns: SECOND, window_ns: SECOND },
        admission: router_core::admission::Limits { concurrent: 0, queue: 0, per_second: 0.0 },
        duration_buckets_ns: vec![SECOND],
    })
    .expect("settings");
    for _ in 0..targets {
        let slots = router.add_worker(&["demo".to_owned()], 1, 16 << 20, None).expect("room");
        router.observe_probe(slots[0], true).expect("a worker");
    }
    router
}

fn select(router: &Arc<Router>, body: &[u8]) -> Lease {
    let endpoint = if body.starts_with(b"{\"input_ids") { Endpoint::Generate } else { Endpoint::Chat };
    let request = router.read(endpoint, b"", body, SECOND).expect("a valid body");
    router.select(&request, SECOND, false).expect("no error").expect("a target")
}

fn release(lease: &Lease) {
    let outcome = Outcome { kind: OutcomeKind::Answered, status: 200, ..Outcome::CANCELLED };
    lease.release(&outcome, SECOND).expect("no error");
}

/// `prefix` goes to `holders` targets: each says that it cannot, and keeps what it was sent.
fn spread(router: &Arc<Router>, prefix: &[u8], holders: usize) {
    let request = router.read(Endpoint::Chat, b"", prefix, SECOND).expect("a valid body");
    let refused = Outcome { kind: OutcomeKind::Answered, status: 503, ..Outcome::CANCELLED };
    for _ in 0..holders {
        let lease = router.select(&request, SECOND, false).expect("no error").expect("a target");
        lease.release(&refused, SECOND).expect("no error");
    }
}

/// Bodies of about `size` bytes that continue the prefixes, each in another way.
fn continued(unit: &str, size: usize) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let text = |size: usize| unit.repeat(size / unit.len() + 1);
    let new = new_bytes(size);
    let prefix = |number: usize| format!("{number} {}", text(size - new));
    let prefixes = (0..PREFIXES).map(prefix).collect::<Vec<_>>();
    let body = |number: usize| chat(&format!("{}{number} {}", prefixes[number % PREFIXES], text(new)));
    (prefixes.iter().map(|prefix| chat(prefix)).collect(), (0..BODIES).map(body).collect())
}

fn time(criterion: &mut Criterion, group: &str, case: &str, size: &str, router: &Arc<Router>, bodies: &[Vec<u8>]) {
    let mut turn = 0;
    criterion.benchmark_group(group).bench_function(BenchmarkId::new(case, size), |bencher| {
        bencher.iter(|| {
            turn = (turn + 1) % bodies.len();
            release(&select(router, black_box(&bodies[turn])));
        });
    });
}

fn known(criterion: &mut Criterion) {
    for (targets, holders) in [(16, 1), (1024, 1), (1024, 16), (1024, 512)] {
        for (name, size) in SIZES {
            let router = router("cache_aware", targets);
            let (prefixes, bodies) = continued(LATIN, size);
            prefixes.iter().for_each(|prefix| spread(&router, prefix, holders));
            time(criterion, "known", &format!("{targets} targets, {holders} hold"), name, &router, &bodies);
        }
    }
}

fn spellings(criterion: &mut Criterion) {
    for (name, size) in SIZES {
        for (spelling, unit) in [("UTF-8 Chinese", CHINESE), ("every character escaped", ESCAPED)] {
            let router = router("cache_aware", 16);
            let (prefixes, bodies) = continued(unit, size);
            prefixes.iter().for_each(|prefix| spread(&router, prefix, 1));
            time(criterion, "known", &format!("16 targets, {spelling}"), name, &router, &bodies);
        }
        let router = router("cache_aware", 16);
        let bodies: Vec<_> = (0..BODIES as u32).map(|turn| ids(size, turn % PREFIXES as u32, turn)).collect();
        time(criterion, "known", "16 targets, token ids", name, &router, &bodies);
    }
}

fn new(criterion: &mut Criterion) {
    for (name, size) in SIZES {
        let bodies: Vec<_> = (0..1 << 14)
            .take_while(|number| number * size < 256 << 20)
            .map(|number| chat(&format!("{number} {}", LATIN.repeat(size / LATIN.len()))))
            .collect();
        time(criterion, "new", "16 targets", name, &router("cache_aware", 16), &bodies);
    }
}

fn policies(criterion: &mut Criterion) {
    let (name, size) = SIZES[0];
    for policy in router_core::policy::names() {
        for targets in [16, 1024] {
            let (_, bodies) = continued(LATIN, size);
            time(
                criterion,
                "policies",
                &format!("{policy}, {targets} targets"),
                name,
                &router(policy, targets),
                &bodies,
            );
        }
    }
}

criterion_group!(benches, known, spellings, new, policies);
criterion_main!(benches);
