//! Events of KV caches: after them the index credits a rank with what it holds, down to whole blocks of the index.

mod fleet;

use std::collections::BTreeSet;

use fleet::{Fleet, MODEL, settings};
use proptest::prelude::*;
use router_core::kv_mirror::Stored;
use router_core::outcome::OutcomeKind;
use router_core::prompt::{Endpoint, PromptReader};

const PAGE: usize = 16;
const GPU: u8 = 1;
const CPU: u8 = 2;

fn ids(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| seed.wrapping_mul(7_919).wrapping_add(i * 31) % 50_000).collect()
}

/// Hashes of the pages of `tokens`, as an engine could make them.
fn hashes(tokens: &[u32]) -> Vec<u64> {
    let mut before = 14_695_981_039_346_656_037u64;
    let page = |page: &[u32]| {
        let mix = |hash: u64, token: &u32| (hash ^ u64::from(*token)).wrapping_mul(1_099_511_628_211).rotate_left(13);
        before = page.iter().fold(before, mix);
        before
    };
    tokens.chunks_exact(PAGE).map(page).collect()
}

fn store(fleet: &Fleet, slot: u16, tokens: &[u32], first_page: usize, medium: u8) {
    let hashes = hashes(tokens);
    let stored = Stored {
        hashes: &hashes[first_page..],
        parent: first_page.checked_sub(1).map(|before| hashes[before]),
        tokens: &tokens[first_page * PAGE..hashes.len() * PAGE],
        block_size: PAGE,
        medium,
        plain: true,
    };
    assert_eq!(fleet.router.kv_stored(slot, &stored), Ok(true));
}

fn held(fleet: &Fleet, slot: u16, body: &str) -> u32 {
    let endpoint = if body.contains("prompt") { Endpoint::Completions } else { Endpoint::Generate };
    let explained = fleet.router.explain(endpoint, b"", body.as_bytes(), fleet.now_ns).unwrap();
    explained.candidates.iter().find(|candidate| candidate.slot == slot).unwrap().match_bytes
}

fn asking(tokens: &[u32]) -> String {
    format!("{{\"input_ids\": {tokens:?}}}")
}

/// What can be credited at most when that many tokens of the prompt are held.
fn whole_blocks(tokens: &[u32], held_tokens: usize) -> u32 {
    // One more, so that the block that ends with the prompt is none of these.
    let longer = [tokens, &[0]].concat();
    let prompt = PromptReader::new(1).read(Endpoint::Generate, asking(&longer).as_bytes()).unwrap();
    let inner = &prompt.blocks[..prompt.blocks.len() - 1];
    inner.iter().map(|block| block.end).filter(|&end| end as usize <= held_tokens * 4).max().unwrap_or_default()
}

fn fed(ranks: usize) -> Fleet {
    let fleet = Fleet::new(settings(), 0);
    for slot in fleet.add(&[MODEL, "alias"], ranks) {
        fleet.router.kv_begin(slot, &[MODEL.to_owned(), "alias".to_owned()], false, true).unwrap();
    }
    fleet
}

#[test]
fn a_rank_is_credited_with_what_was_stored_until_it_is_removed() {
    let fleet = fed(2);
    let tokens = ids(1_000, 1);
    store(&fleet, 1, &tokens[..496], 0, GPU);
    assert_eq!((held(&fleet, 0, &asking(&tokens)), held(&fleet, 1, &asking(&tokens))), (0, 448 * 4));
    // The rest comes later, behind what is there.
    store(&fleet, 1, &tokens, 31, GPU);
    assert_eq!(held(&fleet, 1, &asking(&tokens)), whole_blocks(&tokens, 992));
    let names = hashes(&tokens);
    fleet.router.kv_removed(1, &names[10..], Some(GPU)).unwrap();
    assert_eq!(held(&fleet, 1, &asking(&tokens)), whole_blocks(&tokens, 160));
    assert_eq!(fleet.router.kv_view(1).map(|view| (view.blocks, view.tokens, view.unmapped)), Some((10, 160, 0)));
    fleet.router.kv_removed(1, &names[..10], None).unwrap();
    assert_eq!(held(&fleet, 1, &asking(&tokens)), 0);
    fleet.router.check_integrity().unwrap();
}

#[test]
fn it_is_found_under_each_name_of_the_model_and_under_none() {
    let fleet = fed(1);
    let tokens = ids(200, 2);
    store(&fleet, 0, &tokens, 0, GPU);
    for name in [MODEL, "alias"] {
        assert_eq!(held(&fleet, 0, &format!("{{\"model\": \"{name}\", \"prompt\": {tokens:?}}}")), 192 * 4);
    }
    let salted = format!("{{\"model\": \"{MODEL}\", \"prompt\": {tokens:?}, \"cache_salt\": \"s\"}}");
    assert_eq!(held(&fleet, 0, &salted), 0);
}

#[test]
fn what_cannot_be_placed_is_counted_and_not_credited() {
    let fleet = fed(1);
    let tokens = ids(400, 3);
    let names = hashes(&tokens);
    let stored = Stored {
        hashes: &names[5..],
        parent: Some(names[4]),
        tokens: &tokens[80..],
        block_size: PAGE,
        medium: GPU,
        plain: true,
    };
    assert_eq!(fleet.router.kv_stored(0, &stored), Ok(true));
    assert_eq!((held(&fleet, 0, &asking(&tokens)), fleet.router.kv_view(0).unwrap().unmapped), (0, 20));
    // With an adapter the same tokens are another text.
    let adapted = Stored { hashes: &names[..5], parent: None, tokens: &tokens[..80], plain: false, ..stored };
    assert_eq!(fleet.router.kv_stored(0, &adapted), Ok(true));
    assert_eq!(held(&fleet, 0, &asking(&tokens)), 0);
    for wrong in [
        Stored { tokens: &tokens[..79], ..adapted },
        Stored { block_size: 0, ..adapted },
        Stored { block_size: usize::MAX, ..adapted },
        Stored { medium: 0, ..adapted },
    ] {
        assert_eq!(fleet.router.kv_stored(0, &wrong), Ok(false));
    }
}

#[test]
fn a_block_is_held_as_long_as_any_medium_has_it() {
    let fleet = fed(1);
    let tokens = ids(64, 4);
    store(&fleet, 0, &tokens, 0, GPU);
    store(&fleet, 0, &tokens, 0, CPU);
    assert_eq!(fleet.router.kv_view(0).unwrap().tokens, 64);
    let prompt = asking(&ids(65, 4));
    fleet.router.kv_removed(0, &hashes(&tokens), Some(GPU)).unwrap();
    assert_eq!(held(&fleet, 0, &prompt), 256);
    fleet.router.kv_removed(0, &hashes(&tokens), Some(CPU)).unwrap();
    assert_eq!(held(&fleet, 0, &prompt), 0);
}

#[test]
fn a_snapshot_replaces_what_was_known() {
    let fleet = fed(1);
    let (old, new) = (ids(320, 5), ids(320, 6));
    store(&fleet, 0, &old, 0, GPU);
    let names = hashes(&new);
    let block = |page: usize| (names[page], page.checked_sub(1).map(|p| names[p]), new[page * PAGE..][..PAGE].to_vec());
    let snapshot: Vec<_> = (0..20).map(block).collect();
    fleet.router.kv_resync(0, &snapshot).unwrap();
    assert_eq!((held(&fleet, 0, &asking(&old)), held(&fleet, 0, &asking(&new))), (0, whole_blocks(&new, 320)));
    // The router forgot (a refused connection), the cache did not: the same snapshot brings it back.
    fleet.router.restart_worker(0).unwrap();
    assert_eq!(held(&fleet, 0, &asking(&new)), 0);
    fleet.router.kv_resync(0, &snapshot).unwrap();
    assert_eq!(held(&fleet, 0, &asking(&new)), whole_blocks(&new, 320));
    fleet.router.kv_begin(0, &[MODEL.to_owned()], true, true).unwrap();
    assert_eq!(held(&fleet, 0, &asking(&new)), 0, "a new cache is empty");
}

#[test]
fn text_ages_by_what_the_cache_took_in_whoever_sent_it() {
    for is_fed in [false, true] {
        let fleet = Fleet::new(settings(), 0);
        fleet.add(&[MODEL], 1);
        fleet.router.set_kv_capacity(0, 1_024).unwrap();
        if is_fed {
            fleet.router.kv_begin(0, &[MODEL.to_owned()], false, true).unwrap();
        }
        let request = fleet.text(&"t".repeat(2_048));
        fleet.release(&fleet.select(&request), OutcomeKind::Answered, 200);
        let text = format!("{{\"text\": \"{}\"}}", "t".repeat(2_048));
        assert_eq!(held(&fleet, 0, &text), 2_048);
        if is_fed {
            store(&fleet, 0, &ids(512, 7), 0, GPU);
            assert_eq!(held(&fleet, 0, &text), 2_048, "the prompt itself, as the cache tells it");
            store(&fleet, 0, &ids(512, 8), 0, GPU);
            store(&fleet, 0, &ids(512, 9), 0, GPU);
        }
        assert_eq!(held(&fleet, 0, &text), if is_fed { 0 } else { 2_048 });
    }
}

#[test]
fn the_capacity_is_what_a_cache_held_when_it_gave_something_up() {
    let fleet = fed(1);
    fleet.router.set_kv_capacity(0, 1_024).unwrap();
    let request = fleet.text(&"t".repeat(1_600));
    fleet.release(&fleet.select(&request), OutcomeKind::Answered, 200);
    let text = format!("{{\"text\": \"{}\"}}", "t".repeat(1_600));
    let others = ids(480, 10);
    store(&fleet, 0, &others, 0, GPU);
    assert_eq!(held(&fleet, 0, &text), 1_600);
    fleet.router.kv_removed(0, &hashes(&others)[5..], Some(GPU)).unwrap();
    assert_eq!(held(&fleet, 0, &text), 0, "80 tokens is all that it keeps");
    // Whoever came late knows no size: what it has not seen may be held as well.
    fleet.router.kv_begin(0, &[MODEL.to_owned()], false, false).unwrap();
    fleet.router.set_kv_capacity(0, 2_048).unwrap();
    store(&fleet, 0, &others, 0, GPU);
    let before = fleet.router.target(0).unwrap().index_characters;
    fleet.router.kv_removed(0, &hashes(&others)[5..], Some(GPU)).unwrap();
    assert_eq!(fleet.router.target(0).unwrap().index_characters, before);
}

#[test]
fn what_was_told_before_a_loss_does_not_count() {
    let fleet = fed(1);
    let tokens = ids(320, 12);
    store(&fleet, 0, &tokens, 0, GPU);
    let text = "t".repeat(600);
    fleet.release(&fleet.select(&fleet.text(&text)), OutcomeKind::Answered, 200);
    fleet.router.kv_begin(0, &[MODEL.to_owned()], false, false).unwrap();
    assert_eq!(held(&fleet, 0, &asking(&tokens)), 0);
    assert_eq!(held(&fleet, 0, &format!("{{\"text\": \"{text}\"}}")), 600, "what was sent still does");
}

#[test]
fn nobody_is_fed_on_anothers_account() {
    let fleet = fed(1);
    let tokens = ids(64, 11);
    fleet.router.remove_worker(0).unwrap();
    assert_eq!(fleet.add(&[MODEL], 1), [0]);
    assert!(fleet.router.kv_removed(0, &hashes(&tokens), None).is_err());
    assert!(fleet.router.kv_resync(1, &[]).is_err());
    assert!(fleet.router.kv_begin(7, &[], true, true).is_err());
    fleet.router.kv_end(0).unwrap();
    assert_eq!(fleet.router.kv_view(0), None);
}

/// A path in a tree of pages: what stands in a page depends on all choices up to it.
fn path_tokens(path: &[u8]) -> Vec<u32> {
    let page = |depth: usize| {
        let seed = path[..=depth].iter().fold(1u32, |seed, choice| seed.wrapping_mul(31) + u32::from(*choice));
        ids(PAGE, seed)
    };
    (0..path.len()).flat_map(page).collect()
}

#[derive(Clone, Debug)]
enum Event {
    Store(Vec<u8>),
    /// The leaf that comes at that place in their order.
    Remove(usize),
    Resync,
    Clear,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => prop::collection::vec(0u8..2, 1..14).prop_map(Event::Store),
        6 => any::<prop::sample::Index>().prop_map(|place| Event::Remove(place.index(1_000))),
        1 => Just(Event::Resync),
        1 => Just(Event::Clear),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_credits_what_a_slow_twin_holds(events in prop::collection::vec(event(), 1..40)) {
        let fleet = fed(2);
        let mut twin: BTreeSet<Vec<u8>> = BTreeSet::new();
        let name = |path: &[u8]| *hashes(&path_tokens(path)).last().unwrap();
        for event in events {
            match event {
                Event::Store(path) => {
                    let known = (0..path.len()).take_while(|&depth| twin.contains(&path[..=depth])).count();
                    if known < path.len() {
                        store(&fleet, 1, &path_tokens(&path), known, GPU);
                        twin.extend((known..path.len()).map(|depth| path[..=depth].to_vec()));
                    }
                }
                Event::Remove(place) => {
                    let is_leaf = |path: &&Vec<u8>| !twin.iter().any(|other| other.len() > path.len() && other.starts_with(path));
                    let leaves: Vec<_> = twin.iter().filter(is_leaf).cloned().collect();
                    if let Some(leaf) = leaves.get(place % leaves.len().max(1)) {
                        fleet.router.kv_removed(1, &[name(leaf)], Some(GPU)).unwrap();
                        twin.remove(leaf);
                    }
                }
                Event::Resync => {
                    let mut paths: Vec<_> = twin.iter().collect();
                    paths.sort_by_key(|path| path.len());
                    let block = |path: &&Vec<u8>| {
                        let before = (path.len() > 1).then(|| name(&path[..path.len() - 1]));
                        (name(path), before, path_tokens(path)[(path.len() - 1) * PAGE..].to_vec())
                    };
                    fleet.router.kv_resync(1, &paths.iter().map(block).collect::<Vec<_>>()).unwrap();
                }
                Event::Clear => {
                    fleet.router.kv_begin(1, &[MODEL.to_owned()], true, true).unwrap();
                    twin.clear();
                }
            }
        }
        for path in twin.iter().cloned().chain([vec![0; 13], vec![1; 13], vec![0, 1, 0, 1, 1, 0, 0, 1]]) {
            let tokens = [path_tokens(&path), vec![1]].concat();
            let known = (0..path.len()).take_while(|&depth| twin.contains(&path[..=depth])).count();
            prop_assert_eq!(held(&fleet, 1, &asking(&tokens)), whole_blocks(&tokens, known * PAGE), "{:?}", path);
            prop_assert_eq!(held(&fleet, 0, &asking(&tokens)), 0);
        }
        fleet.router.check_integrity().unwrap();
    }
}
