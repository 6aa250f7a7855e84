//! `prompt`, `text`, `input_ids`: a text, token ids, or a list of either.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};

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

pub(super) const WRONG: &str = "must be text, a list of token ids, or a list of either";
/// How an error of the reader says that an id was asked for; what users are told is [`WRONG`].
pub(super) const EXPECTED_ID: &str = "a token id";
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
        let Some(first) = seq.next_element_seed(Any(Element { out: &mut bytes, depth: 0 }))? else {
            return Ok(Input::Wrong(EMPTY));
        };
        let kind = if matches!(first, ElementKind::Text(_)) { InputKind::Text } else { InputKind::Ids };
        let mut stream = BlockStream::new(self.hash, TEXT_BLOCKS);
        if first != ElementKind::Id {
            stream.text(&bytes);
            bytes.clear();
        }
        let (mut other_bytes, mut batch) = (0, 1);
        let mut is_wrong = false;
        if first == ElementKind::Id {
            is_wrong |= read_ids(&mut bytes, &mut seq)?;
        }
        while let Some(element) = seq.next_element_seed(Any(Element { out: &mut bytes, depth: 0 }))? {
            match (first, element) {
                (ElementKind::Text(_), ElementKind::Text(length)) | (ElementKind::Ids(_), ElementKind::Ids(length)) => {
                    other_bytes += length;
                    batch += 1;
                }
                _ => is_wrong = true,
            }
            bytes.clear();
        }
        stream.text(&bytes);
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
    out: &'o mut Vec<u8>,
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
        self.out.extend_from_slice(&id.to_le_bytes());
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
        self.out.extend_from_slice(text.as_bytes());
        Ok(ElementKind::Text(text.len() as u64))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ElementKind, A::Error> {
        if self.depth > 0 {
            return Skip::default().visit_seq(seq).map(|()| ElementKind::Wrong);
        }
        let start = self.out.len();
        let first = seq.next_element_seed(Any(Element { out: self.out, depth: 1 }))?;
        let mut is_wrong = first.is_some_and(|first| first != ElementKind::Id);
        if is_wrong {
            Skip::default().visit_seq(seq)?;
        } else {
            is_wrong = read_ids(self.out, &mut seq)?;
        }
        Ok(if is_wrong { ElementKind::Wrong } else { ElementKind::Ids((self.out.len() - start) as u64) })
    }
}

/// The rest of a list that began with an id; whether an element cannot be one. What is no number at all is an error of the reader
/// ([`WRONG`]): to be asked for a number and not for anything saves it a fifth of its time.
fn read_ids<'de, A: SeqAccess<'de>>(out: &mut Vec<u8>, seq: &mut A) -> Result<bool, A::Error> {
    let mut is_wrong = false;
    while seq.next_element_seed(Id { out, is_wrong: &mut is_wrong })?.is_some() {}
    Ok(is_wrong)
}

struct Id<'o> {
    out: &'o mut Vec<u8>,
    is_wrong: &'o mut bool,
}

impl<'de> DeserializeSeed<'de> for Id<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_u64(self)
    }
}

impl<'de> Visitor<'de> for Id<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED_ID)
    }

    fn visit_u64<E>(self, id: u64) -> Result<(), E> {
        self.out.extend_from_slice(&(id as u32).to_le_bytes());
        *self.is_wrong |= id > u64::from(u32::MAX);
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        *self.is_wrong = true;
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        *self.is_wrong = true;
        Ok(())
    }
}
