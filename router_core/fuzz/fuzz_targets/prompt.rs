//! Any bytes as a body: never a panic; what is taken is JSON, and its blocks make sense.
#![no_main]

use libfuzzer_sys::fuzz_target;
use router_core::prompt::{Endpoint, PromptReader};

fuzz_target!(|body: &[u8]| {
    let reader = PromptReader::new(7);
    for endpoint in [Endpoint::Chat, Endpoint::Completions, Endpoint::Generate] {
        let Ok(prompt) = reader.read(endpoint, body) else { continue };
        let mut end = 0;
        for block in &prompt.blocks {
            assert!(block.end >= end && block.credit >= block.end && block.credit <= prompt.routed_bytes);
            end = block.end;
        }
        assert!(prompt.blocks.is_empty() || end == prompt.routed_bytes);
        assert!(u64::from(prompt.routed_bytes) <= prompt.prompt_bytes);
        // What is spliced in must hold: the body stays a body of the same prompt.
        let mut spliced = body.to_vec();
        let (offset, inserted) = prompt.rank_place.splice(3);
        spliced.splice(offset..offset, inserted);
        let spliced = reader.read(endpoint, &spliced).expect("still a body");
        assert_eq!((spliced.pinned_rank, &spliced.blocks), (Some(3), &prompt.blocks));
        // The oracle refuses lone surrogates and very large numbers, which are not the router's to judge.
        if let Err(error) = serde_json::from_slice::<serde_json::Value>(body) {
            let text = error.to_string();
            let known = ["surrogate", "out of range", "escape", "recursion limit"];
            assert!(known.iter().any(|known| text.contains(known)), "taken, but: {text}");
        }
    }
});
