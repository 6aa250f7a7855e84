//! The index with hundreds of targets against a slow obvious twin that remembers who was sent which block. No target fills up
//! here, so the two must agree exactly.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;
use router_core::prefix_index::{Claim, Layout, Match, Matches, PrefixIndex};
use router_core::prompt::{Block, Endpoint, Prompt, PromptReader};
use serde_json::json;

/// Not a multiple of a chunk's slots, nor of a word's bits.
const TARGETS: usize = 1000;
const CAPACITY_BYTES: u64 = 1 << 40;
/// Dense rows for all the blocks of the tests here.
const ROOMY_BYTES: usize = 4 << 20;
/// A handful of dense rows.
const SCARCE_BYTES: usize = 200 << 10;

/// Lengths of the beginning of the one text that the prompts share. Blocks end inside the text and at the end of a prompt.
const PROMPT_BYTES: [usize; 6] = [40, 300, 1000, 1500, 2500, 4000];

fn prompts() -> Vec<Prompt> {
    let text: String = (0..1000).map(|number| format!("{number:04}")).collect();
    let body = |bytes: usize| json!({"text": text[..bytes]}).to_string();
    let read = |bytes| PromptReader::new(7).read(Endpoint::Generate, body(bytes).as_bytes()).expect("a prompt");
    PROMPT_BYTES.map(read).into()
}

/// Who holds what, in step with the index.
struct Pair<'m> {
    index: PrefixIndex<'m>,
    matches: Matches,
    /// By target, the keys of the blocks that it was sent since it was forgotten last.
    twin: Vec<HashSet<u64>>,
    last: Option<(u16, usize, Claim)>,
    prompts: Vec<Prompt>,
}

impl<'m> Pair<'m> {
    fn new(layout: &Layout, memory: &'m mut [u64]) -> Self {
        let mut index = layout.attach(memory);
        (0..TARGETS as u16).for_each(|slot| index.open_target(slot, CAPACITY_BYTES));
        let twin = vec![HashSet::new(); TARGETS];
        Self { index, matches: Matches::new(TARGETS), twin, last: None, prompts: prompts() }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Send { first, stride, count, prompt } => {
                for number in 0..count {
                    self.send(((first + number * stride) % TARGETS) as u16, prompt % self.prompts.len());
                }
            }
            Step::TakeBack => self.take_back(),
            Step::Forget { first, stride, count } => {
                for number in 0..count {
                    let slot = (first + number * stride) % TARGETS;
                    self.index.forget_target(slot as u16);
                    self.twin[slot].clear();
                }
                self.last = None;
            }
            Step::Evict(buckets) => drop(self.index.evict(buckets)),
        }
    }

    fn send(&mut self, slot: u16, prompt: usize) {
        let blocks = &self.prompts[prompt].blocks;
        self.index.lookup(blocks, &mut self.matches);
        let claim = self.index.stamp(slot, blocks, self.matches.of(slot), 100);
        self.twin[usize::from(slot)].extend(blocks.iter().map(|block| block.key));
        self.last = Some((slot, prompt, claim));
        // What was held before this prompt is known to the twin by key; the claim knows it by depth.
        if self.matches.of(slot) != Match::default() {
            self.last = None;
        }
    }

    /// Takes the last claim back, where nothing was held before it.
    fn take_back(&mut self) {
        if let Some((slot, prompt, claim)) = self.last.take() {
            let blocks = &self.prompts[prompt].blocks;
            self.index.take_back(slot, blocks, claim);
            let taken: HashSet<u64> = blocks.iter().map(|block| block.key).collect();
            self.twin[usize::from(slot)].retain(|key| !taken.contains(key));
        }
    }

    fn check(&mut self, is_roomy: bool) -> Result<(), TestCaseError> {
        for prompt in &self.prompts {
            self.index.lookup(&prompt.blocks, &mut self.matches);
            let found: HashMap<u16, Match> = self.matches.holders().collect();
            prop_assert_eq!(found.len(), self.matches.holders().count(), "a holder is named twice");
            for (slot, keys) in self.twin.iter().enumerate() {
                let slot = slot as u16;
                let expected = deepest(&prompt.blocks, keys);
                let found = found.get(&slot).copied().unwrap_or_default();
                prop_assert_eq!(found, self.matches.of(slot));
                if is_roomy {
                    prop_assert_eq!(found, expected, "target {}", slot);
                } else {
                    prop_assert!(found.blocks <= expected.blocks, "target {}: {:?}, not {:?}", slot, found, expected);
                }
            }
        }
        prop_assert_eq!(self.index.check_integrity(), Ok(()));
        Ok(())
    }
}

fn deepest(blocks: &[Block], keys: &HashSet<u64>) -> Match {
    let last = (0..blocks.len()).rev().find(|&index| keys.contains(&blocks[index].key));
    last.map_or(Match::default(), |index| Match { blocks: index as u32 + 1, bytes: blocks[index].credit })
}

#[derive(Clone, Debug)]
enum Step {
    Send { first: usize, stride: usize, count: usize, prompt: usize },
    TakeBack,
    Forget { first: usize, stride: usize, count: usize },
    Evict(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // One, about as many as a row has places, and many.
    let count = || prop_oneof![Just(1usize), 10..20usize, 100..TARGETS];
    let slots = || (0..TARGETS, 1..70usize, count());
    let step = prop_oneof![
        6 => (slots(), 0..8usize).prop_map(|((first, stride, count), prompt)| Step::Send { first, stride, count, prompt }),
        1 => Just(Step::TakeBack),
        3 => slots().prop_map(|(first, stride, count)| Step::Forget { first, stride, count }),
        2 => prop_oneof![1..1000usize, Just(usize::MAX)].prop_map(Step::Evict),
    ];
    prop::collection::vec(step, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn with_room_every_target_is_scored_exactly(steps in steps()) {
        let layout = Layout::new(ROOMY_BYTES, TARGETS);
        let mut memory = vec![0; layout.words()];
        let mut pair = Pair::new(&layout, &mut memory);
        for step in &steps {
            pair.apply(step);
            pair.check(true)?;
        }
    }

    #[test]
    fn without_room_no_target_is_credited_with_too_much(steps in steps()) {
        let layout = Layout::new(SCARCE_BYTES, TARGETS);
        let mut memory = vec![0; layout.words()];
        let mut pair = Pair::new(&layout, &mut memory);
        for step in &steps {
            pair.apply(step);
            pair.check(false)?;
        }
    }

    #[test]
    fn damaged_rows_do_no_harm(before in steps(), after in steps(), swaps in prop::collection::vec(any::<[prop::sample::Index; 2]>(), 1..2000)) {
        let layout = Layout::new(SCARCE_BYTES, TARGETS);
        let mut memory = vec![0; layout.words()];
        let mut pair = Pair::new(&layout, &mut memory);
        before.iter().for_each(|step| pair.apply(step));
        // Numbers of other rows and chunks, in the wrong places. Zeroes are left where they are: most of the memory is.
        let used: Vec<usize> = (0..memory.len()).filter(|&at| memory[at] != 0).collect();
        for [from, to] in swaps {
            memory.swap(*from.get(&used), *to.get(&used));
        }
        let mut pair = Pair::new(&layout, &mut memory);
        after.iter().for_each(|step| pair.apply(step));
        let _ = pair.check(false);
    }
}

fn fleet(memory_bytes: usize, slots: impl Iterator<Item = usize>, text_bytes: usize) -> (usize, usize) {
    let layout = Layout::new(memory_bytes, 4096);
    let mut memory = vec![0; layout.words()];
    let mut index = layout.attach(&mut memory);
    let body = json!({"text": "x".repeat(text_bytes)}).to_string();
    let prompt = PromptReader::new(7).read(Endpoint::Generate, body.as_bytes()).expect("a prompt");
    let mut sent = 0;
    for slot in slots {
        index.open_target(slot as u16, CAPACITY_BYTES);
        index.stamp(slot as u16, &prompt.blocks, Match::default(), prompt.prompt_bytes);
        sent += 1;
    }
    // Every block, not just the last.
    let mut matches = Matches::new(4096);
    let whole = (1..=prompt.blocks.len()).map(|end| {
        index.lookup(&prompt.blocks[..end], &mut matches);
        matches.holders().filter(|(_, found)| found.blocks as usize == end).count()
    });
    let fewest = whole.min().expect("blocks");
    index.check_integrity().expect("integrity");
    (sent, fewest)
}

/// An index whose dense rows, a sixteenth of it, have so much memory.
fn with_dense_bytes(dense_bytes: usize) -> usize {
    let clocks_bytes = 4096 * (64 + 8);
    dense_bytes * 16 + clocks_bytes
}

#[test]
fn a_prefix_of_32_kb_held_by_1024_targets_takes_400_kb() {
    // Besides, only its entries of 16 bytes.
    assert_eq!(fleet(with_dense_bytes(396 << 10), 0..1024, 32 << 10), (1024, 1024));
}

/// Blocks of a prompt of `text_bytes`, all of them unlike any other prompt's.
fn unlike(number: u64, template: &[Block]) -> Vec<Block> {
    let scatter = |index: usize| (number << 12 | index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mixed = |word: u64| (word ^ word >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let key = |index| mixed(scatter(index)) ^ mixed(scatter(index)) >> 32;
    template.iter().enumerate().map(|(index, block)| Block { key: key(index), ..*block }).collect()
}

/// KB of index for each MB of text in prompts of `text_bytes`, and which share of that text the default index then knows, when it
/// is filled to `load`.
fn memory_per_text(text_bytes: usize, load: f64) -> (f64, f64) {
    let layout = Layout::new(16 << 20, 4096);
    let mut memory = vec![0; layout.words()];
    let mut index = layout.attach(&mut memory);
    index.open_target(0, CAPACITY_BYTES);
    let body = json!({"text": "x".repeat(text_bytes)}).to_string();
    let template = PromptReader::new(7).read(Endpoint::Generate, body.as_bytes()).expect("a prompt").blocks;
    let prompts = (layout.entries() as f64 * load) as u64 / template.len() as u64;
    for number in 0..prompts {
        index.stamp(0, &unlike(number, &template), Match::default(), text_bytes as u64);
    }
    let mut matches = Matches::new(4096);
    let known: u64 = (0..prompts)
        .map(|number| {
            index.lookup(&unlike(number, &template), &mut matches);
            u64::from(matches.of(0).bytes)
        })
        .sum();
    let sent = prompts * text_bytes as u64;
    let kilobytes_per_megabyte = (layout.words() * 8) as f64 / 1024.0 / (sent as f64 / 1_048_576.0);
    (kilobytes_per_megabyte, known as f64 / sent as f64)
}

#[test]
fn a_megabyte_of_text_takes_100_kb_in_short_prompts_and_60_kb_in_long_ones() {
    for (text_bytes, load, most) in [(4 << 10, 0.9, 100.0), (32 << 10, 0.9, 60.0), (4 << 10, 1.0, 90.0)] {
        let (kilobytes, known) = memory_per_text(text_bytes, load);
        println!("{text_bytes} bytes: {kilobytes:.1} KB per MB, {:.1} % known", known * 100.0);
        assert!(kilobytes <= most, "{kilobytes:.1} KB per MB of prompts of {text_bytes} bytes");
        assert!(known > 0.95, "{:.1} % known", known * 100.0);
    }
}

#[test]
fn a_block_held_by_20_targets_takes_less_than_4_kb_wherever_they_stand() {
    const BLOCKS: usize = 74;
    assert_eq!(fleet(with_dense_bytes(BLOCKS * 3500), (0..20).map(|number| number * 200), 32 << 10), (20, 20));
    assert_eq!(fleet(with_dense_bytes(BLOCKS * 1400), 0..20, 32 << 10), (20, 20));
}

#[test]
fn every_slot_has_a_place() {
    assert_eq!(fleet(4 << 20, 0..4096, 1 << 10), (4096, 4096));
}

#[test]
fn dense_rows_are_found_again() {
    // Room for the dense rows of a few rounds.
    let layout = Layout::new(600 << 10, TARGETS);
    let mut memory = vec![0; layout.words()];
    let mut pair = Pair::new(&layout, &mut memory);
    for round in 0..200 {
        // Round after round the dense rows serve other slots and, half of the time, another prompt.
        for slot in 0..200 {
            pair.send(slot * (1 + round % 5), usize::from(round % 2));
        }
        pair.check(true).expect("agrees");
        (0..TARGETS).for_each(|slot| {
            pair.index.forget_target(slot as u16);
            pair.twin[slot].clear();
        });
        pair.index.evict(usize::MAX);
    }
}
