//! What only the inside can show.

use super::*;

#[test]
fn operations_are_counted_round_and_round() {
    let plans = [GroupPlan { name: "all".into(), members: vec![0, 1, 2], depth: 2, slot_bytes: 64 }];
    let file = Region::memory_file(3, &plans).unwrap();
    let all_set = std::sync::Barrier::new(3);
    std::thread::scope(|scope| {
        for rank in 0..3 {
            let (plans, file, all_set) = (&plans, &file, &all_set);
            scope.spawn(move || {
                let region = Region::open(file, 3, plans).unwrap();
                let mut group = region.group(0, rank, Duration::from_micros(10), Some(Duration::from_secs(20)));
                // As if four billion operations had been done.
                group.next = u32::MAX - 20;
                group.signal(rank).set(group.next);
                all_set.wait();
                for round in 0..50_u8 {
                    let mut data = [f32::from(round) + rank as f32; 3].map(f32::to_le_bytes).concat();
                    group.all_reduce(&mut data, Dtype::Float32).unwrap();
                    let sum = 3.0 * f32::from(round) + 3.0;
                    assert_eq!(data, [sum; 3].map(f32::to_le_bytes).concat());
                }
            });
        }
    });
}
