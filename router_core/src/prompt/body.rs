//! The top level of a body: collects the fields that routing reads, each with its last value, and makes the [`Prompt`] of them.

use std::fmt;

use serde::de::{DeserializeSeed, MapAccess, Visitor};
use sonic_rs::Deserializer as JsonDeserializer;

use super::blocks::{BlockHash, BlockStream, TOOL_BLOCKS, link};
use super::chat::Messages;
use super::guard::{self, Refusal};
use super::input::{EXPECTED_ID, Input, InputKind, InputSeed, WRONG};
use super::json::{Any, AnyScalar, FreeFormList, MAX_DEPTH, Name, Scalar, Skip, TOO_DEEP, visit_alike};
use super::{BadRequest, Endpoint, Prompt, RankPlace};

/// sonic-rs and the ends of blocks count bytes in 32 bits.
const MAX_BODY_BYTES: usize = u32::MAX as usize / 2;

pub(super) fn read(hash: &BlockHash, endpoint: Endpoint, body: &[u8]) -> Result<Prompt, BadRequest> {
    if body.len() > MAX_BODY_BYTES {
        return Err(BadRequest::new("The body is too large.", None));
    }
    // Checked as a whole before parsing: many times faster than string by string, and what follows may rely on it.
    let text = simdutf8::basic::from_utf8(body).map_err(|_| BadRequest::new("The body is not valid UTF-8.", None))?;
    guard::check(text, MAX_DEPTH).map_err(|refusal| match refusal {
        Refusal::TooDeep => malformed(TOO_DEEP),
        Refusal::Malformed(error) => malformed(&error.to_string()),
    })?;
    // A lone surrogate escape is read as U+FFFD instead of being refused: Python and JavaScript clients send them, and whether to
    // answer them is the worker's decision.
    let mut json = JsonDeserializer::from_str(text).utf8_lossy();
    let fields = Fields::new(hash, endpoint);
    let fields = Any(fields).deserialize(&mut json).and_then(|fields| json.end().map(|()| fields));
    let fields = fields.map_err(|error| unreadable(endpoint, &error.to_string()))?;
    let fields = fields.ok_or_else(|| BadRequest::new("The body must be a JSON object.", None))?;
    let rank_place = if fields.names_rank {
        RankPlace::Last(text.trim_end().len() - 1)
    } else {
        RankPlace::First(text.len() - text.trim_start().len() + 1)
    };
    fields.into_prompt(hash, rank_place)
}

/// What a chain of keys begins with: only prompts of one kind, model, adapter and salt meet.
pub(super) fn namespace(hash: &BlockHash, kind: InputKind, model: Option<&str>, others: &[Option<String>; 4]) -> u64 {
    let mut namespace = Vec::with_capacity(64);
    namespace.push(kind as u8);
    for part in std::iter::once(model).chain(others.iter().map(Option::as_deref)) {
        // Length first, so that no two lists of parts read alike; 0 for what is absent.
        let part = part.unwrap_or_default();
        namespace.extend_from_slice(&(part.len() as u32).to_le_bytes());
        namespace.extend_from_slice(part.as_bytes());
    }
    hash.of(&namespace)
}

fn unreadable(endpoint: Endpoint, reason: &str) -> BadRequest {
    if !reason.contains(EXPECTED_ID) {
        return malformed(reason);
    }
    let param = if endpoint == Endpoint::Completions { "prompt" } else { "input_ids" };
    BadRequest::new(format!("'{param}' {WRONG}."), Some(param))
}

fn malformed(reason: &str) -> BadRequest {
    // Of sonic-rs' message only the first line: the rest draws the spot in the body, and bodies do not belong into logs.
    let reason = reason.lines().next().unwrap_or_default();
    BadRequest::new(format!("The body is not valid JSON: {reason}"), None)
}

#[derive(Clone, Copy)]
enum Field {
    Model,
    Stream,
    Messages,
    Tools,
    Prompt,
    Text,
    InputIds,
    InputEmbeds,
    PinnedRank,
    Rid,
    Priority,
    Namespace(NamespaceField),
    Other,
}

#[derive(Clone, Copy)]
enum NamespaceField {
    LoraPath,
    LoraId,
    CacheSalt,
    ExtraKey,
}

impl Field {
    fn of(name: &str) -> Self {
        match name {
            "model" => Self::Model,
            "stream" => Self::Stream,
            "messages" => Self::Messages,
            "tools" => Self::Tools,
            "prompt" => Self::Prompt,
            "text" => Self::Text,
            "input_ids" => Self::InputIds,
            "input_embeds" | "prompt_embeds" => Self::InputEmbeds,
            "data_parallel_rank" | "routed_dp_rank" => Self::PinnedRank,
            "rid" => Self::Rid,
            "priority" => Self::Priority,
            "lora_path" => Self::Namespace(NamespaceField::LoraPath),
            "lora_id" => Self::Namespace(NamespaceField::LoraId),
            "cache_salt" => Self::Namespace(NamespaceField::CacheSalt),
            "extra_key" => Self::Namespace(NamespaceField::ExtraKey),
            _ => Self::Other,
        }
    }
}

/// The fields of a body that routing reads, as far as they have been read.
struct Fields<'r, 'de> {
    hash: &'r BlockHash,
    endpoint: Endpoint,
    model: Scalar<'de>,
    stream: Scalar<'de>,
    pinned_rank: Scalar<'de>,
    /// Whether a rank is named at all, be it null.
    names_rank: bool,
    rid: Scalar<'de>,
    priority: Scalar<'de>,
    namespace: [Option<String>; 4],
    tools: Option<BlockStream<'r>>,
    messages: Input<'r>,
    text: Input<'r>,
    input_ids: Input<'r>,
    has_embeds: bool,
}

impl<'r, 'de> Fields<'r, 'de> {
    fn new(hash: &'r BlockHash, endpoint: Endpoint) -> Self {
        Self {
            hash,
            endpoint,
            model: Scalar::Null,
            stream: Scalar::Null,
            pinned_rank: Scalar::Null,
            names_rank: false,
            rid: Scalar::Null,
            priority: Scalar::Null,
            namespace: [const { None }; 4],
            tools: None,
            messages: Input::Absent,
            text: Input::Absent,
            input_ids: Input::Absent,
            has_embeds: false,
        }
    }

    fn read_field<A: MapAccess<'de>>(&mut self, field: Field, map: &mut A) -> Result<(), A::Error> {
        match (field, self.endpoint) {
            (Field::Model, _) => self.model = map.next_value_seed(Any(AnyScalar))?,
            (Field::Stream, _) => self.stream = map.next_value_seed(Any(AnyScalar))?,
            (Field::PinnedRank, _) => {
                self.names_rank = true;
                // Of the two names one may be null: the other one counts.
                match map.next_value_seed(Any(AnyScalar))? {
                    Scalar::Null => {}
                    rank => self.pinned_rank = rank,
                }
            }
            (Field::Rid, _) => self.rid = map.next_value_seed(Any(AnyScalar))?,
            (Field::Priority, _) => self.priority = map.next_value_seed(Any(AnyScalar))?,
            (Field::Namespace(field), _) => {
                self.namespace[field as usize] = match map.next_value_seed(Any(AnyScalar))? {
                    Scalar::Text(text) => Some(text.into_owned()),
                    Scalar::TextList(first) => Some(first),
                    _ => None,
                };
            }
            (Field::Tools, Endpoint::Chat) => self.read_tools(map)?,
            (Field::Messages, Endpoint::Chat) => {
                self.messages = map.next_value_seed(Any(Messages { hash: self.hash }))?
            }
            (Field::Prompt, Endpoint::Completions) | (Field::Text, Endpoint::Generate) => {
                self.text = map.next_value_seed(Any(InputSeed { hash: self.hash }))?;
            }
            (Field::InputIds, Endpoint::Generate) => {
                self.input_ids = map.next_value_seed(Any(InputSeed { hash: self.hash }))?;
            }
            (Field::InputEmbeds, _) => {
                map.next_value_seed(Any(Skip::default()))?;
                self.has_embeds = true;
            }
            _ => map.next_value_seed(Any(Skip::default()))?,
        }
        Ok(())
    }

    fn read_tools<A: MapAccess<'de>>(&mut self, map: &mut A) -> Result<(), A::Error> {
        let mut canonical = Vec::new();
        map.next_value_seed(Any(FreeFormList(&mut canonical)))?;
        self.tools = (!canonical.is_empty()).then(|| {
            let mut tools = BlockStream::new(self.hash, TOOL_BLOCKS);
            tools.text(&canonical);
            tools
        });
        Ok(())
    }

    fn into_prompt(self, hash: &BlockHash, rank_place: RankPlace) -> Result<Prompt, BadRequest> {
        let model = match self.model {
            Scalar::Null => None,
            Scalar::Text(name) => Some(name.into_owned()),
            // A field that `/generate` does not know; any value may stand there.
            _ if self.endpoint == Endpoint::Generate => None,
            _ => return Err(BadRequest::new("'model' must be a string.", Some("model"))),
        };
        let stream = match self.stream {
            Scalar::Null => false,
            Scalar::Bool(stream) => stream,
            Scalar::Unsigned(number @ 0..=1) => number == 1,
            _ => return Err(BadRequest::new("'stream' must be true or false.", Some("stream"))),
        };
        let pinned_rank = match self.pinned_rank {
            Scalar::Null => None,
            Scalar::Unsigned(rank) if rank <= u64::from(u32::MAX) => Some(rank as u32),
            _ => {
                let message = "'data_parallel_rank' must be a number, 0 or more.";
                return Err(BadRequest::new(message, Some("data_parallel_rank")));
            }
        };
        let (input, param) = match self.endpoint {
            Endpoint::Chat => (self.messages, "messages"),
            Endpoint::Completions => (self.text, "prompt"),
            Endpoint::Generate if matches!(self.text, Input::Absent) => (self.input_ids, "input_ids"),
            Endpoint::Generate => (self.text, "text"),
        };
        let found = match input {
            Input::Found(found) => found,
            Input::Wrong(message) => return Err(BadRequest::new(format!("'{param}' {message}."), Some(param))),
            // Nothing to match, but a worker can answer it.
            Input::Absent if self.has_embeds => super::input::Found::nothing(hash),
            Input::Absent => {
                let (message, param) = match self.endpoint {
                    Endpoint::Chat => ("'messages' is required.", "messages"),
                    Endpoint::Completions => ("'prompt' is required.", "prompt"),
                    Endpoint::Generate => ("One of 'text' and 'input_ids' is required.", "text"),
                };
                return Err(BadRequest::new(message, Some(param)));
            }
        };
        let namespace = namespace(hash, found.kind, model.as_deref(), &self.namespace);
        let tools_bytes = self.tools.as_ref().map_or(0, BlockStream::text_bytes);
        let routed_bytes = tools_bytes + found.stream.text_bytes();
        Ok(Prompt {
            model,
            stream,
            prompt_bytes: u64::from(routed_bytes) + found.other_bytes,
            routed_bytes,
            batch: found.batch,
            blocks: link(namespace, self.tools, found.stream),
            pinned_rank,
            // Neither is the router's to refuse.
            rid: match self.rid {
                Scalar::Text(rid) => Some(rid.into_owned()),
                Scalar::TextList(first) => Some(first),
                _ => None,
            },
            priority: match self.priority {
                Scalar::Unsigned(priority) => i64::try_from(priority).ok(),
                Scalar::Negative(priority) => Some(priority),
                _ => None,
            },
            rank_place,
        })
    }
}

// `None`: the body is JSON, but not an object.
impl<'de, 'r> Visitor<'de> for Fields<'r, 'de> {
    type Value = Option<Fields<'r, 'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request body")
    }

    visit_alike!(None; null bool number string array);

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        while let Some(field) = map.next_key_seed(Name(Field::of))? {
            self.read_field(field, &mut map)?;
        }
        Ok(Some(self))
    }
}
