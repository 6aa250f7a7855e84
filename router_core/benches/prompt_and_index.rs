//! What reading a body and walking the index cost: medians in ns, one core. `cargo bench --bench prompt_and_index`.
//!
//! *hot*: two prefixes in turn, whose holders are spread over the fleet; *all* is read + lookup + stamp.
//! Bodies are chats of natural text with one escape per 60 bytes. *known*: the prefix is held, 1 KB is new; *new*: nothing is.

use std::hint::black_box;
use std::time::Instant;

use router_core::prefix_index::{Layout, Match, Matches};
use router_core::prompt::{Endpoint, Prompt, PromptReader};

const INDEX_BYTES: usize = 16 << 20;
const TARGETS: usize = 1024;
const CAPACITY_BYTES: u64 = 64 << 20;
const SIZES: [(&str, usize); 3] = [("1 KB", 1 << 10), ("32 KB", 32 << 10), ("220 KB", 220 << 10)];

fn main() {
    println!("{:34}{:>12}{:>12}{:>12}", "median ns", SIZES[0].0, SIZES[1].0, SIZES[2].0);
    for (name, unit) in [
        ("chat, escape per 60 bytes", LATIN),
        ("chat, every character escaped", ESCAPED),
        ("chat, UTF-8 Chinese", CHINESE),
    ] {
        row(&format!("read: {name}"), |size| time_read(Endpoint::Chat, |seed| chat(unit, size, seed)));
    }
    row("read: token ids", |size| time_read(Endpoint::Generate, |seed| ids(size, seed)));
    for holders in [1, 2, 16, 512] {
        row(&format!("lookup + stamp: known to {holders}"), |size| time_index(size, holders, true));
    }
    row("lookup + stamp: new", |size| time_index(size, 1, false));
    // Few prefixes, as those that hundreds hold are. For 220 KB held by 16 and more this index has too few dense rows.
    for (fleet, holders) in [(16, 1), (1024, 1), (1024, 16), (1024, 512)] {
        row(&format!("hot, lookup: {fleet} targets, {holders} hold"), |size| time_hot(size, fleet, holders, false));
        row(&format!("hot, all: {fleet} targets, {holders} hold"), |size| time_hot(size, fleet, holders, true));
    }
}

const LATIN: &str = "The quick brown fox jumps over the lazy dog and runs away.\\n";
const ESCAPED: &str = "\\u4f60\\u597d\\uff0c\\u4e16\\u754c\\u3002";
const CHINESE: &str = "你好，世界。今天天气很好，我们去公园散步吧。";

/// The end of a chat's body.
const TAIL: &str = r#""}],"stream":true,"max_tokens":64}"#;

fn row(name: &str, mut measure: impl FnMut(usize) -> u64) {
    let results: Vec<String> = SIZES.iter().map(|&(_, size)| format!("{:>12}", measure(size))).collect();
    println!("{name:34}{}", results.concat());
}

/// A chat body of about `size` bytes; another seed, another prompt.
fn chat(unit: &str, size: usize, seed: usize) -> Vec<u8> {
    let mut body = format!(r#"{{"model":"demo","messages":[{{"role":"user","content":"{seed} "#);
    while body.len() < size {
        body.push_str(unit);
    }
    body.push_str(TAIL);
    body.into_bytes()
}

fn ids(size: usize, seed: usize) -> Vec<u8> {
    let mut body = format!(r#"{{"input_ids":[{seed}"#);
    while body.len() < size {
        body.push_str(",10543");
    }
    body.push_str("]}");
    body.into_bytes()
}

fn median(mut samples: Vec<u64>) -> u64 {
    samples.sort_unstable();
    samples[samples.len() / 2]
}

fn time_read(endpoint: Endpoint, body: impl Fn(usize) -> Vec<u8>) -> u64 {
    let reader = PromptReader::new(7);
    // Different bodies in turn, as on a busy server: each is read from memory that the last one has not just warmed.
    let bodies: Vec<_> = (0..16).map(body).collect();
    let sample = |round: usize| {
        let body = &bodies[round % bodies.len()];
        let start = Instant::now();
        black_box(reader.read(endpoint, black_box(body)).expect("a valid body"));
        start.elapsed().as_nanos() as u64
    };
    median((0..2000).map(sample).collect())
}

fn time_index(size: usize, holders: u16, known: bool) -> u64 {
    let reader = PromptReader::new(7);
    let read = |size, seed| reader.read(Endpoint::Chat, &chat(LATIN, size, seed)).expect("a valid body");
    let layout = Layout::new(INDEX_BYTES, TARGETS);
    // Written once, so that no page of it is met for the first time below.
    let mut memory = vec![1; layout.words()];
    memory.fill(0);
    let mut index = layout.attach(&mut memory);
    let mut matches = Matches::new(TARGETS);
    for slot in 0..TARGETS as u16 {
        index.open_target(slot, CAPACITY_BYTES);
    }
    // What all of it fits in: the capacity of a target and the rows of the table.
    let rounds = (32 << 20) / size.max(64 << 10);
    let prompts: Vec<Prompt> = (0..rounds).map(|seed| read(size, seed)).collect();
    // The known part of each prompt: all but its last KB.
    let prefixes: Vec<Prompt> = (0..rounds).map(|seed| read(size.saturating_sub(1 << 10), seed)).collect();
    if known {
        for prompt in &prefixes {
            for slot in 0..holders {
                index.lookup(&prompt.blocks, &mut matches);
                let matched = matches.of(slot);
                index.stamp(slot, &prompt.blocks, matched, prompt.prompt_bytes - u64::from(matched.bytes));
            }
        }
    }
    let sample = |prompt: &Prompt| {
        let start = Instant::now();
        index.lookup(black_box(&prompt.blocks), &mut matches);
        let matched = matches.of(0);
        black_box(index.stamp(0, &prompt.blocks, matched, prompt.prompt_bytes - u64::from(matched.bytes)));
        start.elapsed().as_nanos() as u64
    };
    median(prompts.iter().map(sample).collect())
}

fn time_hot(size: usize, fleet: u16, holders: u16, all: bool) -> u64 {
    const PREFIXES: usize = 2;
    const ROUNDS: usize = 600;
    let reader = PromptReader::new(7);
    let prefix = |seed| chat(LATIN, size.saturating_sub(1 << 10).max(512), seed);
    let body = |round: usize| {
        let mut text = prefix(round % PREFIXES);
        text.truncate(text.len() - TAIL.len());
        text.extend(format!("{round} {}", LATIN.repeat(size.min(1 << 10) / LATIN.len())).bytes());
        text.extend(TAIL.bytes());
        text
    };
    let layout = Layout::new(INDEX_BYTES, usize::from(fleet));
    let mut memory = vec![1; layout.words()];
    memory.fill(0);
    let mut index = layout.attach(&mut memory);
    let mut matches = Matches::new(usize::from(fleet));
    (0..fleet).for_each(|slot| index.open_target(slot, CAPACITY_BYTES));
    let holder = |number: usize| (number % usize::from(holders)) as u16 * (fleet / holders);
    for prompt in (0..PREFIXES).map(|seed| reader.read(Endpoint::Chat, &prefix(seed)).expect("a valid body")) {
        for slot in (0..usize::from(holders)).map(holder) {
            index.stamp(slot, &prompt.blocks, Match::default(), prompt.prompt_bytes);
        }
    }
    let bodies: Vec<_> = (0..ROUNDS).map(body).collect();
    let sample = |round: usize| {
        let slot = holder(round * 37);
        let mut start = Instant::now();
        let prompt = reader.read(Endpoint::Chat, black_box(&bodies[round])).expect("a valid body");
        if !all {
            start = Instant::now();
        }
        index.lookup(black_box(&prompt.blocks), &mut matches);
        let matched = matches.of(slot);
        let mut elapsed = start.elapsed();
        black_box(index.stamp(slot, &prompt.blocks, matched, prompt.prompt_bytes - u64::from(matched.bytes)));
        if all {
            elapsed = start.elapsed();
        }
        elapsed.as_nanos() as u64
    };
    median((0..ROUNDS).map(sample).collect())
}
