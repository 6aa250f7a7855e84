//! A look at large bodies before they are read, so that a malformed one costs what a good one costs.
//!
//! sonic-rs (0.5.10) makes a new error at each level that an error passes on its way out, and counts its line and column from the
//! start of the body: 60 ns per byte at 64 levels, 400 times the cost of reading. Here nothing nests, or nothing that fails.

use memchr::memchr2;
use serde::de::IgnoredAny;

/// Bodies up to this many bytes go without: at worst they cost 20 ms. Larger ones, mostly images, pay a third more.
const LARGE_BYTES: usize = 256 << 10;

/// Why a body will fail to be read.
pub(super) enum Refusal {
    TooDeep,
    Malformed(sonic_rs::Error),
}

/// Refuses a large body that nests deeper than `max_depth` or is malformed.
pub(super) fn check(text: &str, max_depth: u8) -> Result<(), Refusal> {
    if text.len() <= LARGE_BYTES {
        return Ok(());
    }
    if is_deeper(text.as_bytes(), usize::from(max_depth)) {
        return Err(Refusal::TooDeep);
    }
    // Skipping recurses without a limit, but only as deep as has just been seen; and it makes one error only.
    sonic_rs::from_str::<IgnoredAny>(text).map(drop).map_err(Refusal::Malformed)
}

/// Whether brackets outside of strings nest deeper than `max_depth`; right for well-formed JSON and harmless for other text.
fn is_deeper(body: &[u8], max_depth: usize) -> bool {
    let mut depth = 0usize;
    let mut at = 0;
    while let Some(&byte) = body.get(at) {
        at += 1;
        match byte {
            b'"' => at = end_of_string(body, at),
            b'[' | b'{' => {
                depth += 1;
                if depth > max_depth {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

fn end_of_string(body: &[u8], start: usize) -> usize {
    let mut at = start;
    while let Some(found) = body.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        at += found;
        if body[at] == b'"' {
            return at + 1;
        }
        at += 2;
    }
    body.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_is_counted_outside_of_strings() {
        let cases: &[(&str, usize)] = &[
            ("1", 0),
            ("[]", 1),
            (r#"{"a":[{"b":[]}],"c":{}}"#, 4),
            (r#"["[[[\"[[[\\",["]"]]"#, 2),
            (r#"["[[["#, 1),
            (r#"["\"#, 1),
            ("]]][", 1),
        ];
        for (text, depth) in cases {
            assert!(!is_deeper(text.as_bytes(), *depth), "{text}");
            assert!(*depth == 0 || is_deeper(text.as_bytes(), depth - 1), "{text}");
        }
    }
}
