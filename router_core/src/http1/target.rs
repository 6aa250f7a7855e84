//! What a request line asks for, and the forms a target can have (RFC 9112 section 3.2).

use super::fields;
use crate::prompt::Endpoint;

/// What a request line asks for, as far as the data plane cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// `POST /v1/chat/completions`
    Chat,
    /// `POST /v1/completions`
    Completions,
    /// `POST /generate`
    Generate,
    /// `GET /health`
    Health,
    /// `GET /liveness`
    Liveness,
    /// `GET /readiness`
    Readiness,
    /// Everything else, also a routed path with another method than POST.
    Control,
}

impl Route {
    pub(super) fn of(method: &[u8], path: &[u8]) -> Self {
        match (method, path) {
            (b"POST", b"/v1/chat/completions") => Route::Chat,
            (b"POST", b"/v1/completions") => Route::Completions,
            (b"POST", b"/generate") => Route::Generate,
            (b"GET", b"/health") => Route::Health,
            (b"GET", b"/liveness") => Route::Liveness,
            (b"GET", b"/readiness") => Route::Readiness,
            _ => Route::Control,
        }
    }

    /// Whether it goes to a worker.
    pub fn is_routed(self) -> bool {
        self.endpoint().is_some()
    }

    /// What of a worker is asked for, if a worker is.
    pub fn endpoint(self) -> Option<Endpoint> {
        match self {
            Route::Chat => Some(Endpoint::Chat),
            Route::Completions => Some(Endpoint::Completions),
            Route::Generate => Some(Endpoint::Generate),
            Route::Health | Route::Liveness | Route::Readiness | Route::Control => None,
        }
    }
}

/// Authority (of an absolute-form target only) and origin-form of a target.
pub(super) fn split<'t>(method: &str, target: &'t [u8]) -> Result<(Option<&'t [u8]>, &'t [u8]), &'static str> {
    if method == "CONNECT" {
        return Err("CONNECT is not supported");
    }
    // A fragment is no part of a target (RFC 9112 section 3.2); who strips it and who does not would see different paths.
    if !target.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'#') {
        return Err("the target has a character that must be encoded");
    }
    match target {
        [b'/', ..] => Ok((None, target)),
        b"*" if method == "OPTIONS" => Ok((None, target)),
        _ => split_absolute(target),
    }
}

fn split_absolute(target: &[u8]) -> Result<(Option<&[u8]>, &[u8]), &'static str> {
    let scheme = [&b"http://"[..], b"https://"]
        .into_iter()
        .find(|scheme| target.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme)));
    let Some(scheme) = scheme else {
        return Err("the target is neither a path nor an http URL");
    };
    let rest = &target[scheme.len()..];
    let end = rest.iter().position(|byte| b"/?".contains(byte)).unwrap_or(rest.len());
    let (authority, origin) = rest.split_at(end);
    if authority.is_empty() || !fields::is_authority(authority) {
        return Err("the target's host is not a host name");
    }
    match origin {
        // "http://host" asks for "/": the scheme's last slash stands for it, so that the target stays a range of the head.
        [] => Ok((Some(authority), &target[scheme.len() - 1..scheme.len()])),
        [b'/', ..] => Ok((Some(authority), origin)),
        _ => Err("the target has a query but no path"),
    }
}
