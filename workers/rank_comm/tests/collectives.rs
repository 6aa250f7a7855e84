//! Ranks as threads, each with a mapping of its own: random operations against what they mean, delays, and all ways to fail.
#![allow(missing_docs, reason = "tests")]

use std::fs::File;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rank_comm::{CommError, Counter, Dtype, Group, GroupPlan, Op, Region};

const SECOND: Option<Duration> = Some(Duration::from_secs(1));

fn plans(ranks: usize, depth: usize, slot_bytes: usize) -> Vec<GroupPlan> {
    vec![GroupPlan { name: "all".into(), members: (0..ranks).collect(), depth, slot_bytes }]
}

/// Runs `work` on each rank and returns what each returned.
fn on_ranks<T: Send>(plans: &[GroupPlan], ranks: usize, work: impl Fn(usize, &Region, Group) -> T + Sync) -> Vec<T> {
    let file: File = Region::memory_file(ranks, plans).unwrap();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ranks)
            .map(|rank| {
                let (file, work) = (&file, &work);
                scope.spawn(move || {
                    let region = Region::open(file, ranks, plans).unwrap();
                    let group = region.group(0, rank, Duration::from_micros(20), SECOND);
                    work(rank, &region, group)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Numbers that differ by rank and step, and whose sums are exact in single precision.
fn numbers(rank: usize, step: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 31 + step * 17 + rank * 7) % 1000) as f32).collect()
}

fn bytes(numbers: &[f32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Reduce(usize),
    Gather(Vec<usize>, Option<usize>),
    Broadcast(usize, usize),
    Message(usize, usize),
    Barrier,
    /// Numbers, and the share of them that each rank wants, in hundredths.
    ReduceScatter(usize, Vec<(usize, usize)>),
    /// Bytes for each rank from each rank.
    AllToAll(Vec<Vec<usize>>),
}

fn step(ranks: usize) -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..400_usize).prop_map(Step::Reduce),
        (proptest::collection::vec(0..900_usize, ranks), proptest::option::of(0..ranks))
            .prop_map(|(sizes, root)| Step::Gather(sizes, root)),
        (0..900_usize, 0..ranks).prop_map(|(size, root)| Step::Broadcast(size, root)),
        (0..900_usize, 0..ranks).prop_map(|(size, root)| Step::Message(size, root)),
        Just(Step::Barrier),
        (0..400_usize, proptest::collection::vec((0..101_usize, 0..101_usize), ranks))
            .prop_map(|(count, wanted)| Step::ReduceScatter(count, wanted)),
        proptest::collection::vec(proptest::collection::vec(0..300_usize, ranks), ranks).prop_map(Step::AllToAll),
    ]
}

/// Does `steps` on one rank and checks every result. `delays`: which steps this rank comes late to.
fn perform(rank: usize, group: &mut Group, steps: &[Step], delays: u64) {
    let ranks = group.size();
    for (n, step) in steps.iter().enumerate() {
        if delays >> ((n * 7 + rank * 13) % 61) & 1 == 1 && n % 5 == rank {
            std::thread::sleep(Duration::from_micros(150));
        }
        let byte = |rank: usize, size: usize| vec![(rank * 50 + n) as u8; size];
        match step {
            Step::Reduce(count) => {
                let mut data = bytes(&numbers(rank, n, *count));
                group.all_reduce(&mut data, Dtype::Float32).unwrap();
                let sums: Vec<f32> =
                    (0..*count).map(|i| (0..ranks).map(|rank| numbers(rank, n, *count)[i]).sum()).collect();
                assert_eq!(data, bytes(&sums), "step {n}");
            }
            Step::Gather(sizes, root) => {
                let mut out = vec![0; sizes.iter().sum()];
                let wanted = root.is_none_or(|root| root == rank);
                group.gather(&byte(rank, sizes[rank]), sizes, *root, wanted.then_some(&mut out)).unwrap();
                let all: Vec<u8> = sizes.iter().enumerate().flat_map(|(rank, &size)| byte(rank, size)).collect();
                assert!(!wanted || out == all, "step {n}");
            }
            Step::Broadcast(size, root) => {
                let mut data = byte(rank, *size);
                group.broadcast(&mut data, *root).unwrap();
                assert_eq!(data, byte(*root, *size), "step {n}");
            }
            Step::Message(size, root) => {
                let message = byte(rank, *size);
                let got = group.message((rank == *root).then_some(&message[..]), *root).unwrap();
                assert_eq!(got, byte(*root, *size), "step {n}");
            }
            Step::Barrier => group.barrier().unwrap(),
            Step::ReduceScatter(count, wanted) => {
                let own = bytes(&numbers(rank, n, *count));
                let (low, high) = wanted[rank];
                let (low, high) = (count * low.min(high) / 100 * 4, count * low.max(high) / 100 * 4);
                let mut data = own.clone();
                group.reduce_scatter(&mut data, low..high, Dtype::Float32).unwrap();
                let sums: Vec<f32> =
                    (0..*count).map(|i| (0..ranks).map(|rank| numbers(rank, n, *count)[i]).sum()).collect();
                assert_eq!(data[low..high], bytes(&sums)[low..high], "step {n}");
                assert_eq!(data[..low], own[..low], "step {n}: what is not wanted stays");
                assert_eq!(data[high..], own[high..], "step {n}: what is not wanted stays");
            }
            Step::AllToAll(counts) => {
                // Of each rank, what it has for rank 0, then for rank 1 ...
                let part = |from: usize| -> Vec<u8> {
                    (0..ranks).flat_map(|to| vec![(from * 50 + to * 7 + n) as u8; counts[from][to]]).collect()
                };
                let sizes: Vec<usize> = counts.iter().map(|row| row.iter().sum()).collect();
                let wanted: Vec<_> = counts
                    .iter()
                    .map(|row| {
                        let start = row[..rank].iter().sum::<usize>();
                        start..start + row[rank]
                    })
                    .collect();
                let mut out = vec![0; wanted.iter().map(ExactSizeIterator::len).sum()];
                group.exchange(Op::AllToAll, &part(rank), &sizes, &wanted, &mut out).unwrap();
                let expected: Vec<u8> =
                    wanted.iter().enumerate().flat_map(|(from, range)| part(from)[range.clone()].to_vec()).collect();
                assert_eq!(out, expected, "step {n}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_rank_gets_what_the_operation_means(
        (ranks, steps) in (1..5_usize).prop_flat_map(|ranks| (Just(ranks), proptest::collection::vec(step(ranks), 1..60))),
        depth in prop::sample::select(vec![2_usize, 4, 8]),
        slot in prop::sample::select(vec![64_usize, 256, 4096]),
        two_stage_from in prop::sample::select(vec![0_usize, 500, usize::MAX]),
        delays in any::<u64>(),
    ) {
        on_ranks(&plans(ranks, depth, slot), ranks, |rank, _, mut group| {
            group.set_two_stage_from(two_stage_from);
            perform(rank, &mut group, &steps, delays);
        });
    }
}

/// 10^5 operations of random sizes with random delays; without optimisation a twentieth.
#[test]
fn a_long_run_stays_right() {
    let count = if cfg!(debug_assertions) { 5_000 } else { 100_000 };
    for ranks in [2, 3] {
        let steps: Vec<Step> = (0..count)
            .map(|n| match n * 7919 % 13 {
                10 => Step::ReduceScatter(n * 31 % 300, (0..ranks).map(|rank| (rank * 30, n % 101)).collect()),
                11 => {
                    Step::AllToAll((0..ranks).map(|a| (0..ranks).map(|b| (n * (a + 2 * b)) % 90).collect()).collect())
                }
                0..=5 => Step::Reduce(n * 31 % 300),
                6 => Step::Gather((0..ranks).map(|rank| (n + rank * 97) % 500).collect(), Some(n % ranks)),
                7 => Step::Gather((0..ranks).map(|rank| (n + rank * 97) % 500).collect(), None),
                8 => Step::Broadcast(n % 700, n % ranks),
                9 => Step::Message(n % 700, n % ranks),
                _ => Step::Barrier,
            })
            .collect();
        on_ranks(&plans(ranks, 4, 512), ranks, |rank, _, mut group| {
            group.set_two_stage_from(600);
            perform(rank, &mut group, &steps, 0x1234_5678_9abc_def0);
        });
    }
}

#[test]
fn sums_are_taken_in_the_order_of_ranks_and_in_single_precision() {
    // 2^24 + 1 + 1 is 2^24 from the left and 2^24 + 2 from the right.
    let results = on_ranks(&plans(3, 2, 4096), 3, |rank, _, mut group| {
        let mut data = if rank == 0 { 16_777_216.0_f32 } else { 1.0 }.to_le_bytes();
        group.all_reduce(&mut data, Dtype::Float32).unwrap();
        f32::from_le_bytes(data)
    });
    assert_eq!(results, [16_777_216.0; 3]);
    // In bfloat16 256 + 1 is 256; three ranks' 256 + 1 + 1 is 258 if it is rounded once.
    let results = on_ranks(&plans(3, 2, 4096), 3, |rank, _, mut group| {
        let mut data = half::bf16::from_f32(if rank == 0 { 256.0 } else { 1.0 }).to_le_bytes();
        group.all_reduce(&mut data, Dtype::Bfloat16).unwrap();
        half::bf16::from_le_bytes(data).to_f32()
    });
    assert_eq!(results, [258.0; 3]);
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let results = on_ranks(&plans(3, 2, 64), 3, |rank, region, _| {
        let mut group = region.group(0, rank, Duration::ZERO, Some(Duration::from_millis(300)));
        if rank == 1 {
            return None;
        }
        Some(group.barrier().unwrap_err())
    });
    let texts: Vec<String> = results.into_iter().flatten().map(|error| error.to_string()).collect();
    assert_eq!(texts.len(), 2);
    for text in texts {
        assert_eq!(text, "rank 1 did not come to barrier of 0 bytes (operation 0 of group all) within 0.3 s");
    }
}

#[test]
fn ranks_at_different_operations_are_told_both() {
    let results = on_ranks(&plans(2, 2, 4096), 2, |rank, _, mut group| {
        let mut data = [0; 16];
        if rank == 0 {
            group.all_reduce(&mut data, Dtype::Float32)
        } else {
            group.all_reduce(&mut data[..8], Dtype::Float32)
        }
    });
    let texts: Vec<String> = results.into_iter().map(|result| result.unwrap_err().to_string()).collect();
    assert!(
        texts.iter().all(|text| text.contains("4 float32 at rank 0") || text.contains("2 float32 at rank 1")),
        "{texts:?}"
    );
    assert!(texts[0].contains("all_reduce of"), "{texts:?}");
}

#[test]
fn who_waits_is_woken_by_an_abort() {
    let begin = Instant::now();
    let results = on_ranks(&plans(2, 2, 64), 2, |rank, region, mut group| {
        if rank == 0 {
            std::thread::sleep(Duration::from_millis(50));
            region.abort("rank 0 (pid 17) ran out of memory");
            region.abort("this comes second");
        }
        group.barrier().unwrap_err()
    });
    let words = CommError::Aborted("rank 0 (pid 17) ran out of memory".into());
    assert_eq!(results, [words.clone(), words]);
    assert!(begin.elapsed() < Duration::from_millis(900));
}

#[test]
fn bytes_are_counted_where_they_are_written() {
    on_ranks(&plans(2, 2, 64), 2, |rank, region, mut group| {
        let mut data = bytes(&numbers(rank, 0, 100));
        group.all_reduce(&mut data, Dtype::Float32).unwrap();
        group.broadcast(&mut data, 0).unwrap();
        let status = region.status(rank);
        assert_eq!(status.op(Op::AllReduce), (1, 400));
        assert_eq!(status.op(Op::Broadcast), (1, if rank == 0 { 400 } else { 0 }));
        assert_eq!(status.get(Counter::SlotBytes), if rank == 0 { 800 } else { 400 });
    });
}

#[test]
fn what_a_rank_says_can_be_shown_in_another_region() {
    let plans = plans(2, 2, 64);
    let here = Region::open(&Region::memory_file(2, &plans).unwrap(), 2, &plans).unwrap();
    let there = Region::open(&Region::memory_file(2, &plans).unwrap(), 2, &plans).unwrap();
    there.status(1).set(Counter::Steps, 7);
    there.status(1).add(Counter::NodeBytes, 9);
    let words = there.status(1).words();
    here.status(1).set_words(&words);
    assert_eq!((here.status(1).get(Counter::Steps), here.status(1).get(Counter::NodeBytes)), (7, 9));
    assert_eq!(here.status(0).get(Counter::Steps), 0);
    // Another version may have other numbers: what is missing or too much is left alone.
    here.status(0).set_words(&words[..1]);
    here.status(0).set_words(&vec![1; words.len() + 1]);
}

#[test]
fn who_waits_shows_that_it_lives() {
    on_ranks(&plans(2, 2, 64), 2, |rank, region, mut group| {
        if rank == 0 {
            std::thread::sleep(Duration::from_millis(700));
            assert!(region.status(1).get(Counter::Heartbeat) >= 2);
        }
        group.barrier().unwrap();
    });
}

#[test]
fn who_comes_early_does_something_else_meanwhile() {
    let calls = on_ranks(&plans(2, 2, 64), 2, |rank, _, mut group| {
        let mut calls = 0;
        for late in [1, 0] {
            if rank == late {
                std::thread::sleep(Duration::from_millis(50));
            }
            let mut data = bytes(&numbers(rank, 0, 4));
            // There is a lot to do for the one that waits first, and little for the other.
            let mut more = || {
                calls += 1;
                late == 1 || calls < 3
            };
            group.all_reduce_meanwhile(&mut data, Dtype::Float32, &mut more).unwrap();
            let sum: Vec<f32> = numbers(0, 0, 4).iter().zip(numbers(1, 0, 4)).map(|(a, b)| a + b).collect();
            assert_eq!(data, bytes(&sum));
        }
        calls
    });
    assert!(calls[0] > 1000, "{calls:?}");
    assert!((1..1000).contains(&calls[1]), "{calls:?}");
}
