//! Writes one JSON value in many spellings: white space, escapes, and the order of keys where order says nothing.

use serde_json::Value;

/// A source of choices (splitmix64).
pub struct Spelling(u64);

impl Spelling {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

/// Where a value stands; the order of keys is free in the body, in messages and in content parts only.
#[derive(Clone, Copy)]
enum Place {
    Body,
    Messages,
    Message,
    Parts,
    Part,
    FreeForm,
}

impl Place {
    fn inside(self, key: Option<&str>) -> Self {
        match (self, key) {
            (Self::Body, Some("messages")) => Self::Messages,
            (Self::Messages, None) => Self::Message,
            (Self::Message, Some("content")) => Self::Parts,
            (Self::Parts, None) => Self::Part,
            _ => Self::FreeForm,
        }
    }
}

/// `body`, a chat body, in the spelling that the seed picks.
pub fn spell(body: &Value, spelling: &mut Spelling) -> String {
    let mut out = String::new();
    write(body, Place::Body, spelling, &mut out);
    out
}

fn write(value: &Value, place: Place, spelling: &mut Spelling, out: &mut String) {
    space(spelling, out);
    match value {
        Value::String(text) => write_text(text, spelling, out),
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                write(item, place.inside(None), spelling, out);
            }
            space(spelling, out);
            out.push(']');
        }
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            if !matches!(place, Place::FreeForm) {
                for last in (1..fields.len()).rev() {
                    fields.swap(last, spelling.below(last + 1));
                }
            }
            out.push('{');
            for (index, (key, value)) in fields.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                space(spelling, out);
                write_text(key, spelling, out);
                space(spelling, out);
                out.push(':');
                write(value, place.inside(Some(key)), spelling, out);
            }
            space(spelling, out);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
    space(spelling, out);
}

fn space(spelling: &mut Spelling, out: &mut String) {
    while spelling.below(4) == 0 {
        out.push([' ', '\n', '\t', '\r'][spelling.below(4)]);
    }
}

fn write_text(text: &str, spelling: &mut Spelling, out: &mut String) {
    let all = spelling.below(4) == 0;
    out.push('"');
    for c in text.chars() {
        let short = match c {
            '"' => Some("\\\""),
            '\\' => Some("\\\\"),
            '\n' => Some("\\n"),
            '\t' => Some("\\t"),
            '/' if spelling.below(2) == 0 => Some("\\/"),
            _ => None,
        };
        if all || (short.is_none() && (c < ' ' || spelling.below(16) == 0)) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let hex = if spelling.below(2) == 0 { format!("\\u{unit:04x}") } else { format!("\\u{unit:04X}") };
                out.push_str(&hex);
            }
        } else {
            match short {
                Some(short) => out.push_str(short),
                None => out.push(c),
            }
        }
    }
    out.push('"');
}
