//! A decision that is not acted on: for people who ask why, and for a second policy that is only watched.

use std::sync::Arc;

use super::request::Request;
use super::{Router, candidates, no_policy, policy_word};
use crate::error::Error;
use crate::model::ANY;
use crate::policy::{self, Candidates, Choice, Parameters, Policy};
use crate::prefix_index::Matches;
use crate::prompt::Endpoint;
use crate::random::Random;
use crate::region::{MAX_TARGETS, State};

/// What was known of one candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CandidateView {
    /// The target.
    pub slot: u16,
    /// Bytes of the prompt that it is taken to hold.
    pub match_bytes: u32,
    /// Requests in flight.
    pub load: u64,
    /// Predicted uncached prompt tokens of those.
    pub outstanding_tokens: u64,
    /// In seconds, of policies that know one.
    pub cost_seconds: Option<f64>,
}

/// What would be decided now.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The policy that decides.
    pub policy: &'static str,
    /// The target that would be chosen; None: nobody is available.
    pub chosen: Option<u16>,
    /// Which rule of the policy chose it.
    pub reason: &'static str,
    /// Bytes of the prompt's text.
    pub prompt_bytes: u32,
    /// Everybody who could get the request, by slot.
    pub candidates: Vec<CandidateView>,
}

/// A policy that decides everything once more, without effect.
pub(super) struct Shadow {
    pub(super) policy: Box<dyn Policy>,
}

impl Shadow {
    pub(super) fn of(name: &str, parameters: &Parameters) -> Result<Self, Error> {
        let policy = policy::by_name(name, parameters).ok_or_else(|| no_policy(name))?;
        if policy.keeps_keys() {
            return Err(Error::Invalid(format!("{name} cannot be watched: it follows what it was given before")));
        }
        Ok(Self { policy })
    }
}

impl Router {
    /// What would be decided for such a request now, and why. Nothing changes by it, the generator and the counters included.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the body cannot be routed, [`Error::UnknownModel`], [`Error::RegionBusy`].
    pub fn explain(
        self: &Arc<Self>,
        endpoint: Endpoint,
        routing_headers: &[u8],
        body: &[u8],
        now_ns: u64,
    ) -> Result<Explanation, Error> {
        let prompt = self.reader.read(endpoint, body).map_err(|refused| Error::Invalid(refused.message))?;
        let request = &Request::new(self, endpoint, routing_headers, (prompt, body.len()), now_ns);
        request.progress().hypothetical = true;
        self.explain_request(request, now_ns)
    }

    /// What [`Router::select`] would decide for a request now, and why. Nothing changes by it.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::RegionBusy`].
    pub fn explain_request(&self, request: &Request, now_ns: u64) -> Result<Explanation, Error> {
        let progress = request.progress();
        let mut matches = Matches::new(MAX_TARGETS);
        let mut guard = self.lock()?;
        let state = guard.state();
        let model = self.resolve_model(&state, request)?;
        let candidates = candidates(&state, model, request, &progress, false);
        state.index.lookup(&request.prompt().blocks, &mut matches);
        let slots: Vec<u16> = candidates.iter().collect();
        let targets = &state.targets;
        let (mut views, mut chosen, mut reason) = (Vec::new(), None, "nobody is available");
        let (policy, name) = (self.policy_of(&state, model), self.policies.name(policy_word(&state, model)));
        watch(&state, model, request, &candidates, &matches, now_ns, |choice| {
            let view = |slot| CandidateView {
                slot,
                match_bytes: choice.matches.of(slot).bytes,
                load: targets.load(slot),
                outstanding_tokens: targets.outstanding_tokens(slot),
                cost_seconds: policy.cost_seconds(choice, slot),
            };
            views = slots.iter().copied().map(view).collect();
            if !slots.is_empty() {
                let picked = policy.pick(choice);
                reason = policy.reason(choice, picked);
                chosen = Some(picked);
            }
        });
        let prompt_bytes = request.prompt().routed_bytes;
        Ok(Explanation { policy: name, chosen, reason, prompt_bytes, candidates: views })
    }
}

/// Let a policy look at a choice with a generator and a turn that are thrown away.
pub(super) fn watch(
    state: &State<'_>,
    model: usize,
    request: &Request,
    candidates: &Candidates,
    matches: &Matches,
    now_ns: u64,
    look: impl FnOnce(&mut Choice<'_, '_>),
) {
    let (mut generator, mut turn) = (*state.random.0, state.models.turn_of(model.min(ANY)));
    look(&mut Choice {
        candidates,
        blocks: &request.prompt().blocks,
        matches,
        prompt_bytes: request.prompt().routed_bytes,
        targets: &state.targets,
        index: &state.index,
        sticky_keys: &state.sticky_keys,
        routing_key: request.routing_key(),
        now_ns,
        random: &mut Random(&mut generator),
        turn: &mut turn,
    });
}
