use super::*;

fn accepted(slab: &Slab, model: Option<u64>, endpoint: Endpoint, streaming: bool) -> Series {
    let series = slab.settle(model, endpoint, streaming);
    slab.accept();
    slab.assign(series);
    series
}

#[test]
fn a_series_counts_what_it_is_told() {
    let slab = Slab::new(vec![10, 20]);
    let series = accepted(&slab, Some(77), Endpoint::Generate, true);
    accepted(&slab, Some(77), Endpoint::Generate, true);
    slab.attempt(series, None);
    slab.attempt(series, Some(OutcomeKind::NoAnswer));
    slab.answer(series, 200, 10, Some(3));
    slab.answer(series, 502, 21, None);
    let mut arrivals = Arrivals::default();
    arrivals.piece(7, 1_000_000);
    arrivals.piece(5, 2_000_000);
    arrivals.piece(5, 9_000_000);
    slab.arrive(series, &arrivals);
    let mut gap_buckets = vec![0; PAUSE_BUCKETS];
    (gap_buckets[0], gap_buckets[3]) = (1, 1);
    let expected = SeriesReading {
        model: Some(77),
        endpoint: Endpoint::Generate,
        streaming: true,
        accepted: 2,
        answered: vec![(200, 1), (502, 1)],
        attempts: 2,
        retries: 1,
        duration_buckets: vec![1, 0, 1],
        duration_sum_ns: 31,
        first_byte_buckets: vec![1, 0, 0],
        first_byte_sum_ns: 3,
        chunks: 3,
        gap_buckets,
        gap_sum_ns: 8_000_000,
    };
    assert_eq!(slab.series(), [expected]);
    assert_eq!(slab.retries(), [0, 1, 0, 0]);
}

#[test]
fn series_do_not_mix_and_overflow_is_other() {
    let slab = Slab::new(vec![]);
    let mut all = Vec::new();
    for model in (1..=64).map(Some).chain([None]) {
        for endpoint in ENDPOINTS {
            for streaming in [false, true] {
                all.push(accepted(&slab, model, endpoint, streaming));
            }
        }
    }
    assert_eq!(slab.series().len(), SERIES);
    assert!(slab.series().iter().all(|series| series.accepted == 1));
    assert_eq!(slab.settle(Some(65), Endpoint::Chat, false), slab.settle(None, Endpoint::Chat, false));
    assert_eq!(slab.settle(Some(64), Endpoint::Chat, false), all[63 * 6]);
}

#[test]
fn odd_statuses_have_a_place() {
    let slab = Slab::new(vec![]);
    let series = accepted(&slab, None, Endpoint::Chat, false);
    for status in [0, 99, 599, 999] {
        slab.answer(series, status, 0, None);
    }
    assert_eq!(slab.series()[0].answered, [(100, 2), (599, 2)]);
}

#[test]
fn a_targets_row_starts_anew_with_its_incarnation() {
    let slab = Slab::new(vec![]);
    slab.count(9, 1, TargetCounter::Selections, 2);
    assert_eq!(slab.target(9, 1).selections, 2);
    assert_eq!(slab.target(9, 3), TargetReading::default());
    slab.count(9, 3, TargetCounter::CompletionTokens, 5);
    assert_eq!(slab.target(9, 3), TargetReading { completion_tokens: 5, ..Default::default() });
}

#[test]
fn other_answers_count_by_known_names() {
    let slab = Slab::new(vec![]);
    slab.count_http("GET", "/health", 200);
    slab.count_http("BREW", "/pot", 418);
    slab.count_http("POST", "/generate", 401);
    let requests = vec![("GET", "/health", 1), ("POST", "/generate", 1), ("other", "other", 1)];
    let responses = vec![(200, "/health", 1), (401, "/generate", 1), (418, "other", 1)];
    assert_eq!(slab.http(), HttpReading { requests, responses });
}

#[test]
fn a_dead_slab_is_folded_and_what_it_had_in_flight_is_lost() {
    let (ours, theirs) = (Slab::new(vec![10]), Slab::new(vec![10]));
    for (slab, model) in [(&ours, 1), (&theirs, 2), (&theirs, 1)] {
        let series = accepted(slab, Some(model), Endpoint::Chat, true);
        slab.change_in_flight(1);
        slab.attempt(series, Some(OutcomeKind::ConnectFailed));
        slab.count(3, 5, TargetCounter::Selections, model);
    }
    theirs.count(4, 7, TargetCounter::Connects, 1);
    theirs.count_http("GET", "/liveness", 200);
    theirs.turned(3_000_000, 5);
    let series = theirs.settle(Some(2), Endpoint::Chat, true);
    theirs.answer(series, 200, 5, Some(1));
    theirs.change_in_flight(-1);
    assert_eq!(theirs.ledger(), Ledger { accepted: 2, answered: 1, in_flight: 1, lost: 0 });
    ours.fold(&theirs, true);
    assert_eq!(ours.ledger(), Ledger { accepted: 3, answered: 2, in_flight: 1, lost: 1 });
    let series = ours.series();
    assert_eq!(series.iter().map(|one| (one.model, one.accepted)).collect::<Vec<_>>(), [(Some(1), 2), (Some(2), 1)]);
    assert_eq!(series[1].answered, [(200, 1)]);
    assert_eq!(ours.retries(), [3, 0, 0, 0]);
    assert_eq!(ours.target(3, 5).selections, 4);
    assert_eq!(ours.target(4, 7).connects, 1);
    assert_eq!(ours.http().responses, [(200, "/liveness", 1)]);
    assert_eq!(ours.lag().sum_ns, 3_000_000);
    // What an earlier incarnation counted does not come back.
    let late = Slab::new(vec![10]);
    late.count(3, 1, TargetCounter::Selections, 9);
    ours.fold(&late, true);
    assert_eq!(ours.target(3, 5).selections, 4);
}

#[test]
#[cfg(target_os = "linux")]
fn a_slab_is_read_from_elsewhere_and_always_balances() {
    let (slab, file) = Slab::shared(vec![1]).unwrap();
    let reader = Slab::attach(vec![1], &file).unwrap();
    assert!(Slab::attach(vec![2], &file).is_err());
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..20_000 {
                let step = slab.step();
                let series = accepted(&slab, None, Endpoint::Chat, false);
                slab.change_in_flight(1);
                drop(step);
                let step = slab.step();
                slab.change_in_flight(-1);
                slab.answer(series, 200, 1, None);
                drop(step);
                // A router does other things, too.
                (0..50).for_each(|_| std::hint::spin_loop());
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let Ledger { accepted, answered, in_flight, .. } = reader.ledger();
            assert_eq!(accepted, answered + in_flight);
        }
    });
    assert_eq!(reader.ledger().answered, 20_000);
}
