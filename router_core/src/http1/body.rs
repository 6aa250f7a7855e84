//! Where a message's body ends.

use super::chunks::ChunkMachine;
use super::usage::UsageTail;
use super::{BadHead, Usage};

/// Finds the end of a body in a stream of bytes, and keeps the last of them to read the token counts from.
#[derive(Debug)]
pub struct BodyReader {
    framing: Framing,
    tail: UsageTail,
}

#[derive(Debug)]
enum Framing {
    Length { left: u64 },
    Chunks(ChunkMachine),
    UntilEof { ended: bool },
}

impl BodyReader {
    /// A body of `length` bytes; of none, it is done at once.
    pub fn of_length(length: u64) -> Self {
        Self::new(Framing::Length { left: length })
    }

    /// A body in the chunked coding.
    pub fn of_chunks() -> Self {
        Self::new(Framing::Chunks(ChunkMachine::new(u64::MAX)))
    }

    /// A body that ends with the connection.
    pub fn until_eof() -> Self {
        Self::new(Framing::UntilEof { ended: false })
    }

    fn new(framing: Framing) -> Self {
        Self { framing, tail: UsageTail::default() }
    }

    /// None: all of `data` belongs to the body and it goes on; else how many bytes of `data` belong to it.
    #[inline]
    pub fn feed(&mut self, data: &[u8]) -> Result<Option<usize>, BadHead> {
        let tail = &mut self.tail;
        match &mut self.framing {
            Framing::Length { left } => {
                let take = usize::try_from(*left).unwrap_or(usize::MAX).min(data.len());
                *left -= take as u64;
                if UsageTail::reaches(*left) {
                    tail.push(&data[..take]);
                }
                Ok((*left == 0).then_some(take))
            }
            Framing::Chunks(machine) => machine.feed(data, |piece| tail.push(piece)),
            Framing::UntilEof { ended: true } => Ok(Some(0)),
            Framing::UntilEof { ended: false } => {
                tail.push(data);
                Ok(None)
            }
        }
    }

    /// The connection ended here. Whether that ends the body (or it had ended before).
    pub fn end_of_file(&mut self) -> bool {
        if let Framing::UntilEof { ended } = &mut self.framing {
            *ended = true;
        }
        self.done()
    }

    /// Whether the body has ended.
    pub fn done(&self) -> bool {
        match &self.framing {
            Framing::Length { left } => *left == 0,
            Framing::Chunks(machine) => machine.done(),
            Framing::UntilEof { ended } => *ended,
        }
    }

    /// Of a chunked body that goes on: bytes until the current chunk and its CRLF are complete (0: at a boundary). None
    /// inside a size line or a trailer, or for another framing.
    pub fn open_chunk_bytes(&self) -> Option<u64> {
        match &self.framing {
            Framing::Chunks(machine) => machine.open_chunk_bytes(),
            _ => None,
        }
    }

    /// The token counts in the last bytes seen.
    pub fn usage(&self) -> Usage {
        self.tail.usage()
    }
}
