//! Whatever the order of calls: the sum of loads is the number of leases that live on workers that live, and all comes back
//! to zero.

mod fleet;

use std::collections::BTreeMap;
use std::sync::Arc;

use fleet::{Fleet, MODEL, SECOND, settings};
use proptest::prelude::*;
use router_core::breaker::Limits;
use router_core::outcome::{Outcome, OutcomeKind};
use router_core::router::{Lease, Request, Settings};

#[derive(Clone, Debug)]
enum Call {
    Add { ranks: usize, ready: bool, other_model: bool },
    Remove(usize),
    Restart(usize),
    Drain(usize),
    Update { worker: usize, other_model: bool },
    Probe { worker: usize, ok: bool },
    Read(usize),
    Select { request: usize, allow_failed: bool },
    Release { lease: usize, kind: OutcomeKind, status: u16, tokens: i64 },
    Drop(usize),
    Wait(u64),
    Evict(usize),
}

const KINDS: [OutcomeKind; 5] = [
    OutcomeKind::Answered,
    OutcomeKind::ConnectFailed,
    OutcomeKind::NoAnswer,
    OutcomeKind::BrokenStream,
    OutcomeKind::Cancelled,
];

fn call() -> impl Strategy<Value = Call> {
    let one = || 0..64_usize;
    let statuses = prop::sample::select(vec![200, 404, 429, 500, 503]);
    prop_oneof![
        3 => (1..5_usize, prop::bool::weighted(0.8), prop::bool::ANY)
            .prop_map(|(ranks, ready, other_model)| Call::Add { ranks, ready, other_model }),
        1 => one().prop_map(Call::Remove),
        1 => one().prop_map(Call::Restart),
        1 => one().prop_map(Call::Drain),
        1 => (one(), prop::bool::ANY).prop_map(|(worker, other_model)| Call::Update { worker, other_model }),
        4 => (one(), prop::bool::ANY).prop_map(|(worker, ok)| Call::Probe { worker, ok }),
        6 => one().prop_map(Call::Read),
        16 => (one(), prop::bool::ANY).prop_map(|(request, allow_failed)| Call::Select { request, allow_failed }),
        12 => (one(), prop::sample::select(&KINDS[..]), statuses, -1..5_000_i64)
            .prop_map(|(lease, kind, status, tokens)| Call::Release { lease, kind, status, tokens }),
        3 => one().prop_map(Call::Drop),
        2 => (0..90 * SECOND).prop_map(Call::Wait),
        1 => one().prop_map(Call::Evict),
    ]
}

/// The slow obvious twin: who is registered and what is held, in plain collections.
struct Twin {
    fleet: Fleet,
    /// Head to (slots, models).
    workers: BTreeMap<u16, Vec<u16>>,
    requests: Vec<Arc<Request>>,
    leases: Vec<Lease>,
}

impl Twin {
    fn head(&self, choice: usize) -> Option<u16> {
        self.workers.keys().nth(choice % self.workers.len().max(1)).copied()
    }

    fn apply(&mut self, call: Call) {
        let model = |other: bool| if other { "other" } else { MODEL };
        match call {
            Call::Add { ranks, ready, other_model } => {
                let slots = self.fleet.add_pending(&[model(other_model)], ranks);
                if ready {
                    self.fleet.probe(slots[0], true);
                }
                assert!(self.workers.insert(slots[0], slots).is_none());
            }
            Call::Remove(choice) => {
                if let Some(head) = self.head(choice) {
                    self.fleet.router.remove_worker(head).unwrap();
                    let gone = self.workers.remove(&head).unwrap();
                    let mut kept = Vec::new();
                    for lease in self.leases.drain(..) {
                        if gone.contains(&lease.slot()) {
                            // Released late or dropped late: neither has an effect.
                            let kind = KINDS[kept.len() % KINDS.len()];
                            lease.release(&Outcome { kind, ..Outcome::CANCELLED }, 0).unwrap();
                        } else {
                            kept.push(lease);
                        }
                    }
                    self.leases = kept;
                }
            }
            Call::Restart(choice) => {
                if let Some(head) = self.head(choice) {
                    self.fleet.router.restart_worker(head).unwrap();
                }
            }
            Call::Drain(choice) => {
                if let Some(head) = self.head(choice) {
                    self.fleet.router.drain_worker(head).unwrap();
                }
            }
            Call::Update { worker, other_model } => {
                if let Some(head) = self.head(worker) {
                    let models = [model(other_model).to_owned(), "alias".to_owned()];
                    self.fleet.router.update_worker(head, &models, 1_000, None).unwrap();
                }
            }
            Call::Probe { worker, ok } => drop(self.head(worker).map(|head| self.fleet.probe(head, ok))),
            Call::Read(text) => self.requests.push(self.fleet.text(&"prompt ".repeat(text * 10 + 1))),
            Call::Select { request, allow_failed } => {
                if let Some(request) = self.requests.get(request % self.requests.len().max(1)) {
                    let lease = self.fleet.router.select(request, self.fleet.now_ns, allow_failed).unwrap();
                    self.leases.extend(lease);
                }
            }
            Call::Release { lease, kind, status, tokens } => {
                if !self.leases.is_empty() {
                    let lease = self.leases.swap_remove(lease % self.leases.len());
                    let outcome = Outcome {
                        kind,
                        status,
                        first_byte_ns: None,
                        prompt_tokens: tokens,
                        completion_tokens: tokens,
                        cached_tokens: tokens / 2,
                    };
                    lease.release(&outcome, self.fleet.now_ns).unwrap();
                }
            }
            Call::Drop(lease) => {
                if !self.leases.is_empty() {
                    self.leases.swap_remove(lease % self.leases.len());
                }
            }
            Call::Wait(ns) => self.fleet.now_ns += ns,
            Call::Evict(buckets) => drop(self.fleet.router.evict(self.fleet.now_ns, buckets)),
        }
    }

    fn check(&self) {
        let targets = self.fleet.router.targets().unwrap();
        let slots: Vec<u16> = self.workers.values().flatten().copied().collect();
        assert_eq!(targets.iter().map(|target| target.slot).collect::<Vec<_>>(), slots);
        for target in &targets {
            let live = self.leases.iter().filter(|lease| lease.slot() == target.slot).count();
            assert_eq!(target.load, live as u64, "slot {}", target.slot);
            assert!(live > 0 || target.outstanding_tokens == 0, "slot {}", target.slot);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn loads_are_leases(
        calls in prop::collection::vec(call(), 1..300),
        policy in prop::sample::select(router_core::policy::names().collect::<Vec<_>>()),
        seed in any::<u64>(),
    ) {
        let breaker = Limits { failures: 2, ..settings().breaker };
        let settings = Settings { policy: policy.to_owned(), seed, breaker, ..settings() };
        let fleet = Fleet::new(settings, 0);
        let mut twin = Twin { fleet, workers: BTreeMap::new(), requests: Vec::new(), leases: Vec::new() };
        for (step, call) in calls.into_iter().enumerate() {
            twin.apply(call);
            twin.check();
            if step % 50 == 0 {
                twin.fleet.router.check_integrity().unwrap();
            }
        }
        twin.leases.clear();
        twin.check();
    }
}
