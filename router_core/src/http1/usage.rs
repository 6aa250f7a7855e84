//! Token counts in the last bytes of an answer, found without parsing it.

/// Bytes kept. The usage object ends the body in every dialect: OpenAI's and vLLM's last SSE frame is about 400 bytes with
/// `[DONE]`, SGLang's `meta_info` about 350.
const KEPT_BYTES: usize = 1024;

/// Token counts of one answer; None where it said nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// `prompt_tokens`
    pub prompt_tokens: Option<u64>,
    /// `completion_tokens`
    pub completion_tokens: Option<u64>,
    /// `cached_tokens`, of `prompt_tokens_details` (OpenAI) or of `meta_info` (SGLang)
    pub cached_tokens: Option<u64>,
}

/// The last bytes of a body.
#[derive(Debug, Default)]
pub(super) struct UsageTail {
    /// Grows to twice what is kept and is then cut, so that a push costs one copy, not a shift.
    bytes: Vec<u8>,
}

impl UsageTail {
    pub(super) fn push(&mut self, piece: &[u8]) {
        let piece = &piece[piece.len().saturating_sub(KEPT_BYTES)..];
        if self.bytes.len() + piece.len() > 2 * KEPT_BYTES {
            self.bytes.drain(..self.bytes.len().saturating_sub(KEPT_BYTES));
        }
        self.bytes.extend_from_slice(piece);
    }

    /// Whether bytes that this many others follow can still be among those kept.
    pub(super) fn reaches(following: u64) -> bool {
        following < KEPT_BYTES as u64
    }

    /// The last occurrence of each count: a stream may repeat them in every frame. Text of the model cannot pass for one,
    /// since the quotes inside a JSON string are escaped.
    pub(super) fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        let tail = &self.bytes[self.bytes.len().saturating_sub(KEPT_BYTES)..];
        for end in memchr::memrchr_iter(b'"', tail) {
            // Most quotes end something else: one comparison for those.
            let Some(key) = tail[..end].strip_suffix(b"_tokens") else { continue };
            let count = if key.ends_with(b"\"prompt") {
                &mut usage.prompt_tokens
            } else if key.ends_with(b"\"completion") {
                &mut usage.completion_tokens
            } else if key.ends_with(b"\"cached") {
                &mut usage.cached_tokens
            } else {
                continue;
            };
            *count = count.or_else(|| number_after_key(&tail[end + 1..]));
            if usage.prompt_tokens.is_some() && usage.completion_tokens.is_some() && usage.cached_tokens.is_some() {
                break;
            }
        }
        usage
    }
}

/// The whole number in `: 12,`. None for anything else, also where the end might be missing.
fn number_after_key(rest: &[u8]) -> Option<u64> {
    let value = rest.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
    let length = value.iter().position(|byte| !byte.is_ascii_digit())?;
    match value[length] {
        b'.' | b'e' | b'E' => None,
        _ => super::fields::digits(&value[..length]),
    }
}
