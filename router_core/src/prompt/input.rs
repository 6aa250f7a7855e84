//! `prompt`, `text`, `input_ids`: a text, token ids, or a list of either.

use std::fmt;

use serde::de::{SeqAccess, Visitor};

use super::blocks::{BlockHash, BlockStream, TEXT_BLOCKS};
use super::json::{Any, Skip, visit_alike};

/// What the canonical stream of a prompt is made of; part of its namespace, so that no kind ever matches another.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum InputKind {
    Chat,
    Text,
    Ids,
}

/// What stands in the field that holds the prompt.
pub(super) enum Input<'r> {
    /// Nothing, or null.
    Absent,
    /// What no worker takes; completes the sentence "'field' ...".
    Wrong(&'static str),
    Found(Found<'r>),
}

/// A prompt, or the first one of a batch.
pub(super) struct Found<'r> {
    pub(super) kind: InputKind,
    pub(super) stream: BlockStream<'r>,
    /// Text of the prompts of the batch after the first.
    pub(super) other_bytes: u64,
    pub(super) batch: u32,
}

impl<'r> Found<'r> {
    pub(super) fn nothing(hash: &'r BlockHash) -> Self {
        Self { kind: InputKind::Text, stream: BlockStream::new(hash, TEXT_BLOCKS), other_bytes: 0, batch: 1 }
    }
}

const WRONG: &str = "must be text, a list of token ids, or a list of either";
const EMPTY: &str = "must not be empty";

/// Reads the field that holds the prompt.
pub(super) struct InputSeed<'r> {
    pub(super) hash: &'r BlockHash,
}

impl<'de, 'r> Visitor<'de> for InputSeed<'r> {
    type Value = Input<'r>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prompt")
    }

    visit_alike!(Input::Absent; null);
    visit_alike!(Input::Wrong(WRONG); bool number object);

    fn visit_str<E>(self, text: &str) -> Result<Input<'r>, E> {
        let mut stream = BlockStream::new(self.hash, TEXT_BLOCKS);
        stream.text(text.as_bytes());
        Ok(Input::Found(Found { kind: InputKind::Text, stream, other_bytes: 0, batch: 1 }))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Input<'r>, A::Error> {
        let mut bytes = Vec::new();
        let first = seq.next_element_seed(Any(Element { ids: &mut bytes, depth: 0 }))?;
        let Some(first) = first else { return Ok(Input::Wrong(EMPTY)) };
        let mut stream = BlockStream::new(self.hash, TEXT_BLOCKS);
        let (mut other_bytes, mut batch) = (0, 1);
        let mut is_wrong = false;
        let kind = match first {
            ElementKind::Id => InputKind::Ids,
            ElementKind::Ids(_) => InputKind::Ids,
            ElementKind::Text(_) => InputKind::Text,
            ElementKind::Wrong => InputKind::Text,
        };
        if first == ElementKind::Id {
            // One list of ids: all elements go into the same prompt.
            while let Some(element) = seq.next_element_seed(Any(Element { ids: &mut bytes, depth: 0 }))? {
                is_wrong |= element != ElementKind::Id;
            }
            stream.text(&bytes);
        } else {
            stream.text(&bytes);
            bytes.clear();
            while let Some(element) = seq.next_element_seed(Any(Element { ids: &mut bytes, depth: 0 }))? {
                match (first, element) {
                    (ElementKind::Text(_), ElementKind::Text(length))
                    | (ElementKind::Ids(_), ElementKind::Ids(length)) => {
                        other_bytes += length;
                    }
                    _ => is_wrong = true,
                }
                batch += 1;
                bytes.clear();
            }
        }
        if is_wrong || first == ElementKind::Wrong {
            return Ok(Input::Wrong(WRONG));
        }
        Ok(Input::Found(Found { kind, stream, other_bytes, batch }))
    }
}

/// An element of a list, its bytes appended to a buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ElementKind {
    Id,
    /// A list of ids: its length in bytes.
    Ids(u64),
    /// A text: its length in bytes.
    Text(u64),
    Wrong,
}

struct Element<'o> {
    ids: &'o mut Vec<u8>,
    /// 1 inside a list of lists, where only ids may stand.
    depth: u8,
}

impl<'de> Visitor<'de> for Element<'_> {
    type Value = ElementKind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prompt or a token id")
    }

    visit_alike!(ElementKind::Wrong; null bool object);

    fn visit_u64<E>(self, id: u64) -> Result<ElementKind, E> {
        let Ok(id) = u32::try_from(id) else { return Ok(ElementKind::Wrong) };
        self.ids.extend_from_slice(&id.to_le_bytes());
        Ok(ElementKind::Id)
    }

    fn visit_i64<E>(self, _: i64) -> Result<ElementKind, E> {
        Ok(ElementKind::Wrong)
    }

    fn visit_f64<E>(self, _: f64) -> Result<ElementKind, E> {
        Ok(ElementKind::Wrong)
    }

    fn visit_str<E>(self, text: &str) -> Result<ElementKind, E> {
        if self.depth > 0 {
            return Ok(ElementKind::Wrong);
        }
        self.ids.extend_from_slice(text.as_bytes());
        Ok(ElementKind::Text(text.len() as u64))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ElementKind, A::Error> {
        if self.depth > 0 {
            return Skip::default().visit_seq(seq).map(|()| ElementKind::Wrong);
        }
        let start = self.ids.len();
        let mut is_wrong = false;
        while let Some(element) = seq.next_element_seed(Any(Element { ids: self.ids, depth: 1 }))? {
            is_wrong |= element != ElementKind::Id;
        }
        Ok(if is_wrong { ElementKind::Wrong } else { ElementKind::Ids((self.ids.len() - start) as u64) })
    }
}
