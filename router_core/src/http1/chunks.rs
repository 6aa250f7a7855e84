//! The chunked coding (RFC 9112 section 7.1): a machine that finds the payload in a stream, and a decoder on it.

use super::BadHead;
use super::fields::is_token_byte;

/// Bytes of chunk extensions and trailers together that one body may carry: they mean nothing here and would be a way to
/// send without end. 16 KiB is hyper's bound on extensions.
const MAX_OVERHEAD_BYTES: u32 = 16 * 1024;

/// Hexadecimal digits of the largest chunk size.
const MAX_SIZE_DIGITS: u8 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// At a chunk's boundary: no digit of its size yet.
    Start,
    Size {
        digits: u8,
    },
    Extension,
    SizeLf,
    Payload,
    PayloadCr,
    PayloadLf,
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Done,
    Failed,
}

/// Finds the payload and the end of a chunked body. Refuses what decoders disagree about: bare CR or LF, signs, spaces and
/// prefixes around sizes.
#[derive(Debug)]
pub(super) struct ChunkMachine {
    state: State,
    /// The size while it is read, then the payload bytes of the chunk still to come.
    chunk_left: u64,
    /// Sum of the sizes announced so far.
    announced: u64,
    max_body_bytes: u64,
    overhead: u32,
}

impl ChunkMachine {
    pub(super) fn new(max_body_bytes: u64) -> Self {
        Self { state: State::Start, chunk_left: 0, announced: 0, max_body_bytes, overhead: 0 }
    }

    pub(super) fn done(&self) -> bool {
        self.state == State::Done
    }

    /// Bytes until the current chunk and its CRLF are complete; None inside a size line or a trailer, and at the end.
    pub(super) fn open_chunk_bytes(&self) -> Option<u64> {
        match self.state {
            State::Start => Some(0),
            State::Payload => Some(self.chunk_left.saturating_add(2)),
            State::PayloadCr => Some(2),
            State::PayloadLf => Some(1),
            _ => None,
        }
    }

    /// Hands each piece of payload in `data` to `payload`. None: the body goes on; else how many bytes of `data` ended it.
    #[inline]
    pub(super) fn feed(&mut self, data: &[u8], mut payload: impl FnMut(&[u8])) -> Result<Option<usize>, BadHead> {
        let mut at = 0;
        while at < data.len() {
            if self.state == State::Payload {
                let rest = &data[at..];
                let take = usize::try_from(self.chunk_left).unwrap_or(usize::MAX).min(rest.len());
                payload(&rest[..take]);
                at += take;
                self.chunk_left -= take as u64;
                if self.chunk_left == 0 {
                    self.state = State::PayloadCr;
                }
                continue;
            }
            if self.state == State::Done {
                break;
            }
            match self.step(data[at]) {
                Ok(next) => self.state = next,
                Err(refusal) => {
                    self.state = State::Failed;
                    return Err(refusal);
                }
            }
            at += 1;
        }
        Ok(self.done().then_some(at))
    }

    /// One byte of the framing.
    fn step(&mut self, byte: u8) -> Result<State, BadHead> {
        let refuse = |message| Err(BadHead::new(400, message));
        match (self.state, byte) {
            (State::Start, _) => match hex_digit(byte) {
                Some(digit) => {
                    self.chunk_left = digit;
                    Ok(State::Size { digits: 1 })
                }
                None => refuse("a chunk size is not a hexadecimal number"),
            },
            (State::Size { .. }, b'\r') => Ok(State::SizeLf),
            (State::Size { .. }, b';') => Ok(State::Extension),
            (State::Size { digits }, _) => match hex_digit(byte) {
                Some(_) if digits == MAX_SIZE_DIGITS => refuse("a chunk size is too large"),
                Some(digit) => {
                    self.chunk_left = self.chunk_left << 4 | digit;
                    Ok(State::Size { digits: digits + 1 })
                }
                None => refuse("a chunk size is not a hexadecimal number"),
            },
            (State::Extension, b'\r') => Ok(State::SizeLf),
            (State::Extension, _) => self.overhead_byte(byte, State::Extension),
            (State::SizeLf, b'\n') if self.chunk_left == 0 => Ok(State::TrailerStart),
            (State::SizeLf, b'\n') => {
                self.announced = self.announced.saturating_add(self.chunk_left);
                if self.announced > self.max_body_bytes {
                    return Err(BadHead::new(413, "the body is too large"));
                }
                Ok(State::Payload)
            }
            (State::PayloadCr, b'\r') => Ok(State::PayloadLf),
            (State::PayloadLf, b'\n') => Ok(State::Start),
            (State::TrailerStart, b'\r') => Ok(State::EndLf),
            (State::TrailerName, b':') => Ok(State::TrailerValue),
            (State::TrailerStart | State::TrailerName, _) if is_token_byte(byte) => {
                self.overhead_byte(byte, State::TrailerName)
            }
            (State::TrailerStart | State::TrailerName, _) => refuse("malformed trailer name"),
            (State::TrailerValue, b'\r') => Ok(State::TrailerLf),
            (State::TrailerValue, _) => self.overhead_byte(byte, State::TrailerValue),
            (State::TrailerLf, b'\n') => Ok(State::TrailerStart),
            (State::EndLf, b'\n') => Ok(State::Done),
            _ => refuse("malformed chunked coding"),
        }
    }

    fn overhead_byte(&mut self, byte: u8, next: State) -> Result<State, BadHead> {
        if byte.is_ascii_control() && byte != b'\t' {
            return Err(BadHead::new(400, "a control character in the chunked coding"));
        }
        self.overhead += 1;
        if self.overhead > MAX_OVERHEAD_BYTES {
            return Err(BadHead::new(400, "chunk extensions or trailers without end"));
        }
        Ok(next)
    }
}

fn hex_digit(byte: u8) -> Option<u64> {
    match byte {
        b'0'..=b'9' => Some(u64::from(byte - b'0')),
        b'a'..=b'f' => Some(u64::from(byte - b'a') + 10),
        b'A'..=b'F' => Some(u64::from(byte - b'A') + 10),
        _ => None,
    }
}

/// Takes the chunked coding off a request's body. Trailers are dropped.
#[derive(Debug)]
pub struct ChunkDecoder {
    machine: ChunkMachine,
}

impl ChunkDecoder {
    /// Bodies that announce more than `max_body_bytes` are refused with 413.
    pub fn new(max_body_bytes: u64) -> Self {
        Self { machine: ChunkMachine::new(max_body_bytes) }
    }

    /// Appends what `data` decodes to. None: the body goes on; else how many bytes of `data` ended it.
    pub fn feed(&mut self, data: &[u8], decoded: &mut Vec<u8>) -> Result<Option<usize>, BadHead> {
        self.machine.feed(data, |piece| decoded.extend_from_slice(piece))
    }
}
