//! A lease: one attempt's claim on one target. Load rises when it is made and falls when it is released or dropped, nowhere else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::request::Request;
use super::{Router, Transition};
use crate::error::Error;
use crate::http1::Arrivals;
use crate::metrics::TargetCounter;
use crate::outcome::Outcome;
use crate::prefix_index::{Claim, Match};
use crate::region::State;
use crate::speed::Observation;
use crate::target::{Field, Work};

/// One attempt's claim on one target. Dropped without a release, it counts as cancelled.
pub struct Lease {
    request: Arc<Request>,
    terms: Terms,
    released: AtomicBool,
}

/// What was taken, to be given back.
pub(super) struct Terms {
    pub(super) slot: u16,
    pub(super) head: u16,
    pub(super) incarnation: u64,
    /// The rank that the worker is told in a header.
    pub(super) told_rank: Option<u16>,
    /// Whether its body must be told, too: the client did not.
    pub(super) splices_rank: bool,
    pub(super) match_bytes: u32,
    pub(super) predicted_cached_tokens: u64,
    /// How long ago the target was last sent what it is taken to hold, as a share of its capacity.
    pub(super) match_age: f64,
    /// In flight on its account.
    pub(super) work: Work,
    /// Uncached prompt tokens that were queued with it, its own included.
    pub(super) queued_tokens: f64,
    /// Requests in flight before it.
    pub(super) load_before: u64,
    /// On the target's cache.
    pub(super) claim: Claim,
    pub(super) selected_ns: u64,
}

impl Lease {
    pub(super) fn new(request: &Arc<Request>, terms: Terms) -> Self {
        Self { request: Arc::clone(request), terms, released: AtomicBool::new(false) }
    }

    /// The target.
    pub fn slot(&self) -> u16 {
        self.terms.slot
    }

    /// Of the worker in that slot.
    pub fn incarnation(&self) -> u64 {
        self.terms.incarnation
    }

    /// When it was taken.
    pub fn selected_ns(&self) -> u64 {
        self.terms.selected_ns
    }

    /// Whose it is.
    pub fn request(&self) -> &Arc<Request> {
        &self.request
    }

    /// Bytes of the prompt that the target is taken to hold.
    pub fn match_bytes(&self) -> u32 {
        self.terms.match_bytes
    }

    /// The same in tokens, as that target's answers have counted text.
    pub fn predicted_cached_tokens(&self) -> u64 {
        self.terms.predicted_cached_tokens
    }

    /// What to insert into the body, and where, so that the worker uses the rank that was chosen.
    pub fn splice(&self) -> Option<(usize, Vec<u8>)> {
        let rank = self.terms.told_rank.filter(|_| self.terms.splices_rank)?;
        Some(self.request.prompt().rank_place.splice(rank))
    }

    /// The rank to name in the head as well: workers that read no rank in bodies read one there.
    pub fn told_rank(&self) -> Option<u16> {
        self.terms.told_rank
    }

    /// How its attempt went on the wire: on a connection that had been used before (None: on none), and in which pieces the answer
    /// came. To be told before the lease is released.
    pub fn count_delivery(&self, reused: Option<bool>, arrivals: Option<&Arrivals>) {
        if self.released.load(Ordering::Acquire) {
            return;
        }
        let (request, terms) = (&self.request, &self.terms);
        let slab = &request.router().slab;
        let count = |counter, amount| slab.count(terms.slot, terms.incarnation, counter, amount);
        if let Some(reused) = reused {
            count(if reused { TargetCounter::Reuses } else { TargetCounter::Connects }, 1);
            count(TargetCounter::RequestBytes, request.body_bytes());
        }
        if let Some(arrivals) = arrivals {
            count(TargetCounter::ResponseBytes, arrivals.bytes);
            slab.arrive(request.progress().settle(request, None), arrivals);
        }
    }

    /// Give it back; once, later calls do nothing.
    ///
    /// # Errors
    /// [`Error::RegionBusy`]: nothing was given back, call again.
    pub fn release(&self, outcome: &Outcome, now_ns: u64) -> Result<Vec<Transition>, Error> {
        if self.released.swap(true, Ordering::AcqRel) {
            return Ok(Vec::new());
        }
        let released = self.request.router().release(&self.request, &self.terms, outcome, now_ns);
        self.released.store(released.is_ok(), Ordering::Release);
        released
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Nobody is there who could be told of transitions, or try again; a cancelled attempt makes no transitions.
        let _ = self.release(&Outcome::CANCELLED, self.terms.selected_ns);
    }
}

impl Router {
    fn release(
        &self,
        request: &Request,
        terms: &Terms,
        outcome: &Outcome,
        now_ns: u64,
    ) -> Result<Vec<Transition>, Error> {
        let mut progress = request.progress();
        progress.last_outcome = Some(outcome.kind);
        let mut guard = self.lock()?;
        let mut state = guard.state();
        // The worker was removed meanwhile, and its load with it: what is in the slot now is another worker's.
        if state.targets.incarnation(terms.slot) != terms.incarnation {
            return Ok(Vec::new());
        }
        state.targets.end(terms.slot, terms.work);
        if outcome.excludes_worker() {
            progress.failed.push((terms.head, state.targets.incarnation(terms.head)));
        }
        if outcome.voids_claim() {
            state.index.take_back(terms.slot, &request.prompt().blocks, terms.claim);
            let mut speed = state.targets.speed(terms.slot);
            speed.unqueue(terms.work.uncached_tokens as f64, now_ns);
            state.targets.set_speed(terms.slot, &speed);
        }
        if outcome.wants_probe() {
            state.targets.set(Field::ProbeWanted, terms.head, 1);
        }
        self.learn(&mut state, request, terms, outcome);
        learn_speed(&mut state, request, terms, outcome, now_ns);
        Ok(self.judge(&mut state, terms, outcome, now_ns).into_iter().collect())
    }

    /// What the attempt says about the worker.
    fn judge(&self, state: &mut State<'_>, terms: &Terms, outcome: &Outcome, now_ns: u64) -> Option<Transition> {
        let verdict = outcome.verdict();
        if verdict == Some(false) {
            self.slab.count(terms.slot, terms.incarnation, TargetCounter::Failures, 1);
        }
        let breaker = state.targets.breaker(terms.head);
        let judged =
            verdict.map_or(breaker, |ok| breaker.observe(ok, terms.work.permit, now_ns, &self.settings.breaker));
        if judged != breaker {
            state.targets.set_breaker(terms.head, judged);
        }
        if terms.work.permit || judged.name() != breaker.name() {
            self.refresh_availability(state, terms.head);
        }
        Transition::between(terms.head, "breaker", breaker.name(), judged.name())
    }

    /// What the worker's own counts say: how much text a token is, what it generated, what it had in its cache.
    fn learn(&self, state: &mut State<'_>, request: &Request, terms: &Terms, outcome: &Outcome) {
        let slot = terms.slot;
        let count = |counter, amount| self.slab.count(slot, terms.incarnation, counter, amount);
        let prompt_bytes = request.prompt().prompt_bytes;
        if let Ok(prompt_tokens @ 1..) = u64::try_from(outcome.prompt_tokens) {
            // Without text (embeddings) there is nothing to learn.
            if prompt_bytes > 0 {
                state.targets.learn(slot, prompt_bytes, prompt_tokens);
                self.fit_capacity(state, slot);
            }
            if let Ok(cached_tokens) = u64::try_from(outcome.cached_tokens) {
                let predicted = terms.predicted_cached_tokens.min(prompt_tokens);
                if !state.targets.is_fed(slot) {
                    state.targets.learn_cached_share(slot, terms.match_age, prompt_tokens, predicted, cached_tokens);
                    self.fit_capacity(state, slot);
                }
                count(TargetCounter::PromptTokens, prompt_tokens);
                count(TargetCounter::ReportedCachedTokens, cached_tokens);
                count(TargetCounter::PredictedCachedTokens, predicted);
            }
        }
        if let Ok(completion_tokens @ 1..) = u64::try_from(outcome.completion_tokens) {
            count(TargetCounter::CompletionTokens, completion_tokens);
            if !state.targets.is_fed(slot) {
                let bytes = completion_tokens as f64 * state.targets.bytes_per_token(slot);
                state.index.advance(slot, bytes as u64);
            }
        }
        if outcome.verdict() == Some(true) {
            // It was in use until now.
            let prompt = request.prompt();
            let whole = Match { blocks: prompt.blocks.len() as u32, bytes: prompt.routed_bytes };
            state.index.lift(slot, &prompt.blocks, whole);
            state.index.stamp(slot, &prompt.blocks, whole, 0);
        }
    }
}

const NANOSECONDS: f64 = 1e9;

/// What a whole answer says of its target's speed. Only a stream shows when the first token came.
fn learn_speed(state: &mut State<'_>, request: &Request, terms: &Terms, outcome: &Outcome, now_ns: u64) {
    let Ok(tokens @ 1..) = u64::try_from(outcome.completion_tokens) else { return };
    let mut speed = state.targets.speed(terms.slot);
    speed.learn_answer(tokens);
    if let (true, true, Some(first_byte_ns)) = (request.prompt().stream, tokens > 1, outcome.first_byte_ns) {
        // What it had to read in truth, where the worker says so.
        let read = u64::try_from(outcome.prompt_tokens.saturating_sub(outcome.cached_tokens));
        let read = if outcome.cached_tokens >= 0 { read.ok() } else { None };
        let predicted = terms.work.uncached_tokens as f64;
        speed.learn(&Observation {
            queued_tokens: (terms.queued_tokens - predicted + read.map_or(predicted, |read| read as f64)).max(0.0),
            first_token_seconds: first_byte_ns.saturating_sub(terms.selected_ns) as f64 / NANOSECONDS,
            load: terms.load_before + 1,
            step_seconds: now_ns.saturating_sub(first_byte_ns) as f64 / NANOSECONDS / (tokens - 1) as f64,
        });
    }
    state.targets.set_speed(terms.slot, &speed);
}
