//! Visitors for JSON values whose shape does not matter: skipping, single values, free-form objects.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

// Bytes that never occur in UTF-8: they structure the canonical stream, and no text can imitate them.
pub(super) const PART: u8 = 0xF5;
pub(super) const DIGEST: u8 = 0xF6;
pub(super) const TOOL_CALLS: u8 = 0xF7;
pub(super) const NAME: u8 = 0xF8;
pub(super) const SYSTEM: u8 = 0xF9;
pub(super) const USER: u8 = 0xFA;
pub(super) const ASSISTANT: u8 = 0xFB;
pub(super) const TOOL: u8 = 0xFC;
pub(super) const OTHER_ROLE: u8 = 0xFD;
pub(super) const END: u8 = 0xFE;
/// Opens every element of a free-form value; the byte after it says what it is.
const ELEMENT: u8 = 0xFF;

/// Levels that a value may nest: enough for any schema of a tool. Two things forbid much more: the stack (an unoptimised build takes
/// 20 KB a level), and what an error costs that passes many levels (see `guard`).
pub(super) const MAX_DEPTH: u8 = 64;

pub(super) const TOO_DEEP: &str = "more than 64 levels of nesting";

/// Lets a visitor see whatever comes. Not `deserialize_ignored_any`, not even to skip: sonic-rs skips by recursion without a
/// limit.
pub(super) struct Any<V>(pub(super) V);

impl<'de, V: Visitor<'de>> DeserializeSeed<'de> for Any<V> {
    type Value = V::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        deserializer.deserialize_any(self.0)
    }
}

/// Visitor methods for the kinds of values that a visitor takes all alike.
macro_rules! visit_alike {
    ($result:expr; $($kind:ident)+) => { $(visit_alike!(@ $kind $result);)+ };
    (@ null $result:expr) => { fn visit_unit<E>(self) -> Result<Self::Value, E> { Ok($result) } };
    (@ bool $result:expr) => { fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> { Ok($result) } };
    (@ number $result:expr) => {
        fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> { Ok($result) }
        fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> { Ok($result) }
        fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> { Ok($result) }
    };
    (@ string $result:expr) => { fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> { Ok($result) } };
    (@ array $result:expr) => {
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
            serde::de::Visitor::visit_seq($crate::prompt::json::Skip::default(), seq).map(|()| $result)
        }
    };
    (@ object $result:expr) => {
        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            serde::de::Visitor::visit_map($crate::prompt::json::Skip::default(), map).map(|()| $result)
        }
    };
}
pub(super) use visit_alike;

/// Reads past any value, validating it.
#[derive(Clone, Copy, Default)]
pub(super) struct Skip {
    depth: u8,
}

impl Skip {
    fn deeper<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            Err(serde::de::Error::custom(TOO_DEEP))
        } else {
            Ok(Self { depth: self.depth + 1 })
        }
    }
}

impl<'de> Visitor<'de> for Skip {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    visit_alike!((); null bool number string);

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let inner = self.deeper()?;
        while seq.next_element_seed(Any(inner))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let inner = self.deeper()?;
        while map.next_key_seed(Name(|_: &str| ()))?.is_some() {
            map.next_value_seed(Any(inner))?;
        }
        Ok(())
    }
}

/// Reads the key of an object through a function.
pub(super) struct Name<F>(pub(super) F);

impl<'de, T, F: FnOnce(&str) -> T> DeserializeSeed<'de> for Name<F> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de, T, F: FnOnce(&str) -> T> Visitor<'de> for Name<F> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, name: &str) -> Result<T, E> {
        Ok((self.0)(name))
    }
}

/// A value of which only the simple kinds matter.
pub(super) enum Scalar<'de> {
    Null,
    Bool(bool),
    Unsigned(u64),
    Negative(i64),
    OtherNumber,
    Text(Cow<'de, str>),
    /// A list whose first element is text, as in the per-prompt fields of a batch.
    TextList(String),
    Composite,
}

/// Reads a [`Scalar`].
pub(super) struct AnyScalar;

impl<'de> Visitor<'de> for AnyScalar {
    type Value = Scalar<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    visit_alike!(Scalar::Null; null);
    visit_alike!(Scalar::Composite; object);

    fn visit_bool<E>(self, value: bool) -> Result<Scalar<'de>, E> {
        Ok(Scalar::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Scalar<'de>, E> {
        Ok(Scalar::Unsigned(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Scalar<'de>, E> {
        Ok(Scalar::Negative(value))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Scalar<'de>, E> {
        Ok(Scalar::OtherNumber)
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Scalar<'de>, E> {
        Ok(Scalar::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Scalar<'de>, E> {
        Ok(Scalar::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Scalar<'de>, A::Error> {
        let mut first = None;
        if seq.next_element_seed(Any(ListElement(&mut first)))?.is_some() {
            Skip::default().visit_seq(seq)?;
        }
        Ok(first.map_or(Scalar::Composite, Scalar::TextList))
    }
}

/// Keeps an element of a list if it is text.
struct ListElement<'o>(&'o mut Option<String>);

impl<'de> Visitor<'de> for ListElement<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    visit_alike!((); null bool number array object);

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        *self.0 = Some(text.to_owned());
        Ok(())
    }
}

/// Appends the canonical form of any value to `out`: independent of white space and of the spelling of escapes; the order of
/// keys counts, since it does in the rendered template.
pub(super) struct FreeForm<'o> {
    out: &'o mut Vec<u8>,
    depth: u8,
}

impl<'o> FreeForm<'o> {
    pub(super) fn new(out: &'o mut Vec<u8>) -> Self {
        Self { out, depth: 0 }
    }

    fn element(&mut self, kind: u8, bytes: &[u8]) {
        self.out.extend_from_slice(&[ELEMENT, kind]);
        self.out.extend_from_slice(bytes);
    }

    fn inner(&mut self) -> FreeForm<'_> {
        FreeForm { out: self.out, depth: self.depth + 1 }
    }
}

impl<'de> Visitor<'de> for FreeForm<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(mut self) -> Result<(), E> {
        self.element(b'0', b"");
        Ok(())
    }

    fn visit_bool<E>(mut self, value: bool) -> Result<(), E> {
        self.element(if value { b'T' } else { b'F' }, b"");
        Ok(())
    }

    fn visit_u64<E>(mut self, value: u64) -> Result<(), E> {
        self.element(b'u', &value.to_le_bytes());
        Ok(())
    }

    fn visit_i64<E>(mut self, value: i64) -> Result<(), E> {
        self.element(b'i', &value.to_le_bytes());
        Ok(())
    }

    fn visit_f64<E>(mut self, value: f64) -> Result<(), E> {
        self.element(b'f', &value.to_le_bytes());
        Ok(())
    }

    fn visit_str<E>(mut self, text: &str) -> Result<(), E> {
        self.element(b's', text.as_bytes());
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
        if self.depth == MAX_DEPTH {
            return Err(serde::de::Error::custom(TOO_DEEP));
        }
        self.element(b'[', b"");
        while seq.next_element_seed(Any(self.inner()))?.is_some() {}
        self.element(b']', b"");
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        if self.depth == MAX_DEPTH {
            return Err(serde::de::Error::custom(TOO_DEEP));
        }
        self.element(b'{', b"");
        while map.next_key_seed(Name(|key: &str| self.element(b'k', key.as_bytes())))?.is_some() {
            map.next_value_seed(Any(self.inner()))?;
        }
        self.element(b'}', b"");
        Ok(())
    }
}

/// Appends the canonical form of the elements of a list to `out`; nothing for what is no list, as for an empty one.
pub(super) struct FreeFormList<'o>(pub(super) &'o mut Vec<u8>);

impl<'de> Visitor<'de> for FreeFormList<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    visit_alike!((); null bool number string object);

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Any(FreeForm::new(self.0)))?.is_some() {}
        Ok(())
    }
}
