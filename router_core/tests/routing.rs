//! Where requests go.

mod fleet;

use std::collections::BTreeSet;

use fleet::{Fleet, MODEL, SECOND, settings};
use router_core::error::Error;
use router_core::outcome::{Outcome, OutcomeKind};
use router_core::policy::Balance;
use router_core::prompt::Endpoint;
use router_core::router::Settings;

fn with(cache_threshold: f64, absolute: u64, relative: f64) -> Settings {
    let mut settings = settings();
    settings.policy_parameters.cache_threshold = cache_threshold;
    settings.policy_parameters.balance = Balance { absolute, relative };
    settings
}

#[test]
fn distinct_prompts_one_after_the_other_use_all_workers() {
    for workers in [2, 4, 16] {
        for seed in 0..20 {
            let fleet = Fleet::new(Settings { seed, ..settings() }, workers);
            let used: BTreeSet<u16> = (0..workers).map(|i| fleet.answer(&fleet.text(&format!("prompt {i}")))).collect();
            assert_eq!(used.len(), workers, "seed {seed}");
        }
    }
}

#[test]
fn equal_short_prompts_go_to_one_worker_but_not_to_the_same_in_every_fleet() {
    let mut first_choices = BTreeSet::new();
    for seed in 0..20 {
        let fleet = Fleet::new(Settings { seed, ..settings() }, 2);
        let prompt = "one two three four five six seven eight nine ten";
        let used: BTreeSet<u16> = (0..12).map(|_| fleet.answer(&fleet.text(prompt))).collect();
        assert_eq!(used.len(), 1);
        first_choices.extend(used);
    }
    assert_eq!(first_choices.len(), 2, "ties never go by index");
}

#[test]
fn a_chat_stays_where_its_answers_were_made() {
    let fleet = Fleet::new(settings(), 4);
    let mut chats: Vec<(Vec<String>, BTreeSet<u16>)> = (0..8)
        .map(|chat| (vec![format!("Conversation {chat}: {}", "tell me more, please. ".repeat(3))], BTreeSet::new()))
        .collect();
    for turn in 0..4 {
        for (messages, used) in &mut chats {
            used.insert(fleet.answer(&fleet.chat(messages)));
            let question = messages.last().unwrap().len();
            messages.push("an answer ".repeat(question / 2)); // 5 times the question
            messages.push(format!("And then, {turn}? {}", "Go on. ".repeat(8)));
        }
    }
    for (_, used) in &chats {
        assert_eq!(used.len(), 1);
    }
    let all: BTreeSet<_> = chats.iter().flat_map(|(_, used)| used).collect();
    assert_eq!(all.len(), 4);
}

#[test]
fn the_threshold_changes_a_decision() {
    for (cache_threshold, expected_holder) in [(0.3, true), (0.6, false)] {
        let fleet = Fleet::new(with(cache_threshold, 32, 1.5), 2);
        let known = "k".repeat(512);
        let lease = fleet.select(&fleet.text(&known));
        // Still in flight, so that the other worker has the shorter queue.
        let next = fleet.select(&fleet.text(&(known + &"n".repeat(512))));
        assert_eq!(next.slot() == lease.slot(), expected_holder, "{cache_threshold}");
    }
}

#[test]
fn both_limits_of_balance_change_decisions() {
    for (absolute, relative, expected_holder) in [(4, 1.5, true), (3, 1.5, false), (3, 5.0, true)] {
        let fleet = Fleet::new(with(0.5, absolute, relative), 2);
        let busy = fleet.select(&fleet.text("the prompt that everybody sends"));
        let other = fleet.select(&fleet.text("another"));
        assert_ne!(busy.slot(), other.slot());
        let leases: Vec<_> = (0..4).map(|_| fleet.select(&fleet.text("the prompt that everybody sends"))).collect();
        assert!(leases.iter().filter(|lease| lease.slot() == busy.slot()).count() >= 3);
        // 5 in flight there, 1 at the other.
        let next = fleet.select(&fleet.text("the prompt that everybody sends"));
        assert_eq!(next.slot() == busy.slot(), expected_holder, "{absolute} {relative}");
    }
}

#[test]
fn the_size_of_the_tree_changes_a_decision() {
    let goes_back = |max_tree_size| {
        let fleet = Fleet::new(Settings { max_tree_size, ..settings() }, 1);
        let text = |letter: &str| fleet.text(&letter.repeat(1_000));
        for letter in ["a", "b", "c", "d", "e", "f"] {
            fleet.answer(&text(letter));
        }
        let slot = fleet.add(&[MODEL], 1)[0];
        // The new worker has the emptier cache: it gets what the first does not hold.
        fleet.answer(&text("a")) != slot
    };
    assert!(goes_back(10_000));
    assert!(!goes_back(2_000));
}

#[test]
fn the_eviction_interval_changes_a_decision() {
    let goes_back = |eviction_interval_ns| {
        let mut fleet = Fleet::new(Settings { max_tree_size: 2_000, eviction_interval_ns, ..settings() }, 1);
        fleet.router.evict(fleet.now_ns, 0).unwrap();
        for letter in ["a", "b", "c"] {
            fleet.answer(&fleet.text(&letter.repeat(1_000)));
        }
        fleet.now_ns += 60 * SECOND;
        fleet.router.evict(fleet.now_ns, 0).unwrap();
        let slot = fleet.add(&[MODEL], 1)[0];
        fleet.answer(&fleet.text(&"a".repeat(1_000))) != slot
    };
    assert!(goes_back(120 * SECOND), "not evicted yet");
    assert!(!goes_back(60 * SECOND));
}

#[test]
fn what_an_eviction_cut_off_does_not_come_back() {
    let fleet = Fleet::new(Settings { max_tree_size: 2_000, ..settings() }, 1);
    let held = |letter: &str| {
        let lease = fleet.select(&fleet.text(&letter.repeat(1_000)));
        // Not answered: what was not held before is not held after.
        fleet.release(&lease, OutcomeKind::NoAnswer, 0);
        lease.match_bytes() > 0
    };
    for letter in ["a", "b", "c"] {
        fleet.answer(&fleet.text(&letter.repeat(1_000)));
    }
    fleet.router.evict(fleet.now_ns, 0).unwrap();
    assert!((1_000..=2_000).contains(&fleet.router.target(0).unwrap().index_characters));
    assert!(!held("a"));
    assert!(held("c"));
    fleet.answer(&fleet.text(&"d".repeat(1_000)));
    assert!(!held("a") && held("d"));
}

#[test]
fn who_died_is_forgotten_and_its_prefixes_are_learned_where_they_go() {
    let fleet = Fleet::new(settings(), 2);
    let first = fleet.answer(&fleet.text("a prompt that is sent again and again"));
    for _ in 0..3 {
        fleet.probe(first, false);
    }
    let second = fleet.answer(&fleet.text("a prompt that is sent again and again"));
    assert_ne!(first, second);
    fleet.router.restart_worker(first).unwrap();
    fleet.probe(first, true);
    for _ in 0..5 {
        assert_eq!(fleet.answer(&fleet.text("a prompt that is sent again and again")), second);
    }
}

#[test]
fn the_successor_in_a_slot_inherits_nothing() {
    let fleet = Fleet::new(settings(), 1);
    fleet.answer(&fleet.text("a prompt"));
    fleet.router.remove_worker(0).unwrap();
    assert_eq!(fleet.add(&[MODEL], 1), [0]);
    let lease = fleet.select(&fleet.text("a prompt"));
    assert_eq!((lease.match_bytes(), lease.predicted_cached_tokens()), (0, 0));
    assert_eq!(fleet.router.target(0).unwrap().counters.selections, 1);
}

#[test]
fn a_worker_that_failed_a_request_does_not_get_it_again() {
    for policy in router_core::policy::names() {
        let fleet = Fleet::new(Settings { policy: policy.to_owned(), ..settings() }, 3);
        let request = fleet.text("a prompt");
        let mut used = BTreeSet::new();
        for (kind, status) in
            [(OutcomeKind::ConnectFailed, 0), (OutcomeKind::NoAnswer, 0), (OutcomeKind::Answered, 503)]
        {
            let lease = fleet.select(&request);
            used.insert(lease.slot());
            fleet.release(&lease, kind, status);
        }
        assert_eq!(used.len(), 3, "{policy}");
        assert!(fleet.try_select(&request).unwrap().is_none());
        assert!(fleet.router.select(&request, fleet.now_ns, true).unwrap().is_some());
        assert!(fleet.try_select(&fleet.text("a prompt")).unwrap().is_some(), "another request may");
    }
}

#[test]
fn outcomes_that_do_not_exclude() {
    let fleet = Fleet::new(settings(), 1);
    let request = fleet.text("a prompt");
    for (kind, status) in [
        (OutcomeKind::Answered, 400),
        (OutcomeKind::Answered, 200),
        (OutcomeKind::BrokenStream, 200),
        (OutcomeKind::Cancelled, 0),
    ] {
        fleet.release(&fleet.select(&request), kind, status);
    }
    assert!(fleet.try_select(&request).unwrap().is_some());
}

#[test]
fn a_claim_that_was_never_true_is_taken_back() {
    for (kind, expected) in [
        (OutcomeKind::ConnectFailed, 0),
        (OutcomeKind::NoAnswer, 0),
        (OutcomeKind::BrokenStream, 8),
        (OutcomeKind::Cancelled, 8),
    ] {
        let fleet = Fleet::new(settings(), 1);
        fleet.release(&fleet.select(&fleet.text("a prompt")), kind, 0);
        assert_eq!(fleet.select(&fleet.text("a prompt")).match_bytes(), expected, "{kind:?}");
    }
}

/// Models of each worker, strict, the name asked for, who may get it (None: it is unknown).
struct ModelCase(&'static [&'static [&'static str]], bool, &'static str, Option<&'static [u16]>);

#[test]
fn models() {
    let table = [
        ModelCase(&[&["a"]], false, "a", Some(&[0])),
        ModelCase(&[&["a"]], false, "whatever", Some(&[0])),
        ModelCase(&[&["a"]], true, "whatever", None),
        ModelCase(&[&["a", "alias"], &["a"]], true, "alias", Some(&[0])),
        ModelCase(&[&["a", "alias"], &["a"]], false, "whatever", Some(&[0, 1])),
        ModelCase(&[&["a"], &["b"], &["b"]], false, "b", Some(&[1, 2])),
        ModelCase(&[&["a"], &["b"]], false, "c", None),
        ModelCase(&[&["a", "b"], &["b", "a"]], false, "c", None),
        ModelCase(&[], true, "a", Some(&[])),
    ];
    for ModelCase(workers, strict_model, model, expected) in table {
        let fleet = Fleet::new(Settings { policy: "random".to_owned(), strict_model, ..settings() }, 0);
        workers.iter().for_each(|models| drop(fleet.add(models, 1)));
        let select = |_| fleet.try_select(&fleet.for_model(model));
        let used: Result<BTreeSet<u16>, Error> =
            (0..64).map(select).filter_map(|lease| lease.transpose()).map(|lease| Ok(lease?.slot())).collect();
        let expected = expected.map(|slots| slots.iter().copied().collect());
        assert_eq!(used, expected.ok_or(Error::UnknownModel(model.to_owned())), "{workers:?} {model}");
    }
}

#[test]
fn a_request_that_names_no_model_may_go_anywhere() {
    let fleet = Fleet::new(Settings { policy: "round_robin".to_owned(), ..settings() }, 0);
    fleet.add(&["a"], 1);
    fleet.add(&["b"], 1);
    assert_eq!([0; 4].map(|_| fleet.answer(&fleet.text("x"))), [0, 1, 0, 1]);
}

#[test]
fn a_model_follows_what_its_worker_says_now() {
    let fleet = Fleet::new(settings(), 0);
    fleet.add(&["a"], 2);
    fleet.add(&["b"], 1);
    fleet.router.update_worker(0, &["c".to_owned()], 0, None).unwrap();
    assert_eq!(fleet.try_select(&fleet.for_model("a")).err(), Some(Error::UnknownModel("a".to_owned())));
    assert!(fleet.select(&fleet.for_model("c")).slot() < 2);
    fleet.router.remove_worker(2).unwrap();
    assert!(fleet.select(&fleet.for_model("anything")).slot() < 2, "one model is left");
}

#[test]
fn round_robin_keeps_a_turn_per_model() {
    let fleet = Fleet::new(Settings { policy: "round_robin".to_owned(), ..settings() }, 0);
    fleet.add(&["a", "b"], 1);
    fleet.add(&["b", "a"], 1);
    let slots = ["a", "b", "a", "b"].map(|model| fleet.answer(&fleet.for_model(model)));
    assert_eq!(slots, [0, 0, 1, 1]);
}

#[test]
fn ranks_are_targets_and_are_told_so() {
    let fleet = Fleet::new(settings(), 0);
    assert_eq!(fleet.add(&[MODEL], 4), [0, 1, 2, 3]);
    let body = r#"{"text": "prompt"} "#;
    let request = fleet.read(Endpoint::Generate, body);
    let lease = fleet.select(&request);
    let (offset, inserted) = lease.splice().unwrap();
    let spliced = [&body.as_bytes()[..offset], &inserted, &body.as_bytes()[offset..]].concat();
    let expected = format!(r#"{{"data_parallel_rank":{},"text": "prompt"}} "#, lease.slot());
    assert_eq!(lease.told_rank(), Some(lease.slot()));
    assert_eq!(String::from_utf8(spliced).unwrap(), expected);
    fleet.release(&lease, OutcomeKind::NoAnswer, 0);
    assert!(fleet.try_select(&request).unwrap().is_none(), "ranks fail as one");
    assert_eq!(fleet.router.take_probe_requests(), Ok(vec![0]));
}

#[test]
fn a_client_may_insist_on_a_rank() {
    let fleet = Fleet::new(settings(), 0);
    fleet.add(&[MODEL], 4);
    fleet.add(&[MODEL], 2);
    let slots_of = |rank: u16| -> BTreeSet<u16> {
        let select = |i| {
            let body = format!(r#"{{"text": "{rank}: prompt {i}", "data_parallel_rank": {rank}}}"#);
            let lease = fleet.select(&fleet.read(Endpoint::Generate, &body));
            assert_eq!(lease.splice(), None);
            lease.slot()
        };
        (0..64).map(select).collect()
    };
    assert_eq!(slots_of(1), [1, 5].into());
    assert_eq!(slots_of(3), [3].into());
    let nobody_has_it = slots_of(7);
    assert!(nobody_has_it.iter().any(|&slot| slot < 4) && nobody_has_it.iter().any(|&slot| slot >= 4));
    let lease = |headers: &[u8], body: &str| {
        fleet.select(&fleet.router.read(Endpoint::Generate, headers, body.as_bytes(), fleet.now_ns).unwrap())
    };
    let by_header = lease(b"x-data-parallel-rank: 2\r\n", r#"{"text": "x"}"#);
    assert_eq!((by_header.slot(), by_header.splice(), by_header.told_rank()), (2, None, Some(2)));
    let by_both = lease(b"x-data-parallel-rank: 2\r\n", r#"{"text": "x", "routed_dp_rank": 3}"#);
    assert_eq!(by_both.slot(), 2, "workers let the header win, too");
    let by_body = lease(b"", r#"{"text": "x", "routed_dp_rank": 3}"#);
    assert_eq!((by_body.slot(), by_body.splice(), by_body.told_rank()), (3, None, Some(3)));
    assert_eq!(lease(b"", r#"{"text": "x", "routed_dp_rank": 9}"#).told_rank(), None);
    // The only worker with rank 3 leaves: the other one must not be asked for what it cannot know.
    fleet.router.drain_worker(0).unwrap();
    let pinned = fleet.read(Endpoint::Generate, r#"{"text": "x", "data_parallel_rank": 3}"#);
    assert!(fleet.try_select(&pinned).unwrap().is_none());
    assert_eq!(slots_of(1), [5].into());
}

#[test]
fn each_rank_has_a_cache_of_its_own_size() {
    let fleet = Fleet::new(settings(), 0);
    fleet.add(&[MODEL], 2);
    fleet.router.set_kv_capacity(0, 64).unwrap();
    for rank in [0, 1] {
        for prompt in ["a", "b", "c"] {
            let text = prompt.repeat(256);
            let body = format!(r#"{{"text": "{text}", "data_parallel_rank": {rank}}}"#);
            fleet.answer(&fleet.read(Endpoint::Generate, &body));
        }
    }
    let credited = |slot| fleet.router.target(slot).unwrap().index_characters;
    assert_eq!((credited(0), credited(1)), (256, 768));
    assert_eq!(fleet.router.target(0).unwrap().kv_capacity_tokens, 64);
    assert!(fleet.router.set_kv_capacity(2, 64).is_err());
}

#[test]
fn tokens_are_predicted_as_the_target_counts_them() {
    let fleet = Fleet::new(settings(), 1);
    let request = fleet.text(&"t".repeat(2_048));
    let lease = fleet.select(&request);
    assert_eq!(fleet.router.target(0).unwrap().outstanding_tokens, 512, "4 bytes a token before it has answered");
    let answered = Outcome {
        kind: OutcomeKind::Answered,
        status: 200,
        first_byte_ns: None,
        prompt_tokens: 2_048,
        completion_tokens: 100,
        cached_tokens: 0,
    };
    lease.release(&answered, fleet.now_ns).unwrap();
    let lease = fleet.select(&request);
    assert_eq!((lease.match_bytes(), lease.predicted_cached_tokens()), (2_048, 2_048));
    assert_eq!(fleet.router.target(0).unwrap().outstanding_tokens, 0);
    lease.release(&Outcome { cached_tokens: 2_000, ..answered }, fleet.now_ns).unwrap();
    let counters = fleet.router.target(0).unwrap().counters;
    assert_eq!((counters.prompt_tokens, counters.completion_tokens), (4_096, 200));
    assert_eq!((counters.reported_cached_tokens, counters.predicted_cached_tokens), (2_000, 2_048));
}

#[test]
fn the_same_seed_makes_the_same_choices() {
    let choices = |seed| {
        let fleet = Fleet::new(Settings { policy: "random".to_owned(), seed, ..settings() }, 8);
        (0..32).map(|_| fleet.answer(&fleet.text("x"))).collect::<Vec<_>>()
    };
    assert_eq!(choices(1), choices(1));
    assert_ne!(choices(1), choices(2));
}
