//! What leases take and give back, and what their ends say about workers.

mod fleet;

use std::collections::BTreeMap;

use fleet::{Fleet, MODEL, SECOND, settings};
use router_core::breaker::Limits;
use router_core::health::Thresholds;
use router_core::outcome::OutcomeKind;
use router_core::prompt::Endpoint;
use router_core::router::{Lease, Settings, Transition};

#[test]
fn load_rises_in_select_and_falls_once() {
    let fleet = Fleet::new(settings(), 1);
    let (first, second) = (fleet.select(&fleet.text("first")), fleet.select(&fleet.text("second")));
    assert_eq!(fleet.load(0), 2);
    fleet.release(&first, OutcomeKind::Answered, 200);
    assert_eq!(fleet.load(0), 1);
    assert_eq!(fleet.release(&first, OutcomeKind::NoAnswer, 0), []);
    drop(first);
    assert_eq!(fleet.load(0), 1);
    assert_eq!(fleet.router.take_probe_requests(), Ok(vec![]), "what is said late is not heard");
    drop(second);
    assert_eq!(fleet.load(0), 0);
    assert_eq!(fleet.router.target(0).unwrap().outstanding_tokens, 0);
}

#[test]
fn a_late_release_does_not_touch_the_successor() {
    let fleet = Fleet::new(settings(), 1);
    let late = fleet.select(&fleet.text("late"));
    let dropped = fleet.select(&fleet.text("dropped"));
    fleet.router.remove_worker(0).unwrap();
    assert_eq!(fleet.add(&[MODEL], 1), [0]);
    let current = fleet.select(&fleet.text("current"));
    assert_ne!(late.incarnation(), current.incarnation());
    for _ in 0..20 {
        assert_eq!(fleet.release(&late, OutcomeKind::NoAnswer, 0), []);
    }
    drop(dropped);
    let target = fleet.router.target(0).unwrap();
    assert_eq!((target.load, target.breaker, target.consecutive_failures), (1, "closed", 0));
    assert_eq!(fleet.router.take_probe_requests(), Ok(vec![]));
}

#[test]
fn a_request_outlives_its_worker() {
    let fleet = Fleet::new(settings(), 1);
    let request = fleet.text("a prompt");
    fleet.release(&fleet.select(&request), OutcomeKind::ConnectFailed, 0);
    fleet.router.remove_worker(0).unwrap();
    fleet.add(&[MODEL], 1);
    assert!(fleet.try_select(&request).unwrap().is_some(), "the successor in the slot has not failed it");
}

#[test]
fn client_errors_never_open_a_breaker() {
    let fleet = Fleet::new(settings(), 1);
    for status in [400, 401, 404, 413, 422, 429, 501] {
        (0..150).for_each(|_| drop(fleet.attempt(OutcomeKind::Answered, status)));
    }
    assert_eq!(fleet.breaker(0), "closed");
    assert_eq!(fleet.router.target(0).unwrap().counters.failures, 0);
}

#[test]
fn client_errors_do_not_reset_one_either() {
    let fleet = Fleet::new(settings(), 1);
    for _ in 0..9 {
        fleet.attempt(OutcomeKind::Answered, 500);
        fleet.attempt(OutcomeKind::Answered, 429);
    }
    assert_eq!(fleet.router.target(0).unwrap().consecutive_failures, 9);
    let opened = Transition { head: 0, machine: "breaker", previous: "closed", current: "open" };
    assert_eq!(fleet.attempt(OutcomeKind::Answered, 500), [opened]);
}

#[test]
fn an_open_breaker_closes_by_its_time_and_bounded_attempts() {
    let mut fleet = Fleet::new(settings(), 1);
    for _ in 0..10 {
        fleet.attempt(OutcomeKind::NoAnswer, 0);
    }
    let request = fleet.text("a prompt");
    assert!(fleet.try_select(&request).unwrap().is_none());
    fleet.now_ns += 60 * SECOND - 1;
    assert!(fleet.try_select(&request).unwrap().is_none());
    fleet.now_ns += 1;

    let leases: Vec<Lease> = (0..3).map(|_| fleet.select(&request)).collect();
    assert_eq!(fleet.breaker(0), "half_open");
    assert!(fleet.try_select(&request).unwrap().is_none(), "three successes would do: no more are let through");
    fleet.release(&leases[0], OutcomeKind::Cancelled, 0);
    let fourth = fleet.select(&request);
    assert!(fleet.try_select(&request).unwrap().is_none());

    assert_eq!(fleet.release(&leases[1], OutcomeKind::Answered, 200), []);
    assert_eq!(fleet.release(&fourth, OutcomeKind::Answered, 404), []);
    assert_eq!(fleet.router.target(0).unwrap().consecutive_successes, 1);
    assert_eq!(fleet.attempt(OutcomeKind::Answered, 200), []);
    let closed = Transition { head: 0, machine: "breaker", previous: "half_open", current: "closed" };
    assert_eq!(fleet.release(&leases[2], OutcomeKind::Answered, 200), [closed]);
}

#[test]
fn one_failure_opens_a_half_open_breaker_and_old_answers_do_not_count() {
    let limits = Limits { failures: 2, ..settings().breaker };
    let fleet = Fleet::new(Settings { breaker: limits, ..settings() }, 1);
    let old: Vec<Lease> = (0..5).map(|_| fleet.select(&fleet.text("old"))).collect();
    for _ in 0..2 {
        fleet.attempt(OutcomeKind::BrokenStream, 200);
    }
    assert_eq!(fleet.breaker(0), "open");
    let probed = fleet.probe(0, true);
    assert_eq!(probed, [Transition { head: 0, machine: "breaker", previous: "open", current: "half_open" }]);
    for lease in &old {
        fleet.release(lease, OutcomeKind::Answered, 200);
    }
    assert_eq!(fleet.breaker(0), "half_open");
    fleet.attempt(OutcomeKind::Answered, 503);
    assert_eq!(fleet.breaker(0), "open");
}

#[test]
fn each_breaker_wakes_at_its_own_time() {
    let mut fleet = Fleet::new(Settings { policy: "round_robin".to_owned(), ..settings() }, 2);
    for _ in 0..10 {
        // One of the two fails now, the other 30 s later.
        let (first, second) = (fleet.select(&fleet.text("x")), fleet.select(&fleet.text("x")));
        fleet.release(&first, OutcomeKind::NoAnswer, 0);
        fleet.release(&second, OutcomeKind::Cancelled, 0);
    }
    fleet.now_ns += 30 * SECOND;
    for _ in 0..10 {
        fleet.attempt(OutcomeKind::NoAnswer, 0);
    }
    assert_eq!((fleet.breaker(0), fleet.breaker(1)), ("open", "open"));
    for (seconds, states) in [(29, ("open", "open")), (1, ("half_open", "open")), (30, ("half_open", "half_open"))] {
        fleet.now_ns += seconds * SECOND;
        let _ = fleet.try_select(&fleet.text("x"));
        assert_eq!((fleet.breaker(0), fleet.breaker(1)), states);
    }
}

#[test]
fn health_decides_who_is_asked() {
    let health = Thresholds { failure: 3, success: 2 };
    let fleet = Fleet::new(Settings { health, ..settings() }, 0);
    fleet.add_pending(&[MODEL], 2);
    let request = fleet.text("a prompt");
    let is_available = || fleet.try_select(&request).unwrap().is_some();
    let ready = Transition { head: 0, machine: "health", previous: "pending", current: "ready" };
    let unhealthy = Transition { head: 0, machine: "health", previous: "ready", current: "unhealthy" };
    let table = [
        (true, None, false),
        (true, Some(ready), true),
        (false, None, true),
        (false, None, true),
        (true, None, true),
        (false, None, true),
        (false, None, true),
        (false, Some(unhealthy), false),
        (true, None, false),
    ];
    for (ok, expected, available) in table {
        assert_eq!(fleet.probe(0, ok), expected.into_iter().collect::<Vec<_>>());
        assert_eq!(is_available(), available);
        assert_eq!(fleet.router.readiness(), Ok((usize::from(available), 1)));
    }
}

#[test]
fn who_drains_gets_no_new_leases() {
    let fleet = Fleet::new(settings(), 2);
    let leases: Vec<Lease> = (0..6).map(|i| fleet.select(&fleet.text(&format!("prompt {i}")))).collect();
    fleet.router.drain_worker(0).unwrap();
    for i in 0..20 {
        assert_eq!(fleet.answer(&fleet.text(&format!("prompt {i}"))), 1);
    }
    assert!(fleet.probe(0, true).is_empty());
    assert_eq!(fleet.router.readiness(), Ok((1, 2)));
    let target = fleet.router.target(0).unwrap();
    assert!(target.draining && !target.available && target.load > 0);
    drop(leases);
    assert_eq!(fleet.load(0), 0);
}

#[test]
fn failed_attempts_ask_for_one_probe() {
    let fleet = Fleet::new(settings(), 3);
    for (kind, expected) in [
        (OutcomeKind::ConnectFailed, 1),
        (OutcomeKind::NoAnswer, 1),
        (OutcomeKind::BrokenStream, 1),
        (OutcomeKind::Cancelled, 0),
        (OutcomeKind::Answered, 0),
    ] {
        let prompt = format!("{kind:?}");
        let slots = [(); 3].map(|()| {
            let lease = fleet.select(&fleet.text(&prompt));
            fleet.release(&lease, kind, 500);
            lease.slot()
        });
        let mut wanted = if expected == 0 { Vec::new() } else { slots.to_vec() };
        wanted.sort_unstable();
        wanted.dedup();
        assert_eq!(fleet.router.take_probe_requests(), Ok(wanted), "{kind:?}");
        assert_eq!(fleet.router.take_probe_requests(), Ok(vec![]));
    }
}

#[test]
fn requests_are_counted_where_they_belong() {
    let mut fleet = Fleet::new(settings(), 2);
    let request = fleet.for_model("unknown names are the one model's");
    fleet.release(&fleet.select(&request), OutcomeKind::NoAnswer, 0);
    fleet.release(&fleet.select(&request), OutcomeKind::Answered, 200);
    let accepted_ns = fleet.now_ns;
    fleet.now_ns += SECOND;
    for _ in 0..2 {
        request.finish(200, Some(accepted_ns + SECOND / 100), fleet.now_ns);
    }
    drop(fleet.chat(&["never selected".to_owned()]));
    assert!(fleet.router.read(Endpoint::Completions, b"", b"{", fleet.now_ns).is_err());

    let series = fleet.router.series();
    let by_model: BTreeMap<_, _> = series.iter().map(|s| ((s.model.as_str(), s.reading.endpoint as u8), s)).collect();
    let own = &by_model[&(MODEL, Endpoint::Completions as u8)].reading;
    assert_eq!((own.accepted, own.attempts, own.retries), (1, 2, 1));
    assert_eq!(own.answered, [(200, 1)]);
    assert_eq!((own.duration_sum_ns, own.first_byte_sum_ns), (SECOND, SECOND / 100));
    assert_eq!((&own.duration_buckets[..], &own.first_byte_buckets[..]), (&[0, 1, 0][..], &[1, 0, 0][..]));
    let given_up = &by_model[&("other", Endpoint::Chat as u8)].reading;
    assert_eq!((given_up.accepted, &given_up.answered[..]), (1, &[(499, 1)][..]));
    assert_eq!(fleet.router.counted().retries(), [0, 1, 0, 0]);
    let refused = &by_model[&("other", Endpoint::Completions as u8)].reading;
    assert_eq!((refused.accepted, &refused.answered[..]), (1, &[(400, 1)][..]));
    assert_eq!(series.len(), 3);
}

#[test]
fn capacity_is_fixed() {
    let fleet = Fleet::new(settings(), 0);
    assert_eq!(fleet.add(&[MODEL], 4_095).len(), 4_095);
    assert_eq!(fleet.add(&[MODEL], 1), [4_095]);
    assert!(fleet.router.add_worker(&[MODEL.to_owned()], 1, 0, None).is_err());
    assert!(fleet.select(&fleet.text("x")).slot() < 4_096);
    for (models, ranks) in [(vec![], 1), (vec![String::new()], 1), (vec![MODEL.to_owned()], 0)] {
        assert!(fleet.router.add_worker(&models, ranks, 0, None).is_err());
    }
    for slot in [1, 4_096, u16::MAX] {
        assert!(fleet.router.remove_worker(slot).is_err());
        assert!(fleet.router.observe_probe(slot, true).is_err());
    }
    assert!(fleet.router.load(4_096).is_err());
}
