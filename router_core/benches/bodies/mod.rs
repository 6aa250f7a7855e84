//! Bodies of requests, for the benchmarks.
#![allow(dead_code, reason = "each benchmark uses its share")]

/// Of the bodies, about.
pub const SIZES: [(&str, usize); 3] = [("1 KB", 1 << 10), ("32 KB", 32 << 10), ("220 KB", 220 << 10)];

/// Natural text, one escape per 60 bytes.
pub const LATIN: &str = "The quick brown fox jumps over the lazy dog and runs away.\\n";
/// Chinese, every character escaped, as Python's `json.dumps` does it.
pub const ESCAPED: &str = "\\u4f60\\u597d\\uff0c\\u4e16\\u754c\\u3002";
/// Chinese in UTF-8.
pub const CHINESE: &str = "你好，世界。今天天气很好，我们去公园散步吧。";

/// A chat of one message; `content` as it stands in the body.
pub fn chat(content: &str) -> Vec<u8> {
    let head = r#"{"model":"demo","messages":[{"role":"user","content":""#;
    format!(r#"{head}{content}"}}],"stream":true,"max_tokens":64}}"#).into_bytes()
}

/// What is new at the end of a body whose prefix is known.
pub fn new_bytes(size: usize) -> usize {
    (1 << 10).min(size / 4)
}

/// A body of about `size` bytes: token ids of up to six digits. Those of one `prefix` begin alike, and end by `end`.
pub fn ids(size: usize, prefix: u32, end: u32) -> Vec<u8> {
    let mut body = format!(r#"{{"input_ids":[{prefix}"#);
    let mut id = prefix;
    while body.len() < size {
        let (multiplied, is_new) =
            (id.wrapping_mul(1_664_525).wrapping_add(1_013_904_223), body.len() > size - new_bytes(size));
        id = if is_new { multiplied ^ end } else { multiplied };
        body.push_str(&format!(",{}", (id >> 8) % 128_000));
    }
    body.push_str("]}");
    body.into_bytes()
}
