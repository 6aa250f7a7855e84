//! From the bytes of a request body to what routing needs of it, in one scan: model, stream, and the prompt as a chain of keys.
//!
//! The body is read once by sonic-rs, driven by visitors that keep what they need and skip the rest; nothing is re-serialised.
//! The prompt is turned into one canonical stream of bytes, so that two clients that say the same thing in other spellings
//! (white space, order of keys, escapes) share a prefix, and the stream is cut into blocks:
//!
//! ```text
//! namespace (kind, model, LoRA, salt, extra key) -> tool definitions -> role tag, text -> role tag, text -> ...
//! key_i = mix(key_{i-1}, XXH3(block_i))           so a key stands for the whole prompt up to the end of its block
//! ```
//!
//! A block ends where its length is reached, where the instructions (system messages) at the beginning end, where an assistant
//! message begins (what came before is what the worker was asked when it wrote that message), and at the end of the prompt. All of that depends on the prefix only: turn n + 1 extends turn n.

mod blocks;
mod body;
mod chat;
mod guard;
mod ids;
mod input;
mod json;

use std::fmt;

pub use blocks::Block;
use blocks::BlockHash;
pub use ids::{IdBlock, IdChain};

/// Which routed path a body came to; decides which fields are the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `/v1/chat/completions`: `messages`, `tools`.
    Chat,
    /// `/v1/completions`: `prompt`, a text, token ids, or a list of either.
    Completions,
    /// `/generate`: `text` or `input_ids`, each also as a list.
    Generate,
}

impl Endpoint {
    /// The endpoint of a path, without a query; None if it is not routed.
    pub fn from_path(path: &[u8]) -> Option<Self> {
        match path {
            b"/v1/chat/completions" => Some(Self::Chat),
            b"/v1/completions" => Some(Self::Completions),
            b"/generate" => Some(Self::Generate),
            _ => None,
        }
    }
}

/// A body that no worker could answer: for the client, an answer of 400.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRequest {
    /// One sentence for the client.
    pub message: String,
    /// The field at fault, when it is one.
    pub param: Option<&'static str>,
}

impl BadRequest {
    fn new(message: impl Into<String>, param: Option<&'static str>) -> Self {
        Self { message: message.into(), param }
    }
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BadRequest {}

/// What routing knows of one request body. Immutable; owned by the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// `model`, as the client wrote it.
    pub model: Option<String>,
    /// Whether the client asked for a stream.
    pub stream: bool,
    /// The routed prompt (of a batch: the first), as a chain of keys; empty when there is no text in it.
    pub blocks: Vec<Block>,
    /// Text of all prompts of the batch in bytes: UTF-8, 4 per token id, tool definitions included.
    pub prompt_bytes: u64,
    /// Of that, the routed prompt's.
    pub routed_bytes: u32,
    /// Prompts in the body; 1 unless a list was sent.
    pub batch: u32,
    /// The dp rank that the client insists on (`data_parallel_rank`, `routed_dp_rank`).
    pub pinned_rank: Option<u32>,
    /// `rid`: the client's name for the request (of a batch: the first), by which it may be aborted.
    pub rid: Option<String>,
    /// `priority`, as the worker's scheduler understands it; no policy reads it.
    pub priority: Option<i64>,
    /// Where the rank that is chosen goes.
    pub rank_place: RankPlace,
}

/// Where in a body that has at least one field `data_parallel_rank` is spliced in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankPlace {
    /// After the brace that opens the body, which ends at this offset.
    First(usize),
    /// Before the brace that closes it, at this offset: a rank is named already (as null), and of duplicate keys the last holds.
    Last(usize),
}

impl RankPlace {
    /// What to insert into the body, and where, so that it names this rank.
    pub fn splice(self, rank: u16) -> (usize, Vec<u8>) {
        match self {
            Self::First(offset) => (offset, format!("\"data_parallel_rank\":{rank},").into_bytes()),
            Self::Last(offset) => (offset, format!(",\"data_parallel_rank\":{rank}").into_bytes()),
        }
    }
}

/// Reads bodies. Immutable after construction; one per process serves all threads.
pub struct PromptReader {
    hash: BlockHash,
}

impl PromptReader {
    /// A reader whose keys depend on `hash_seed`: readers with the same seed give the same keys.
    pub fn new(hash_seed: u64) -> Self {
        Self { hash: BlockHash::new(hash_seed) }
    }

    /// Scan a body once.
    ///
    /// # Errors
    /// [`BadRequest`] for what is not one JSON object in UTF-8, nests deeper than some 64 levels, or lacks or mistypes a field that
    /// routing reads and every worker would refuse as well. Unknown fields are skipped, whatever they are.
    pub fn read(&self, endpoint: Endpoint, body: &[u8]) -> Result<Prompt, BadRequest> {
        body::read(&self.hash, endpoint, body)
    }

    /// The empty prompt of token ids, for requests that name one of `models` (None: that name none), without LoRA or salt.
    pub fn id_chain(&self, models: &[Option<&str>]) -> IdChain {
        IdChain::new(&self.hash, models)
    }

    /// `chain` with `ids` behind it, and the blocks that become whole by them.
    pub fn extend_ids(&self, chain: &IdChain, ids: &[u32]) -> (IdChain, Vec<IdBlock>) {
        chain.extended(&self.hash, ids)
    }
}

impl fmt::Debug for PromptReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PromptReader").finish_non_exhaustive()
    }
}
