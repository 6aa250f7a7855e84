//! A router with workers, for the tests of `Router`: short verbs, no clock but the one it carries.
#![allow(dead_code, reason = "each test file uses its share")]

use std::sync::Arc;

use router_core::breaker::Limits;
use router_core::error::Error;
use router_core::health::Thresholds;
use router_core::outcome::{Outcome, OutcomeKind};
use router_core::policy::{Assignment, Balance, Parameters};
use router_core::prompt::Endpoint;
use router_core::router::{Lease, Request, Router, Settings, Transition};

pub const MODEL: &str = "llama";
pub const SECOND: u64 = 1_000_000_000;

/// As `config.py` has them, but for short histograms and one probe to be ready.
pub fn settings() -> Settings {
    Settings {
        policy: "cache_aware".to_owned(),
        shadow_policy: None,
        policy_parameters: Parameters {
            cache_threshold: 0.5,
            balance: Balance { absolute: 32, relative: 1.5 },
            assignment: Assignment::Random,
            max_idle_ns: 3_600 * SECOND,
        },
        max_tree_size: 1 << 26,
        eviction_interval_ns: 120 * SECOND,
        index_memory_bytes: 1 << 20,
        hash_seed: 1,
        seed: 1,
        strict_model: false,
        health: Thresholds { failure: 3, success: 1 },
        breaker: Limits { enabled: true, failures: 10, successes: 3, timeout_ns: 60 * SECOND, window_ns: 120 * SECOND },
        admission: router_core::admission::Limits { concurrent: 0, queue: 100, per_second: 0.0 },
        duration_buckets_ns: vec![SECOND / 100, SECOND],
    }
}

pub struct Fleet {
    pub router: Arc<Router>,
    pub now_ns: u64,
}

impl Fleet {
    /// `workers` ready workers of one rank and one model.
    pub fn new(settings: Settings, workers: usize) -> Self {
        let fleet = Self { router: Router::new(settings).unwrap(), now_ns: 1_000 * SECOND };
        (0..workers).for_each(|_| drop(fleet.add(&[MODEL], 1)));
        fleet
    }

    /// A ready worker.
    pub fn add(&self, models: &[&str], ranks: usize) -> Vec<u16> {
        let slots = self.add_pending(models, ranks);
        self.probe(slots[0], true);
        slots
    }

    pub fn add_pending(&self, models: &[&str], ranks: usize) -> Vec<u16> {
        let models: Vec<String> = models.iter().map(|&model| model.to_owned()).collect();
        self.router.add_worker(&models, ranks, 0, None).unwrap()
    }

    pub fn probe(&self, head: u16, ok: bool) -> Vec<Transition> {
        self.router.observe_probe(head, ok).unwrap()
    }

    /// A request to `/generate` for this text.
    pub fn text(&self, text: &str) -> Arc<Request> {
        self.read(Endpoint::Generate, &format!(r#"{{"text": "{text}"}}"#))
    }

    /// A chat: user, assistant, user, ...
    pub fn chat(&self, messages: &[String]) -> Arc<Request> {
        let roles = ["user", "assistant"].into_iter().cycle();
        let message = |(role, text)| format!(r#"{{"role": "{role}", "content": "{text}"}}"#);
        let messages: Vec<String> = roles.zip(messages).map(message).collect();
        self.read(Endpoint::Chat, &format!(r#"{{"model": "{MODEL}", "messages": [{}]}}"#, messages.join(",")))
    }

    pub fn for_model(&self, model: &str) -> Arc<Request> {
        self.read(Endpoint::Completions, &format!(r#"{{"model": "{model}", "prompt": "hello"}}"#))
    }

    pub fn read(&self, endpoint: Endpoint, body: &str) -> Arc<Request> {
        self.router.read(endpoint, b"", body.as_bytes(), self.now_ns).unwrap()
    }

    pub fn try_select(&self, request: &Arc<Request>) -> Result<Option<Lease>, Error> {
        self.router.select(request, self.now_ns, false)
    }

    pub fn select(&self, request: &Arc<Request>) -> Lease {
        self.try_select(request).unwrap().expect("somebody is available")
    }

    /// Where the request went, once it was answered.
    pub fn answer(&self, request: &Arc<Request>) -> u16 {
        let lease = self.select(request);
        self.release(&lease, OutcomeKind::Answered, 200);
        lease.slot()
    }

    pub fn release(&self, lease: &Lease, kind: OutcomeKind, status: u16) -> Vec<Transition> {
        lease.release(&Outcome { kind, status, ..Outcome::CANCELLED }, self.now_ns).unwrap()
    }

    pub fn load(&self, slot: u16) -> u64 {
        self.router.load(slot).unwrap()
    }

    /// One attempt at the only worker, with that outcome.
    pub fn attempt(&self, kind: OutcomeKind, status: u16) -> Vec<Transition> {
        let lease = self.select(&self.text("attempt"));
        self.release(&lease, kind, status)
    }

    pub fn breaker(&self, slot: u16) -> &'static str {
        self.router.target(slot).unwrap().breaker
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.router.check_integrity().unwrap();
        }
    }
}
