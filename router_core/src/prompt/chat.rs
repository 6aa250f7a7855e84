//! `messages`: a role tag and the decoded text of each, whatever the order of the keys in a message or a content part.

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};

use super::blocks::{BlockHash, BlockStream, TEXT_BLOCKS};
use super::input::{Found, Input, InputKind};
use super::json::{
    ASSISTANT, Any, AnyScalar, DIGEST, END, FreeForm, FreeFormList, NAME, Name, OTHER_ROLE, PART, SYSTEM, Scalar, Skip,
    TOOL, TOOL_CALLS, USER, visit_alike,
};

/// Reads `messages`.
pub(super) struct Messages<'r> {
    pub(super) hash: &'r BlockHash,
}

impl<'de, 'r> Visitor<'de> for Messages<'r> {
    type Value = Input<'r>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("messages")
    }

    visit_alike!(Input::Absent; null);
    visit_alike!(Input::Wrong("must be a list of messages"); bool number string object);

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Input<'r>, A::Error> {
        let mut stream = BlockStream::new(self.hash, TEXT_BLOCKS);
        let mut message = Message::default();
        let mut wrong = None;
        let mut count = 0usize;
        let mut only_system = true;
        while let Some(result) = seq.next_element_seed(Any(message.seed(self.hash)))? {
            count += 1;
            match result {
                Ok(()) => {
                    // Where instructions end prompts part most often, and a block that ends later would be shared by none of them.
                    if only_system && message.role != Role::System {
                        stream.cut();
                        only_system = false;
                    }
                    message.feed(&mut stream);
                }
                Err(reason) => wrong = wrong.or(Some(reason)),
            }
        }
        Ok(match wrong {
            Some(reason) => Input::Wrong(reason),
            None if count == 0 => Input::Wrong("must not be empty"),
            None => Input::Found(Found { kind: InputKind::Chat, stream, other_bytes: 0, batch: 1 }),
        })
    }
}

/// One message, set aside until its role is known and its last key read; its buffers serve all messages of a body in turn.
#[derive(Default)]
struct Message {
    role: Role,
    other_role: String,
    name: String,
    content: Vec<u8>,
    tool_calls: Vec<u8>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Role {
    #[default]
    Missing,
    System,
    User,
    Assistant,
    Tool,
    Other,
}

impl Message {
    fn seed<'m>(&'m mut self, hash: &'m BlockHash) -> MessageSeed<'m> {
        self.role = Role::Missing;
        self.name.clear();
        self.content.clear();
        self.tool_calls.clear();
        MessageSeed { hash, message: self }
    }

    fn set_role(&mut self, value: Scalar<'_>) {
        self.role = match value {
            Scalar::Text(role) => match &*role {
                "system" => Role::System,
                "user" => Role::User,
                "assistant" => Role::Assistant,
                "tool" => Role::Tool,
                other => {
                    self.other_role.clear();
                    self.other_role.push_str(other);
                    Role::Other
                }
            },
            _ => Role::Missing,
        };
    }

    fn feed(&self, stream: &mut BlockStream<'_>) {
        match self.role {
            Role::Assistant => {
                stream.begin_answer();
                stream.tag(ASSISTANT);
            }
            Role::System => stream.tag(SYSTEM),
            Role::User => stream.tag(USER),
            Role::Tool => stream.tag(TOOL),
            Role::Other | Role::Missing => {
                stream.tag(OTHER_ROLE);
                stream.text(self.other_role.as_bytes());
                stream.tag(END);
            }
        }
        if !self.name.is_empty() {
            stream.tag(NAME);
            stream.text(self.name.as_bytes());
            stream.tag(END);
        }
        stream.text(&self.content);
        if !self.tool_calls.is_empty() {
            stream.tag(TOOL_CALLS);
            stream.text(&self.tool_calls);
        }
        if self.role == Role::Assistant {
            stream.end_answer();
        }
    }
}

enum MessageKey {
    Role,
    Name,
    Content,
    ToolCalls,
    Other,
}

struct MessageSeed<'m> {
    hash: &'m BlockHash,
    message: &'m mut Message,
}

impl<'de> Visitor<'de> for MessageSeed<'_> {
    type Value = Result<(), &'static str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message")
    }

    visit_alike!(Err("must be a list of objects"); null bool number string array);

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let message = self.message;
        let mut content = Ok(());
        let key = |name: &str| match name {
            "role" => MessageKey::Role,
            "name" => MessageKey::Name,
            "content" => MessageKey::Content,
            "tool_calls" => MessageKey::ToolCalls,
            _ => MessageKey::Other,
        };
        while let Some(key) = map.next_key_seed(Name(key))? {
            match key {
                MessageKey::Role => message.set_role(map.next_value_seed(Any(AnyScalar))?),
                MessageKey::Name => {
                    message.name.clear();
                    if let Scalar::Text(name) = map.next_value_seed(Any(AnyScalar))? {
                        message.name.push_str(&name);
                    }
                }
                MessageKey::Content => {
                    message.content.clear();
                    content = map.next_value_seed(Any(Content { hash: self.hash, out: &mut message.content }))?;
                }
                MessageKey::ToolCalls => {
                    message.tool_calls.clear();
                    map.next_value_seed(Any(FreeFormList(&mut message.tool_calls)))?;
                }
                MessageKey::Other => map.next_value_seed(Any(Skip::default()))?,
            }
        }
        Ok(if message.role == Role::Missing { Err("must have a 'role' in each message") } else { content })
    }
}

/// Reads `content`: a string, or a list of parts.
struct Content<'o> {
    hash: &'o BlockHash,
    out: &'o mut Vec<u8>,
}

const WRONG_CONTENT: &str = "must have text or a list of parts as 'content'";

impl<'de> Visitor<'de> for Content<'_> {
    type Value = Result<(), &'static str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("message content")
    }

    visit_alike!(Ok(()); null);
    visit_alike!(Err(WRONG_CONTENT); bool number object);

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        self.out.extend_from_slice(text.as_bytes());
        Ok(Ok(()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut result = Ok(());
        let mut is_first = true;
        loop {
            let start = self.out.len();
            // Parts are kept apart, but one text part equals plain text.
            if !is_first {
                self.out.push(PART);
            }
            match seq.next_element_seed(Any(Part { hash: self.hash, out: self.out }))? {
                Some(part) => result = result.and(part),
                None => {
                    self.out.truncate(start);
                    return Ok(result);
                }
            }
            is_first = false;
        }
    }
}

enum PartKey {
    Type,
    Text,
    /// Says nothing about the prompt.
    CacheControl,
    /// An image, audio, a video, a file ...: the hash of its name.
    Media(u64),
}

/// Reads one content part: its text, or a digest of everything else in it.
struct Part<'o> {
    hash: &'o BlockHash,
    out: &'o mut Vec<u8>,
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Result<(), &'static str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a content part")
    }

    visit_alike!(Err(WRONG_CONTENT); null bool number array);

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        self.out.extend_from_slice(text.as_bytes());
        Ok(Ok(()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let start = self.out.len();
        let mut media: Vec<(u64, usize, u64)> = Vec::new();
        let key = |name: &str| match name {
            "type" => PartKey::Type,
            "text" => PartKey::Text,
            "cache_control" => PartKey::CacheControl,
            other => PartKey::Media(self.hash.of(other.as_bytes())),
        };
        while let Some(key) = map.next_key_seed(Name(key))? {
            match key {
                PartKey::Text => {
                    self.out.truncate(start);
                    map.next_value_seed(Any(PartText(self.out)))?;
                }
                PartKey::Type | PartKey::CacheControl => map.next_value_seed(Any(Skip::default()))?,
                PartKey::Media(name) => {
                    let mut canonical = Vec::new();
                    map.next_value_seed(Any(FreeForm::new(&mut canonical)))?;
                    media.push((name, media.len(), self.hash.of(&canonical)));
                }
            }
        }
        // By name, and of duplicates the last.
        media.sort_unstable_by_key(|&(name, order, _)| (name, std::cmp::Reverse(order)));
        media.dedup_by_key(|&mut (name, ..)| name);
        for (name, _, value) in media {
            self.out.push(DIGEST);
            self.out.extend_from_slice(&name.to_le_bytes());
            self.out.extend_from_slice(&value.to_le_bytes());
        }
        Ok(Ok(()))
    }
}

struct PartText<'o>(&'o mut Vec<u8>);

impl<'de> Visitor<'de> for PartText<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text")
    }

    visit_alike!((); null bool number array object);

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}
