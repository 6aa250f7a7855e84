//! A request: what one scan of its body found, and how far it has come.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Router;
use crate::metrics::Series;
use crate::outcome::OutcomeKind;
use crate::prompt::{Endpoint, Prompt};

/// The header by which a client insists on a dp rank.
const RANK_HEADER: &str = "x-data-parallel-rank";

/// What nobody got: the status that counts for an answer that was not wanted any more.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// The headers that say what belongs together; the first that is present counts.
const KEY_HEADERS: [&str; 4] = ["x-smg-routing-key", "x-session-id", "x-user-id", "x-tenant-id"];

/// A request that is being routed.
pub struct Request {
    router: Arc<Router>,
    endpoint: Endpoint,
    prompt: Prompt,
    body_bytes: u64,
    model_hash: Option<u64>,
    pinned_rank: Option<u16>,
    routing_key: Option<u64>,
    accepted_ns: u64,
    progress: Mutex<Progress>,
}

/// What changes while a request is being routed.
#[derive(Default)]
pub(super) struct Progress {
    /// Heads and incarnations of the workers that failed it.
    pub(super) failed: Vec<(u16, u64)>,
    /// How the last lease ended, if it did.
    pub(super) last_outcome: Option<OutcomeKind>,
    /// Leases so far.
    pub(super) attempts: u32,
    pub(super) finished: bool,
    /// Nobody asked it: it is only looked at, and not counted.
    pub(super) hypothetical: bool,
    series: Option<Series>,
}

impl Progress {
    /// Where the request is counted: under `model`, unless that was said before.
    pub(super) fn settle(&mut self, request: &Request, model: Option<u64>) -> Series {
        let slab = &request.router.slab;
        *self.series.get_or_insert_with(|| {
            let series = slab.settle(model, request.endpoint, request.prompt.stream);
            slab.assign(series);
            series
        })
    }
}

impl Request {
    pub(super) fn new(
        router: &Arc<Router>,
        endpoint: Endpoint,
        routing_headers: &[u8],
        (prompt, body_bytes): (Prompt, usize),
        accepted_ns: u64,
    ) -> Self {
        let rank = prompt.pinned_rank.map(|rank| u16::try_from(rank).unwrap_or(u16::MAX));
        Self {
            router: Arc::clone(router),
            endpoint,
            model_hash: prompt.model.as_deref().map(|name| router.names.hash(name)),
            // SGLang and vLLM let the header win, too.
            pinned_rank: rank_of_headers(routing_headers).or(rank),
            routing_key: key_of_headers(routing_headers).map(|key| router.names.hash(key)),
            prompt,
            body_bytes: body_bytes as u64,
            accepted_ns,
            progress: Mutex::default(),
        }
    }

    /// Where it came to.
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// What its body says.
    pub fn prompt(&self) -> &Prompt {
        &self.prompt
    }

    /// Count the client's request as answered, once; see [`Router::finish`].
    pub fn finish(&self, status: u16, first_byte_ns: Option<u64>, now_ns: u64) {
        self.router.finish(self, status, first_byte_ns, now_ns);
    }

    /// Leases so far.
    pub fn attempts(&self) -> u32 {
        self.progress().attempts
    }

    pub(super) fn router(&self) -> &Arc<Router> {
        &self.router
    }

    pub(super) fn model_hash(&self) -> Option<u64> {
        self.model_hash
    }

    /// The dp rank that the client insists on, in a header or in the body.
    pub(super) fn pinned_rank(&self) -> Option<u16> {
        self.pinned_rank
    }

    /// Stands for what its client says it belongs to: a session, a user, a tenant.
    pub(super) fn routing_key(&self) -> Option<u64> {
        self.routing_key
    }

    pub(super) fn body_bytes(&self) -> u64 {
        self.body_bytes
    }

    pub(super) fn accepted_ns(&self) -> u64 {
        self.accepted_ns
    }

    pub(super) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Request {
    /// Given up before it was finished: it was accepted all the same, and got no answer.
    fn drop(&mut self) {
        if !self.progress().hypothetical {
            self.router.finish(self, CLIENT_CLOSED_REQUEST, None, self.accepted_ns);
        }
    }
}

fn rank_of_headers(headers: &[u8]) -> Option<u16> {
    let rank: u64 = header(headers, RANK_HEADER)?.parse().ok()?;
    // Larger than any that there is.
    Some(u16::try_from(rank).unwrap_or(u16::MAX))
}

fn key_of_headers(headers: &[u8]) -> Option<&str> {
    KEY_HEADERS.iter().find_map(|name| header(headers, name)).filter(|key| !key.is_empty())
}

fn header<'h>(headers: &'h [u8], wanted: &str) -> Option<&'h str> {
    let lines = std::str::from_utf8(headers).ok()?.lines();
    lines.filter_map(|line| line.split_once(':')).find(|(name, _)| *name == wanted).map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_can_be_pinned_by_header() {
        let table: [(&[u8], Option<u16>); 6] = [
            (b"", None),
            (b"x-data-parallel-rank: 70000\r\n", Some(u16::MAX)),
            (b"x-data-parallel-rank: 3\r\n", Some(3)),
            (b"x-smg-routing-key: a:b\r\nx-data-parallel-rank:0\r\n", Some(0)),
            (b"x-data-parallel-rank: three\r\n", None),
            (b"\xff", None),
        ];
        for (headers, expected) in table {
            assert_eq!(rank_of_headers(headers), expected);
        }
    }

    #[test]
    fn the_first_key_header_counts() {
        let table: [(&[u8], Option<&str>); 5] = [
            (b"", None),
            (b"x-user-id: u\r\nx-session-id: s\r\n", Some("s")),
            (b"x-tenant-id: t\r\n", Some("t")),
            (b"x-session-id: s\r\nx-smg-routing-key: k\r\n", Some("k")),
            (b"x-smg-routing-key: \r\n", None),
        ];
        for (headers, expected) in table {
            assert_eq!(key_of_headers(headers), expected);
        }
    }
}
