//! Any bytes as a head of either side: never a panic, and the same answer however long the bytes after it are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use router_core::http1::HeadParser;

fuzz_target!(|data: &[u8]| {
    let parser = HeadParser::new(vec!["x-request-id".to_owned()], 4096).expect("names of headers");
    if let Ok(Some(head)) = parser.request(data) {
        let size = head.size();
        assert!(size <= data.len());
        assert!(parser.request(&data[..size]).is_ok_and(|again| again.is_some()));
        assert!(!matches!(parser.request(&data[..size - 1]), Ok(Some(_))));
        assert!(!(head.chunked() && head.content_length().is_some()), "both lengths");
    }
    for head_request in [false, true] {
        if let Ok(Some(head)) = parser.response(data, head_request) {
            assert!(head.size() <= data.len());
        }
    }
});
