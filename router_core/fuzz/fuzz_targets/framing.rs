//! Any bytes as a chunked body: never a panic, and the same end and content however they are cut into reads.
#![no_main]

use libfuzzer_sys::fuzz_target;
use router_core::http1::{BodyReader, ChunkDecoder};

fuzz_target!(|data: &[u8]| {
    let Some((&cut, data)) = data.split_first() else { return };
    let whole = decode(data, data.len().max(1));
    assert_eq!(whole, decode(data, usize::from(cut).max(1)));
    let mut reader = BodyReader::of_chunks();
    let end = reader.feed(data);
    match (&whole, end) {
        (Ok((_, decoded)), Ok(found)) => assert_eq!(*decoded, found),
        (Err(()), Err(_)) => {}
        (Err(()), Ok(_)) | (Ok(_), Err(_)) => panic!("{whole:?}, {end:?}"),
    }
});

/// (content, where the body ends)
fn decode(data: &[u8], step: usize) -> Result<(Vec<u8>, Option<usize>), ()> {
    let mut decoder = ChunkDecoder::new(u64::MAX);
    let mut content = Vec::new();
    let mut fed = 0;
    for piece in data.chunks(step) {
        if let Some(end) = decoder.feed(piece, &mut content).map_err(drop)? {
            return Ok((content, Some(fed + end)));
        }
        fed += piece.len();
    }
    Ok((content, None))
}
