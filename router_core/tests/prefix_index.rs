//! The index against a slow obvious twin that remembers every prompt sent to every target, text and all.

use proptest::prelude::*;
use router_core::prefix_index::{Claim, Layout, Match, Matches, PrefixIndex};
use router_core::prompt::{Endpoint, Prompt, PromptReader};
use serde_json::json;

const TARGETS: usize = 40;
const CAPACITY_BYTES: u64 = 20_000;
/// Residency is kept in whole quanta of this many bytes; the twin counts bytes.
const QUANTUM_BYTES: u64 = CAPACITY_BYTES / 4096;
/// More than any test here fills, so that nothing is evicted for want of room.
const ROOMY_BYTES: usize = 1 << 20;
const LONGEST_BLOCK: u64 = 512;

// -------------------------------------------------------------------------------------------------------------------- twin

/// A chat as (role, text) pairs; roles are `u`ser and `a`ssistant.
type Chat = Vec<(char, String)>;

/// One sent prompt, and its target's clock in bytes when it was sent.
struct Sent {
    chat: Chat,
    at: u64,
}

#[derive(Default)]
struct TwinTarget {
    clock: u64,
    sent: Vec<Sent>,
}

impl TwinTarget {
    /// The least and the most of `chat` that this target may be said to hold, in bytes.
    fn bounds(&self, chat: &Chat) -> (u64, u64) {
        let (mut least, mut most) = (0, 0);
        for sent in &self.sent {
            let age = self.clock - sent.at;
            let (shared, answered) = shared(&sent.chat, chat);
            // The end of a prompt is the first that is given up: it is older by the prompt's length.
            if age + shared < CAPACITY_BYTES - 2 * QUANTUM_BYTES {
                least = least.max(shared.saturating_sub(LONGEST_BLOCK));
            }
            if age < CAPACITY_BYTES + 2 * QUANTUM_BYTES {
                most = most.max(answered);
            }
        }
        (least, most)
    }
}

/// Bytes of text that two chats share from their start, and the same with the answer that the sharer of the question wrote.
fn shared(sent: &Chat, asked: &Chat) -> (u64, u64) {
    let stream = |chat: &Chat| -> Vec<Result<u8, char>> {
        chat.iter().flat_map(|(role, text)| std::iter::once(Err(*role)).chain(text.bytes().map(Ok))).collect()
    };
    let (sent, asked_stream) = (stream(sent), stream(asked));
    let common = sent.iter().zip(&asked_stream).take_while(|(a, b)| a == b).count();
    let bytes = |symbols: &[Result<u8, char>]| symbols.iter().filter(|symbol| symbol.is_ok()).count() as u64;
    let shared = bytes(&asked_stream[..common]);
    let mut answered = shared;
    let mut start = 0;
    for (role, text) in asked {
        if *role == 'a' && start > 0 && start <= common {
            answered = answered.max(bytes(&asked_stream[..start]) + text.len() as u64);
        }
        start += 1 + text.len();
    }
    (shared, answered)
}

fn prompt(chat: &Chat) -> Prompt {
    let messages: Vec<_> = chat
        .iter()
        .map(|(role, text)| json!({"role": if *role == 'u' { "user" } else { "assistant" }, "content": text}))
        .collect();
    PromptReader::new(7).read(Endpoint::Chat, json!({"messages": messages}).to_string().as_bytes()).expect("a chat")
}

/// Both, in step.
struct Pair<'m> {
    index: PrefixIndex<'m>,
    matches: Matches,
    twin: Vec<TwinTarget>,
    last: Option<(u16, Prompt, Claim, bool)>,
}

impl<'m> Pair<'m> {
    fn new(layout: &Layout, memory: &'m mut [u64]) -> Self {
        let mut index = layout.attach(memory);
        (0..TARGETS as u16).for_each(|slot| index.open_target(slot, CAPACITY_BYTES));
        let twin = (0..TARGETS).map(|_| TwinTarget::default()).collect();
        Self { index, matches: Matches::new(TARGETS), twin, last: None }
    }

    fn send(&mut self, slot: u16, chat: &Chat) {
        let prompt = prompt(chat);
        self.index.lookup(&prompt.blocks, &mut self.matches);
        let matched = self.matches.of(slot);
        let uncached = prompt.prompt_bytes - u64::from(matched.bytes);
        let claim = self.index.stamp(slot, &prompt.blocks, matched, uncached);
        let twin = &mut self.twin[usize::from(slot)];
        twin.clock += uncached;
        twin.sent.push(Sent { chat: chat.clone(), at: twin.clock });
        self.last = Some((slot, prompt, claim, matched == Match::default()));
    }

    /// Takes the last claim back; only where nothing was known before it, which is what the twin can undo.
    fn take_back(&mut self) {
        if let Some((slot, prompt, claim, true)) = self.last.take() {
            self.index.take_back(slot, &prompt.blocks, claim);
            self.twin[usize::from(slot)].sent.pop();
        }
    }

    fn forget(&mut self, slot: u16) {
        self.index.forget_target(slot);
        self.twin[usize::from(slot)].sent.clear();
        self.last = None;
    }

    fn advance(&mut self, slot: u16, bytes: u64) {
        self.index.advance(slot, bytes);
        self.twin[usize::from(slot)].clock += bytes;
    }

    fn check(&mut self, chat: &Chat, is_roomy: bool) -> Result<(), TestCaseError> {
        let prompt = prompt(chat);
        self.index.lookup(&prompt.blocks, &mut self.matches);
        for (slot, twin) in self.twin.iter().enumerate() {
            let found = u64::from(self.matches.of(slot as u16).bytes);
            let (least, most) = twin.bounds(chat);
            prop_assert!(found <= most, "target {} is credited with {}, may hold {}", slot, found, most);
            prop_assert!(!is_roomy || found >= least, "target {} is credited with {}, holds {}", slot, found, least);
        }
        prop_assert_eq!(self.index.check_integrity(), Ok(()));
        Ok(())
    }
}

// -------------------------------------------------------------------------------------------------------------- properties

#[derive(Clone, Debug)]
enum Step {
    Send { slot: u16, chat: usize },
    TakeBack,
    Forget(u16),
    Advance { slot: u16, bytes: u64 },
    Evict(usize),
}

/// Chats that share beginnings: each extends, or cuts and changes, one before it.
fn chats() -> impl Strategy<Value = Vec<Chat>> {
    let turn = (prop_oneof![Just('u'), Just('a')], "[ab]{0,3}|[a-z]{50,1500}");
    prop::collection::vec((any::<prop::sample::Index>(), 0..5usize, prop::collection::vec(turn, 1..4)), 1..8).prop_map(
        |recipes| {
            let mut chats: Vec<Chat> = vec![vec![('u', "hello".to_owned())]];
            for (base, keep, turns) in recipes {
                let mut chat = base.get(&chats).clone();
                chat.truncate(keep.max(1));
                chat.extend(turns);
                chats.push(chat);
            }
            chats
        },
    )
}

fn steps(slots: u16) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (0..slots, 0..8usize).prop_map(|(slot, chat)| Step::Send { slot, chat }),
        1 => Just(Step::TakeBack),
        1 => (0..slots).prop_map(Step::Forget),
        2 => (0..slots, 0..CAPACITY_BYTES).prop_map(|(slot, bytes)| Step::Advance { slot, bytes }),
        1 => (1..1000usize).prop_map(Step::Evict),
    ];
    prop::collection::vec(step, 1..60)
}

fn walk(memory_bytes: usize, chats: &[Chat], steps: Vec<Step>) -> Result<(), TestCaseError> {
    let layout = Layout::new(memory_bytes, TARGETS);
    let mut memory = vec![0; layout.words()];
    let mut pair = Pair::new(&layout, &mut memory);
    for step in steps {
        match step {
            Step::Send { slot, chat } => pair.send(slot, &chats[chat % chats.len()]),
            Step::TakeBack => pair.take_back(),
            Step::Forget(slot) => pair.forget(slot),
            Step::Advance { slot, bytes } => pair.advance(slot, bytes),
            Step::Evict(buckets) => drop(pair.index.evict(buckets)),
        }
        for chat in chats {
            pair.check(chat, memory_bytes == ROOMY_BYTES)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn with_room_a_match_is_right_to_one_block(chats in chats(), steps in steps(4)) {
        // Small enough to check the whole table after each step, and more than these chats fill.
        walk(ROOMY_BYTES, &chats, steps.into_iter().take(12).collect())?;
    }

    #[test]
    fn without_room_a_match_still_never_claims_too_much(chats in chats(), steps in steps(TARGETS as u16)) {
        walk(4 << 10, &chats, steps)?;
    }

    #[test]
    fn damaged_memory_does_no_harm(chats in chats(), steps in steps(4), seed in any::<u64>()) {
        let layout = Layout::new(64 << 10, TARGETS);
        let mut state = seed;
        let mut memory: Vec<u64> = (0..layout.words()).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Kinds, counts and numbers in range as well as out of it.
            if state >> 62 == 0 { state >> 8 & 0xFF } else { state ^ state >> 32 }
        }).collect();
        let mut index = layout.attach(&mut memory);
        let mut matches = Matches::new(TARGETS);
        for step in steps {
            match step {
                Step::Send { slot, chat } => {
                    let prompt = prompt(&chats[chat % chats.len()]);
                    index.lookup(&prompt.blocks, &mut matches);
                    let claim = index.stamp(slot, &prompt.blocks, matches.of(slot), prompt.prompt_bytes);
                    index.take_back(slot, &prompt.blocks, claim);
                }
                Step::TakeBack => index.set_capacity(1, CAPACITY_BYTES),
                Step::Forget(slot) => index.forget_target(slot),
                Step::Advance { slot, bytes } => index.advance(slot, bytes),
                Step::Evict(buckets) => drop(index.evict(buckets)),
            }
            let _ = (index.characters(1), index.check_integrity());
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------ by hand

fn with_index(memory_bytes: usize, targets: usize, test: impl FnOnce(&mut PrefixIndex<'_>, &mut Matches)) {
    let layout = Layout::new(memory_bytes, targets);
    let mut memory = vec![0; layout.words()];
    test(&mut layout.attach(&mut memory), &mut Matches::new(targets));
    layout.attach(&mut memory).check_integrity().expect("integrity");
}

fn send(index: &mut PrefixIndex<'_>, matches: &mut Matches, slot: u16, prompt: &Prompt) -> Claim {
    index.lookup(&prompt.blocks, matches);
    let matched = matches.of(slot);
    index.stamp(slot, &prompt.blocks, matched, prompt.prompt_bytes - u64::from(matched.bytes))
}

fn held(index: &PrefixIndex<'_>, matches: &mut Matches, slot: u16, prompt: &Prompt) -> u32 {
    index.lookup(&prompt.blocks, matches);
    matches.of(slot).bytes
}

fn text(seed: usize, bytes: usize) -> Prompt {
    prompt(&vec![('u', format!("{seed} {}", "x".repeat(bytes)))])
}

#[test]
fn a_long_answer_to_a_short_question_is_held_by_who_was_asked() {
    with_index(1 << 20, 2, |index, matches| {
        (0..2).for_each(|slot| index.open_target(slot, 1 << 20));
        let question = ('u', "q".repeat(100));
        let first = prompt(&vec![question.clone()]);
        send(index, matches, 1, &first);
        let second = prompt(&vec![question, ('a', "a".repeat(500)), ('u', "next".into())]);
        assert_eq!(held(index, matches, 1, &second), 600);
        assert_eq!(held(index, matches, 0, &second), 0);
    });
}

#[test]
fn equal_short_prompts_meet() {
    with_index(1 << 20, 2, |index, matches| {
        index.open_target(0, 1 << 20);
        let short = text(1, 8);
        send(index, matches, 0, &short);
        assert_eq!(held(index, matches, 0, &short), short.routed_bytes);
        assert_eq!(matches.holders().collect::<Vec<_>>(), [(0, Match { blocks: 1, bytes: 10 })]);
    });
}

#[test]
fn a_claim_taken_back_leaves_what_was_held_before() {
    with_index(1 << 20, 2, |index, matches| {
        index.open_target(0, 1 << 20);
        let before = prompt(&vec![('u', "x".repeat(1000))]);
        let longer = prompt(&vec![('u', "x".repeat(1000)), ('a', "y".repeat(1000)), ('u', "z".repeat(1000))]);
        send(index, matches, 0, &before);
        let claim = send(index, matches, 0, &longer);
        assert_eq!(held(index, matches, 0, &longer), 3000);
        index.take_back(0, &longer.blocks, claim);
        assert_eq!(held(index, matches, 0, &longer), 2000);
        assert_eq!(held(index, matches, 0, &before), 1000);
    });
}

#[test]
fn removal_and_reuse_of_a_slot_forget_without_a_walk() {
    with_index(1 << 20, 2, |index, matches| {
        let known = text(1, 1000);
        for _ in 0..10_000 {
            index.open_target(0, 1 << 20);
            assert_eq!((held(index, matches, 0, &known), index.characters(0)), (0, 0));
            send(index, matches, 0, &known);
            assert_eq!(held(index, matches, 0, &known), known.routed_bytes);
            index.forget_target(0);
        }
        assert_eq!(held(index, matches, 0, &known), 0);
    });
}

#[test]
fn what_is_older_than_the_capacity_is_forgotten() {
    with_index(1 << 20, 2, |index, matches| {
        index.open_target(0, 10_000);
        let known = text(1, 1000);
        send(index, matches, 0, &known);
        // From its end, as caches give it up.
        index.advance(0, 8_990);
        assert_eq!(held(index, matches, 0, &known), known.routed_bytes);
        let mut left = known.routed_bytes;
        for _ in 0..10 {
            index.advance(0, 100);
            let still_held = held(index, matches, 0, &known);
            assert!(still_held <= left && left - still_held <= 400, "{still_held} of {left}");
            left = still_held;
        }
        assert_eq!(left, 0);
        assert!((9_990..=10_000).contains(&index.characters(0)), "{}", index.characters(0));
        // Being sent again makes it young again, and what is known is not sent twice.
        send(index, matches, 0, &known);
        index.advance(0, 6_000);
        send(index, matches, 0, &known);
        index.advance(0, 6_000);
        assert_eq!(held(index, matches, 0, &known), known.routed_bytes);
    });
}

#[test]
fn what_is_asked_for_again_pushes_down_what_was_used_since() {
    with_index(1 << 20, 2, |index, matches| {
        let (old, young, hot) = (text(1, 2000), text(2, 1000), text(3, 1000));
        let ask_again = |index: &mut PrefixIndex<'_>, prompt: &Prompt| {
            let whole = Match { blocks: prompt.blocks.len() as u32, bytes: prompt.routed_bytes };
            index.lift(0, &prompt.blocks, whole);
            index.stamp(0, &prompt.blocks, whole, 0);
        };
        for (hot_is_asked, old_is_asked, expected) in [(false, false, 1000), (true, false, 1000), (false, true, 0)] {
            index.open_target(0, 10_000);
            send(index, matches, 0, &old);
            index.advance(0, 6_000);
            send(index, matches, 0, &young);
            send(index, matches, 0, &hot);
            for _ in 0..10 * usize::from(hot_is_asked) {
                ask_again(index, &hot);
            }
            if old_is_asked {
                ask_again(index, &old);
            }
            // 1,000 bytes of its own, 1,000 of the hot one, and these: all that fits after it.
            index.advance(0, 7_900);
            let left = held(index, matches, 0, &young);
            assert!(left.abs_diff(expected) < 300, "{left}, not {expected}");
        }
    });
}

#[test]
fn a_smaller_capacity_forgets_at_once_and_a_larger_one_keeps() {
    with_index(1 << 20, 2, |index, matches| {
        index.open_target(0, 1 << 20);
        let known = text(1, 1000);
        send(index, matches, 0, &known);
        index.advance(0, 700 << 10);
        index.set_capacity(0, 2 << 20);
        assert_eq!(held(index, matches, 0, &known), known.routed_bytes);
        index.set_capacity(0, 512 << 10);
        assert_eq!(held(index, matches, 0, &known), 0);
        // Far from the first capacity, ages keep their share of it.
        send(index, matches, 0, &known);
        index.advance(0, 100 << 10);
        index.set_capacity(0, 64 << 20);
        assert_eq!(held(index, matches, 0, &known), known.routed_bytes);
        index.advance(0, 60 << 20);
        assert_eq!(held(index, matches, 0, &known), 0);
    });
}

#[test]
fn a_stamp_never_looks_young_again() {
    // 20 bits of stamps, 4096 quanta a capacity: the stamps wrap every 256 capacities.
    with_index(64 << 10, 4, |index, matches| {
        let known = text(1, 3000);
        (0..4).for_each(|slot| index.open_target(slot, 4096));
        for slot in 0..4 {
            send(index, matches, slot, &known);
        }
        for round in 0..2000u64 {
            index.advance(0, 1700); // in steps that do not divide the wrap
            index.advance(1, 40_000); // in steps longer than the capacity
            (0..1000).for_each(|_| index.forget_target(2)); // without any traffic
            for slot in 0..3 {
                if round > 3 {
                    assert_eq!(held(index, matches, slot, &known), 0, "target {slot}, round {round}");
                }
            }
            // Where nothing happens, nothing is forgotten.
            assert_eq!(held(index, matches, 3, &known), known.routed_bytes);
        }
    });
}

#[test]
fn short_of_dense_rows_a_block_keeps_its_newest_holders() {
    // Too small for a dense row.
    with_index(16 << 10, 100, |index, matches| {
        (0..100).for_each(|slot| index.open_target(slot, 1 << 20));
        let hot = text(1, 1000);
        for slot in 0..14 {
            send(index, matches, slot, &hot);
        }
        index.lookup(&hot.blocks, matches);
        assert_eq!(matches.holders().filter(|(_, found)| found.bytes == hot.routed_bytes).count(), 14);
        // Each is older than the next.
        (0..14).for_each(|slot| index.advance(slot, (20 - u64::from(slot)) << 10));
        for slot in 50..57 {
            send(index, matches, slot, &hot);
        }
        index.lookup(&hot.blocks, matches);
        let mut slots: Vec<u16> = matches.holders().map(|(slot, _)| slot).collect();
        slots.sort_unstable();
        assert_eq!(slots, [7, 8, 9, 10, 11, 12, 13, 50, 51, 52, 53, 54, 55, 56]);
        // Back to entries when few are left.
        (0..56).for_each(|slot| index.forget_target(slot));
        index.evict(usize::MAX);
        assert_eq!(held(index, matches, 56, &hot), hot.routed_bytes);
        index.forget_target(56);
        assert_eq!(index.evict(usize::MAX), hot.blocks.len());
    });
}

#[test]
fn a_full_table_keeps_the_youngest_and_the_beginnings() {
    with_index(64 << 10, 2, |index, matches| {
        index.open_target(0, 1 << 30);
        let prompts: Vec<_> = (0..1000).map(|seed| text(seed, 4000)).collect();
        for prompt in &prompts {
            send(index, matches, 0, prompt);
        }
        let last = held(index, matches, 0, &prompts[999]);
        assert!(last > 3000, "{last}");
        let old: u32 = prompts[..500].iter().map(|prompt| held(index, matches, 0, prompt)).sum();
        assert_eq!(old, 0);
    });
}

#[test]
fn a_layout_fits_its_memory() {
    for memory_bytes in [0, 1 << 10, 1 << 16, 16 << 20, 100_000_000] {
        let layout = Layout::new(memory_bytes, 64);
        let fixed = 64 + 64 * 64 + 64 * 8 + 10 * 64;
        assert!(layout.words() * 8 <= memory_bytes.max(fixed), "{memory_bytes}: {layout:?}");
        assert!(layout.words() * 8 + 1024 >= memory_bytes, "{memory_bytes}: {layout:?}");
    }
}
