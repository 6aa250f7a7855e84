//! A fleet to pick from, for the policies' tests.

use super::{Candidates, Choice, Policy};
use crate::model::ANY;
use crate::prefix_index::Matches;
use crate::prompt::{Endpoint, Prompt, PromptReader};
use crate::region::{MAX_TARGETS, Region};
use crate::target::Work;

pub(super) struct Fleet {
    region: Region,
    reader: PromptReader,
    targets: u16,
    turn: u64,
    routing_key: Option<u64>,
    excluded: Vec<u16>,
}

impl Fleet {
    /// One target per load, each with a cache of `capacity_bytes`.
    pub(super) fn new(loads: &[u64], capacity_bytes: u64) -> Self {
        Self::of_workers(1, loads, capacity_bytes)
    }

    /// The same; every `ranks` of them are one worker.
    pub(super) fn of_workers(ranks: u16, loads: &[u64], capacity_bytes: u64) -> Self {
        let region = Region::anonymous(1 << 20, 1, 0);
        let mut guard = region.lock().unwrap();
        let mut state = guard.state();
        for (slot, &load) in (0..).zip(loads) {
            if slot % ranks == 0 {
                assert_eq!(state.targets.claim(ranks), Some(slot));
            }
            state.index.open_target(slot, capacity_bytes);
            state.models.set_available(slot, 0, true);
            (0..load).for_each(|_| state.targets.begin(slot, Work::default()));
        }
        drop(guard);
        Self {
            region,
            reader: PromptReader::new(1),
            targets: loads.len() as u16,
            turn: 0,
            routing_key: None,
            excluded: Vec::new(),
        }
    }

    /// The target in `slot` gets the first `bytes` of a text of that name.
    pub(super) fn send(&mut self, slot: u16, name: &str, bytes: usize) {
        let prompt = self.prompt(name, bytes);
        let mut guard = self.region.lock().unwrap();
        let index = &mut guard.state().index;
        index.stamp(slot, &prompt.blocks, Default::default(), prompt.prompt_bytes);
    }

    pub(super) fn set_outstanding(&mut self, slot: u16, tokens: u64) {
        self.region.lock().unwrap().state().targets.begin(slot, Work { uncached_tokens: tokens, ..Work::default() });
    }

    /// That many prompt tokens are still to be read at `slot`.
    pub(super) fn queue(&mut self, slot: u16, tokens: f64) {
        let mut guard = self.region.lock().unwrap();
        let mut targets = guard.state().targets;
        let mut speed = targets.speed(slot);
        speed.queue(tokens, 0);
        targets.set_speed(slot, &speed);
    }

    pub(super) fn exclude(&mut self, slots: &[u16]) {
        self.excluded = slots.to_vec();
    }

    pub(super) fn set_routing_key(&mut self, key: u64) {
        self.routing_key = Some(key);
    }

    pub(super) fn set_load(&mut self, slot: u16, load: u64) {
        let mut guard = self.region.lock().unwrap();
        let mut state = guard.state();
        (state.targets.load(slot)..load).for_each(|_| state.targets.begin(slot, Work::default()));
    }

    pub(super) fn pick(&mut self, policy: &dyn Policy, name: &str, bytes: usize) -> u16 {
        let prompt = self.prompt(name, bytes);
        let mut guard = self.region.lock().unwrap();
        let mut state = guard.state();
        let mut candidates = Candidates::new(state.models.available(ANY), state.targets.slot_end());
        self.excluded.iter().for_each(|&slot| candidates.remove(slot));
        let mut matches = Matches::new(MAX_TARGETS);
        state.index.lookup(&prompt.blocks, &mut matches);
        policy.pick(&mut Choice {
            candidates: &candidates,
            blocks: &prompt.blocks,
            matches: &matches,
            prompt_bytes: prompt.routed_bytes,
            targets: &state.targets,
            index: &state.index,
            sticky_keys: &state.sticky_keys,
            routing_key: self.routing_key,
            now_ns: 0,
            random: &mut state.random,
            turn: &mut self.turn,
        })
    }

    /// As the router does it.
    pub(super) fn pick_and_remember(&mut self, policy: &dyn Policy) -> u16 {
        let picked = self.pick(policy, "", 0);
        if let Some(key) = self.routing_key {
            self.remember(key, picked);
        }
        picked
    }

    pub(super) fn remember(&mut self, key: u64, slot: u16) {
        let mut guard = self.region.lock().unwrap();
        let mut state = guard.state();
        state.sticky_keys.remember(key, slot, 0, u64::MAX, &mut state.targets);
    }

    pub(super) fn characters(&self) -> Vec<u64> {
        let mut guard = self.region.lock().unwrap();
        let state = guard.state();
        (0..self.targets).map(|slot| state.index.characters(slot)).collect()
    }

    fn prompt(&self, name: &str, bytes: usize) -> Prompt {
        let text: String = name.chars().chain(std::iter::repeat('.')).take(bytes).collect();
        let body = format!("{{\"text\": \"{text}\"}}");
        self.reader.read(Endpoint::Generate, body.as_bytes()).unwrap()
    }
}
