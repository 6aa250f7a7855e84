//! Cutting a canonical stream into blocks and chaining their hashes into keys.

use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::xxh3_64_with_secret;

/// Blocks of the messages or the text of one prompt, at most; with [`TOOL_BLOCKS`], 4,096 a prompt.
pub(super) const TEXT_BLOCKS: usize = 3584;
/// Blocks of the tool definitions of one prompt, at most.
pub(super) const TOOL_BLOCKS: usize = 512;

/// The last blocks of a chain double in length every 16 blocks, so that a chain of any length ends: 16 * 512 bytes * (2 + 4 + ...
/// + 2^16) is more than 1 GB.
const GROWING_BLOCKS: usize = 256;

const SHORT_PROMPT_BLOCKS: usize = 16;

/// Length in bytes of the block with this index. Fine at the start, where prompts part most often; coarse later, because the
/// index pays 16 bytes per block: 18 blocks for the first 4 KB (72 bytes of index per KB), 74 for 32 KB (37 per KB).
pub(super) fn block_length(index: usize, limit: usize) -> usize {
    let growing = limit - GROWING_BLOCKS;
    match index {
        0..4 => 128,
        4..18 => 256,
        _ if index < growing => 512,
        _ => 512 << ((index - growing) / 16 + 1).min(20),
    }
}

/// One block of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Stands for the whole prompt up to the end of this block, within its namespace.
    pub key: u64,
    /// Bytes of prompt text up to the end of this block.
    pub end: u32,
    /// Bytes of prompt text that a target holds which holds this block: `end`, or, if an assistant message begins here or is
    /// under way, the end of that message, since the target wrote it.
    pub credit: u32,
}

/// The seeded hash of blocks.
pub(super) struct BlockHash {
    // Derived once: with a seed instead, XXH3 derives 192 bytes again for each block above 240 bytes (measured: 2x slower).
    secret: [u8; 192],
}

impl BlockHash {
    pub(super) fn new(seed: u64) -> Self {
        Self { secret: const_custom_default_secret(seed) }
    }

    pub(super) fn of(&self, bytes: &[u8]) -> u64 {
        xxh3_64_with_secret(bytes, &self.secret)
    }
}

/// The key of a block from the key before it and its own hash. Not symmetric: `mix(a, b) != mix(b, a)`.
pub(super) fn mix(previous: u64, hash: u64) -> u64 {
    let product =
        u128::from(previous ^ 0x9E37_79B9_7F4A_7C15) * u128::from(hash.rotate_left(32) ^ 0xD1B5_4A32_D192_ED03);
    (product >> 64) as u64 ^ product as u64
}

struct HashedBlock {
    hash: u64,
    end: u32,
}

/// An assistant message: the first block from which a holder is credited with it, and where it ends in bytes.
struct Answer {
    from_block: usize,
    end: u32,
}

/// The blocks of one stream, while it is being fed. Keys come last ([`link`]), since the namespace may stand after the prompt.
pub(super) struct BlockStream<'r> {
    hash: &'r BlockHash,
    limit: usize,
    partial: Vec<u8>,
    blocks: Vec<HashedBlock>,
    answers: Vec<Answer>,
    text_bytes: u32,
}

impl<'r> BlockStream<'r> {
    pub(super) fn new(hash: &'r BlockHash, limit: usize) -> Self {
        // Room for a short prompt at once, and not in three steps.
        let (partial, blocks) =
            (Vec::with_capacity(block_length(SHORT_PROMPT_BLOCKS, limit)), Vec::with_capacity(SHORT_PROMPT_BLOCKS));
        Self { hash, limit, partial, blocks, answers: Vec::new(), text_bytes: 0 }
    }

    /// Bytes of text fed so far.
    pub(super) fn text_bytes(&self) -> u32 {
        self.text_bytes
    }

    /// Feed text: hashed and counted.
    pub(super) fn text(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let missing = block_length(self.blocks.len(), self.limit) - self.partial.len();
            let (head, tail) = rest.split_at(missing.min(rest.len()));
            self.text_bytes += head.len() as u32;
            if head.len() < missing {
                self.partial.extend_from_slice(head);
            } else if self.partial.is_empty() {
                self.close(self.hash.of(head));
            } else {
                self.partial.extend_from_slice(head);
                self.cut();
            }
            rest = tail;
        }
    }

    /// Feed a byte that is structure, not text: hashed, not counted.
    pub(super) fn tag(&mut self, tag: u8) {
        self.partial.push(tag);
        if self.partial.len() == block_length(self.blocks.len(), self.limit) {
            self.cut();
        }
    }

    /// An assistant message begins here.
    pub(super) fn begin_answer(&mut self) {
        if self.blocks.len() < self.limit - GROWING_BLOCKS {
            self.cut();
        }
        // Nothing before it: no target was asked for this message.
        if let Some(last) = self.blocks.len().checked_sub(1) {
            let from_block = if self.partial.is_empty() { last } else { last + 1 };
            self.answers.push(Answer { from_block, end: u32::MAX });
        }
    }

    /// The assistant message that began last ends here.
    pub(super) fn end_answer(&mut self) {
        let end = self.text_bytes;
        if let Some(answer) = self.answers.last_mut() {
            answer.end = end;
        }
    }

    /// End the block that is under way.
    pub(super) fn cut(&mut self) {
        if !self.partial.is_empty() {
            let hash = self.hash.of(&self.partial);
            self.close(hash);
            self.partial.clear();
        }
    }

    fn close(&mut self, hash: u64) {
        self.blocks.push(HashedBlock { hash, end: self.text_bytes });
    }
}

/// The finished chain of a prompt: tool definitions first, whatever their place in the body.
pub(super) fn link(namespace: u64, tools: Option<BlockStream<'_>>, mut stream: BlockStream<'_>) -> Vec<Block> {
    stream.cut();
    let mut linked = Vec::with_capacity(stream.blocks.len() + tools.as_ref().map_or(0, |tools| tools.blocks.len() + 1));
    let mut key = namespace;
    let mut base = 0;
    if let Some(mut tools) = tools {
        tools.cut();
        base = tools.text_bytes;
        for block in &tools.blocks {
            key = mix(key, block.hash);
            linked.push(Block { key, end: block.end, credit: block.end });
        }
    }
    let first = linked.len();
    for block in &stream.blocks {
        key = mix(key, block.hash);
        let end = base + block.end;
        linked.push(Block { key, end, credit: end });
    }
    for answer in &stream.answers {
        let end = base + answer.end;
        for block in &mut linked[first + answer.from_block..] {
            if block.end >= end {
                break;
            }
            block.credit = end;
        }
    }
    linked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(hash: &BlockHash) -> BlockStream<'_> {
        BlockStream::new(hash, TEXT_BLOCKS)
    }

    #[test]
    fn blocks_do_not_depend_on_how_the_text_arrives() {
        let hash = BlockHash::new(7);
        let text: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut whole = stream(&hash);
        whole.text(&text);
        let mut pieces = stream(&hash);
        for piece in text.chunks(77) {
            pieces.text(piece);
        }
        assert_eq!(link(1, None, whole), link(1, None, pieces));
    }

    #[test]
    fn a_chain_of_any_length_keeps_the_limit() {
        let hash = BlockHash::new(7);
        let chunk = vec![b'x'; 1 << 20];
        let mut long = stream(&hash);
        for _ in 0..64 {
            long.text(&chunk);
        }
        for _ in 0..10_000 {
            long.begin_answer();
            long.text(b"a");
            long.end_answer();
        }
        let blocks = link(1, None, long);
        assert!(blocks.len() <= TEXT_BLOCKS, "{}", blocks.len());
        assert_eq!(blocks.last().unwrap().end, 64 * (1 << 20) + 10_000);
    }

    #[test]
    fn every_answer_counts_from_the_block_before_it() {
        let hash = BlockHash::new(7);
        let mut chat = stream(&hash);
        chat.text(b"question");
        chat.begin_answer();
        chat.text(&[b'a'; 300]);
        chat.end_answer();
        chat.text(b"next");
        let ends: Vec<_> = link(1, None, chat).iter().map(|block| (block.end, block.credit)).collect();
        assert_eq!(ends, [(8, 308), (136, 308), (264, 308), (312, 312)]);
    }
}
