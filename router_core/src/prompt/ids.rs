//! The keys of prompts of token ids, found from the other end: a cache tells its blocks one by one, each behind another, and what
//! a client would have to ask for them is a prompt of all ids up to there.

use super::blocks::{BlockHash, TEXT_BLOCKS, block_length, mix};
use super::body::namespace;
use super::input::InputKind;

/// A prompt of token ids up to some place, under each of several namespaces.
#[derive(Clone, Debug)]
pub struct IdChain {
    /// After its last whole block; one for each namespace.
    keys: Vec<u64>,
    blocks: usize,
    /// Ids behind the last whole block, 4 bytes each.
    partial: Vec<u8>,
    end: u32,
}

/// A whole block of a prompt of ids, with its key in each namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdBlock {
    /// Which of the prompt's blocks it is.
    pub index: usize,
    /// Bytes of the prompt up to its end.
    pub end: u32,
    /// One for each namespace.
    pub keys: Vec<u64>,
}

impl IdChain {
    /// The empty prompt, for requests that name one of `models` (None: that name none), without LoRA or salt.
    pub(super) fn new(hash: &BlockHash, models: &[Option<&str>]) -> Self {
        let keys = models.iter().map(|model| namespace(hash, InputKind::Ids, *model, &[const { None }; 4])).collect();
        Self { keys, blocks: 0, partial: Vec::new(), end: 0 }
    }

    /// The same with `ids` behind it, and the blocks that become whole by them.
    pub(super) fn extended(&self, hash: &BlockHash, ids: &[u32]) -> (Self, Vec<IdBlock>) {
        let (mut chain, mut whole) = (self.clone(), Vec::new());
        for id in ids {
            chain.partial.extend_from_slice(&id.to_le_bytes());
            chain.end = chain.end.saturating_add(size_of::<u32>() as u32);
            // All lengths are multiples of an id's.
            if chain.partial.len() == block_length(chain.blocks, TEXT_BLOCKS) {
                let own = hash.of(&chain.partial);
                chain.keys.iter_mut().for_each(|key| *key = mix(*key, own));
                whole.push(IdBlock { index: chain.blocks, end: chain.end, keys: chain.keys.clone() });
                chain.blocks += 1;
                chain.partial.clear();
            }
        }
        (chain, whole)
    }
}

#[cfg(test)]
mod tests {
    use crate::prompt::{Endpoint, PromptReader};

    #[test]
    fn blocks_told_one_by_one_are_those_of_the_whole_prompt() {
        let reader = PromptReader::new(7);
        let ids: Vec<u32> = (0..5_000).map(|i| i * 77 % 31_000).collect();
        let generate = format!("{{\"input_ids\": {ids:?}}}");
        let completions = format!("{{\"model\": \"m\", \"prompt\": {ids:?}}}");
        let asked = [(Endpoint::Generate, generate), (Endpoint::Completions, completions)];
        let prompts = asked.map(|(endpoint, body)| reader.read(endpoint, body.as_bytes()).unwrap());
        let mut chain = reader.id_chain(&[None, Some("m")]);
        let mut told = Vec::new();
        for page in ids.chunks(16) {
            let (longer, whole) = reader.extend_ids(&chain, page);
            chain = longer;
            told.extend(whole);
        }
        // The prompt's last block ends with it, and is no block of a longer one.
        assert_eq!(told.len(), prompts[0].blocks.len() - 1);
        for (namespace, prompt) in prompts.iter().enumerate() {
            for (block, told) in prompt.blocks.iter().zip(&told) {
                assert_eq!((block.key, block.end), (told.keys[namespace], told.end));
            }
        }
    }
}
