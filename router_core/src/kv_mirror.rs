//! What one rank's KV cache holds, as its events tell: blocks of tokens, each behind another, named by hashes that the engine made.
//!
//! Of each block the mirror knows which blocks of the prefix index end in it, if requests with token ids can ask for them: such a
//! block is held as long as the cache's block is, since caches give up a prompt from its end. A block whose beginning is unknown
//! (events were lost), or that is not for every request (an adapter, an image), is counted and stands for no block of the index.

use std::collections::HashMap;

use crate::prompt::{IdBlock, IdChain, PromptReader};

/// A block as a snapshot lists it: its hash, that of the block before it, its tokens.
pub type SnapshotBlock = (u64, Option<u64>, Vec<u32>);

/// The medium of a block that a snapshot listed, which does not tell: it is gone when it is given up anywhere.
const SOMEWHERE: u8 = 1 << 7;

/// What an event changed for the index.
#[derive(Debug, Default)]
pub struct Changes {
    /// Blocks of the index that are held now.
    pub held: Vec<IdBlock>,
    /// Those that are not any more.
    pub dropped: Vec<IdBlock>,
    /// Tokens that the cache did not have before.
    pub new_tokens: u64,
    /// Whether the cache gave anything up.
    pub evicted: bool,
}

/// The event of stored blocks, as SGLang and vLLM tell it.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'e> {
    /// Of consecutive blocks.
    pub hashes: &'e [u64],
    /// Of the block before the first; None: the first begins a prompt.
    pub parent: Option<u64>,
    /// Of all blocks.
    pub tokens: &'e [u32],
    /// Tokens of a block.
    pub block_size: usize,
    /// One bit, not the highest: where they are kept.
    pub medium: u8,
    /// Whether any request with these tokens finds them: no adapter, no image.
    pub plain: bool,
}

#[derive(Debug)]
struct Node {
    /// Bits of where it is kept; never 0.
    media: u8,
    tokens: u32,
    /// None: what stands before it is not known.
    chain: Option<IdChain>,
    /// Blocks of the index that end in it.
    ends: Vec<IdBlock>,
}

/// One rank's cache.
#[derive(Debug)]
pub struct Mirror {
    root: IdChain,
    nodes: HashMap<u64, Node>,
    tokens: u64,
}

impl Mirror {
    /// Of an empty cache that serves `models`.
    pub fn new(reader: &PromptReader, models: &[String]) -> Self {
        let names: Vec<Option<&str>> = std::iter::once(None).chain(models.iter().map(|name| Some(&**name))).collect();
        Self { root: reader.id_chain(&names), nodes: HashMap::new(), tokens: 0 }
    }

    /// Blocks that it holds.
    pub fn blocks(&self) -> usize {
        self.nodes.len()
    }

    /// Tokens that it holds.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Of its blocks, those that stand for nothing in the index because their beginning is not known.
    pub fn unmapped(&self) -> usize {
        self.nodes.values().filter(|node| node.chain.is_none()).count()
    }

    /// Blocks were stored. None: the event contradicts itself.
    pub fn store(&mut self, reader: &PromptReader, stored: &Stored<'_>) -> Option<Changes> {
        let needed = stored.hashes.len().checked_mul(stored.block_size)?;
        if stored.block_size == 0 || stored.tokens.len() != needed || stored.medium == 0 {
            return None;
        }
        let mut changes = Changes::default();
        let mut before = stored.parent;
        for (&hash, tokens) in stored.hashes.iter().zip(stored.tokens.chunks(stored.block_size)) {
            self.add(reader, hash, (before, tokens), (stored.medium, stored.plain), &mut changes);
            before = Some(hash);
        }
        Some(changes)
    }

    /// Blocks were given up in a medium; None: wherever they were.
    pub fn remove(&mut self, hashes: &[u64], medium: Option<u8>) -> Changes {
        let mut changes = Changes::default();
        for hash in hashes {
            let Some(node) = self.nodes.get_mut(hash) else { continue };
            let medium = medium.filter(|_| node.media & SOMEWHERE == 0);
            node.media &= !medium.unwrap_or(u8::MAX);
            if node.media == 0 {
                self.tokens -= u64::from(node.tokens);
                changes.evicted = true;
                changes.dropped.extend(self.nodes.remove(hash).map(|node| node.ends).unwrap_or_default());
            }
        }
        changes
    }

    /// The cache holds just `snapshot`, in which each block stands behind the one before it.
    pub fn resync(&mut self, reader: &PromptReader, snapshot: &[SnapshotBlock]) -> Changes {
        let mut changes = Changes::default();
        let mut known = std::mem::take(&mut self.nodes);
        self.tokens = 0;
        for (hash, before, tokens) in snapshot {
            let mut added = Changes::default();
            self.add(reader, *hash, (*before, tokens), (SOMEWHERE, true), &mut added);
            changes.held.append(&mut added.held);
            if known.remove(hash).is_none() {
                changes.new_tokens += added.new_tokens;
            }
        }
        changes.evicted = !known.is_empty();
        changes.dropped = known.into_values().flat_map(|node| node.ends).collect();
        changes
    }

    /// Blocks of the index that are held.
    pub fn held(&self) -> impl Iterator<Item = &IdBlock> {
        self.nodes.values().flat_map(|node| &node.ends)
    }

    /// Forgets everything; the blocks of the index that were held.
    pub fn take_all(&mut self) -> Vec<IdBlock> {
        self.tokens = 0;
        self.nodes.drain().flat_map(|(_, node)| node.ends).collect()
    }

    fn add(
        &mut self,
        reader: &PromptReader,
        hash: u64,
        (before, tokens): (Option<u64>, &[u32]),
        (medium, plain): (u8, bool),
        changes: &mut Changes,
    ) {
        if let Some(node) = self.nodes.get_mut(&hash) {
            node.media |= medium;
            changes.held.extend_from_slice(&node.ends);
            return;
        }
        let before = match before {
            None => Some(&self.root),
            Some(before) => self.nodes.get(&before).and_then(|node| node.chain.as_ref()),
        };
        let (chain, ends) = before.filter(|_| plain).map_or((None, Vec::new()), |before| {
            let (chain, ends) = reader.extend_ids(before, tokens);
            (Some(chain), ends)
        });
        changes.held.extend_from_slice(&ends);
        changes.new_tokens += tokens.len() as u64;
        self.tokens += tokens.len() as u64;
        self.nodes.insert(hash, Node { media: medium, tokens: tokens.len() as u32, chain, ends });
    }
}
