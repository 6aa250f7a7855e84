//! The router: reads a request, selects a target for it, takes the lease on it back.
//!
//! **Owner.** All state that a decision reads is in the region; beside it the router owns what no decision reads (counters,
//! names), scratch memory and mirrors of caches. Locks are taken in this order: a request's progress, scratch or mirrors, region.
//!
//! ```text
//! read     scan, keys                                     no lock
//! select   who can -> policy -> permit, load up, stamp    the region's lock
//! release  load down, machines, claim, learning           the region's lock
//! ```

mod admission;
mod explain;
mod kv_events;
mod lease;
mod names;
mod request;
mod settings;
mod slabs;
mod views;
mod workers;

pub use explain::{CandidateView, Explanation};
pub use kv_events::FeedView;
pub use lease::Lease;
pub use request::Request;
pub use settings::Settings;
pub use views::{NamedSeries, TargetView};

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::metrics::{Slab, TargetCounter};
use crate::model::ANY;
use crate::outcome::OutcomeKind;
use crate::policy::{self, Candidates, Choice, Policies, Policy};
use crate::prefix_index::Matches;
use crate::prompt::{BadRequest, Endpoint, PromptReader};
use crate::region::{Guard, MAX_TARGETS, Region, State};
use crate::target::{Field, Work};
use explain::Shadow;
use names::Names;
use request::Progress;

const BAD_REQUEST: u16 = 400;

/// A fact for the log: a machine of a worker changed its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The worker's first slot.
    pub head: u16,
    /// "health" or "breaker".
    pub machine: &'static str,
    /// The state's name before.
    pub previous: &'static str,
    /// And now.
    pub current: &'static str,
}

/// The engine. One per process, shared by reference.
pub struct Router {
    settings: Settings,
    policies: Policies,
    shadow: Option<Shadow>,
    reader: PromptReader,
    region: Region,
    slab: Slab,
    /// Of the other processes, where this one is asked for the numbers of all.
    others: Mutex<BTreeMap<usize, Slab>>,
    names: Names,
    matches: Mutex<Matches>,
    /// By slot, of ranks whose events this process follows.
    feeds: Mutex<BTreeMap<u16, kv_events::Feed>>,
}

impl Router {
    /// A router without workers.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the setting that cannot be.
    pub fn new(settings: Settings) -> Result<Arc<Self>, Error> {
        let region = Region::anonymous(settings.index_memory_bytes, settings.seed, settings.hash_seed);
        let slab = Slab::new(settings.duration_buckets_ns.clone());
        Self::on(region, slab, settings)
    }

    /// A router on a region, which other processes may share; all of them have the same settings. Time must be the same for
    /// all, too: a clock of the machine.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the setting that cannot be.
    pub fn on(region: Region, slab: Slab, settings: Settings) -> Result<Arc<Self>, Error> {
        settings.validate()?;
        let hash_seed = region.hash_seed();
        let parameters = &settings.policy_parameters;
        let policies = Policies::new(&settings.policy, parameters).ok_or_else(|| no_policy(&settings.policy))?;
        let shadow = settings.shadow_policy.as_ref().map(|name| Shadow::of(name, parameters)).transpose()?;
        Ok(Arc::new(Self {
            policies,
            shadow,
            reader: PromptReader::new(hash_seed),
            region,
            slab,
            others: Mutex::default(),
            names: Names::new(hash_seed),
            matches: Mutex::new(Matches::new(MAX_TARGETS)),
            feeds: Mutex::default(),
            settings,
        }))
    }

    /// Scan a body once, and count the request as accepted.
    ///
    /// `routing_headers`: lines `name: value\r\n` with lower-case names.
    ///
    /// # Errors
    /// [`BadRequest`]. It is counted as answered with 400: nobody else can count it, since there is no request.
    pub fn read(
        self: &Arc<Self>,
        endpoint: Endpoint,
        routing_headers: &[u8],
        body: &[u8],
        now_ns: u64,
    ) -> Result<Arc<Request>, BadRequest> {
        let read = self.reader.read(endpoint, body);
        let _step = self.slab.step();
        self.slab.accept();
        match read {
            Ok(prompt) => {
                self.slab.change_in_flight(1);
                Ok(Arc::new(Request::new(self, endpoint, routing_headers, (prompt, body.len()), now_ns)))
            }
            Err(refused) => {
                let series = self.slab.settle(None, endpoint, false);
                self.slab.assign(series);
                self.slab.answer(series, BAD_REQUEST, 0, None);
                Err(refused)
            }
        }
    }

    /// Choose a target, raise its load, stamp the prefix. None: nobody is available.
    ///
    /// Workers that failed this request are left out unless `allow_failed`.
    ///
    /// # Errors
    /// [`Error::UnknownModel`], [`Error::RegionBusy`].
    pub fn select(&self, request: &Arc<Request>, now_ns: u64, allow_failed: bool) -> Result<Option<Lease>, Error> {
        let mut progress = request.progress();
        let mut matches = self.matches.lock().unwrap_or_else(PoisonError::into_inner);
        let mut guard = self.lock()?;
        let mut state = guard.state();

        self.wake_breakers(&mut state, now_ns);
        let model = self.resolve_model(&state, request)?;
        let candidates = candidates(&state, model, request, &progress, allow_failed);
        if candidates.count() == 0 {
            progress.settle(request, label(&state, model, None));
            return Ok(None);
        }
        state.index.lookup(&request.prompt().blocks, &mut matches);
        let shadows_pick = self.shadow.as_ref().map(|shadow| {
            let mut picked = 0;
            let look = |choice: &mut Choice<'_, '_>| picked = shadow.policy.pick(choice);
            explain::watch(&state, model, request, &candidates, &matches, now_ns, look);
            picked
        });
        let policy = self.policy_of(&state, model);
        let slot = policy.pick(&mut Choice {
            candidates: &candidates,
            blocks: &request.prompt().blocks,
            matches: &matches,
            prompt_bytes: request.prompt().routed_bytes,
            targets: &state.targets,
            index: &state.index,
            sticky_keys: &state.sticky_keys,
            routing_key: request.routing_key(),
            now_ns,
            random: &mut state.random,
            turn: state.models.turn(model),
        });
        if let (true, Some(key)) = (policy.keeps_keys(), request.routing_key()) {
            let max_idle_ns = self.settings.policy_parameters.max_idle_ns;
            state.sticky_keys.remember(key, slot, now_ns, max_idle_ns, &mut state.targets);
        }
        if let Some(picked) = shadows_pick {
            self.slab.shadow(picked == slot);
        }
        let series = progress.settle(request, label(&state, model, Some(slot)));
        let retried = (progress.attempts > 0).then(|| progress.last_outcome.unwrap_or(OutcomeKind::Cancelled));
        self.slab.attempt(series, retried);
        self.slab.count(slot, state.targets.incarnation(slot), TargetCounter::Selections, 1);
        progress.attempts += 1;
        Ok(Some(self.begin(&mut state, request, slot, &matches, now_ns)))
    }

    /// Count the client's request as answered, once.
    ///
    /// `status`: what the client got; `first_byte_ns`: when it got the first byte, None if it did not.
    pub fn finish(&self, request: &Request, status: u16, first_byte_ns: Option<u64>, now_ns: u64) {
        let mut progress = request.progress();
        let series = progress.settle(request, None);
        if !std::mem::replace(&mut progress.finished, true) {
            let since = |ns: u64| ns.saturating_sub(request.accepted_ns());
            let _step = self.slab.step();
            self.slab.change_in_flight(-1);
            self.slab.answer(series, status, since(now_ns), first_byte_ns.map(since));
        }
    }

    /// Another process on the same region is dead: forget what it had in flight.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn clear_process(&self, process: usize) -> Result<(), Error> {
        self.region.clear_process(process)?;
        let mut guard = self.lock()?;
        self.refresh_all(&mut guard.state());
        Ok(())
    }

    /// The region, to read and write.
    fn lock(&self) -> Result<Guard<'_>, Error> {
        let mut guard = self.region.lock()?;
        if guard.waited_ns() > 0 {
            self.slab.waited(guard.waited_ns());
        }
        if guard.from_the_dead() {
            self.refresh_all(&mut guard.state());
        }
        Ok(guard)
    }

    fn feeds(&self) -> MutexGuard<'_, BTreeMap<u16, kv_events::Feed>> {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refresh_all(&self, state: &mut State<'_>) {
        for head in state.targets.heads().collect::<Vec<_>>() {
            self.refresh_availability(state, head);
        }
    }

    /// The claim on `slot`: load and permit are taken, the prefix is stamped.
    fn begin(&self, state: &mut State<'_>, request: &Arc<Request>, slot: u16, matches: &Matches, now_ns: u64) -> Lease {
        let prompt = request.prompt();
        let matched = matches.of(slot);
        let uncached_bytes = prompt.prompt_bytes.saturating_sub(u64::from(matched.bytes));
        let bytes_per_token = state.targets.bytes_per_token(slot);
        let mut speed = state.targets.speed(slot);
        let work = Work {
            uncached_tokens: (uncached_bytes as f64 / bytes_per_token) as u64,
            held_tokens: (prompt.prompt_bytes as f64 / bytes_per_token + speed.answer_tokens()) as u64,
            permit: state.targets.breaker(state.targets.head(slot)).is_half_open(),
        };
        let head = state.targets.head(slot);
        // Of the rank that has most to do: its step is everybody's.
        let load_before = state.targets.slots_of(head).map(|rank| state.targets.load(rank)).max().unwrap_or_default();
        let queued_tokens = speed.queue(work.uncached_tokens as f64, now_ns);
        state.targets.set_speed(slot, &speed);
        state.targets.begin(slot, work);
        if work.permit {
            self.refresh_availability(state, head);
        }
        let match_age = state.index.age(slot, &prompt.blocks, matched);
        state.index.lift(slot, &prompt.blocks, matched);
        // The clock of a fed target advances when its cache says so.
        let new_bytes = if state.targets.is_fed(slot) { 0 } else { uncached_bytes };
        let claim = state.index.stamp(slot, &prompt.blocks, matched, new_bytes);
        Lease::new(
            request,
            lease::Terms {
                slot,
                head,
                incarnation: state.targets.incarnation(slot),
                // A rank that the worker does not have is its to refuse.
                told_rank: (state.targets.ranks(slot) > 1)
                    .then(|| state.targets.rank(slot))
                    .filter(|&rank| request.pinned_rank().is_none_or(|pinned| pinned == rank)),
                splices_rank: request.pinned_rank().is_none(),
                match_bytes: matched.bytes,
                match_age,
                predicted_cached_tokens: (f64::from(matched.bytes) / bytes_per_token) as u64,
                work,
                queued_tokens,
                load_before,
                claim,
                selected_ns: now_ns,
            },
        )
    }

    /// The model, or [`ANY`], whose workers can get this request.
    fn resolve_model(&self, state: &State<'_>, request: &Request) -> Result<usize, Error> {
        let Some(hash) = request.model_hash() else { return Ok(ANY) };
        match state.models.find(hash) {
            Some(model) => Ok(model),
            // Nobody to ask yet, or a fleet of one model, which takes any name as sglang-router does.
            None if !state.models.any() => Ok(ANY),
            None if !self.settings.strict_model && state.models.single().is_some() => Ok(ANY),
            None => Err(Error::UnknownModel(request.prompt().model.clone().unwrap_or_default())),
        }
    }

    /// The policy of a model: its own if its first worker asked for one.
    fn policy_of(&self, state: &State<'_>, model: usize) -> &dyn Policy {
        self.policies.get(policy_word(state, model))
    }

    /// Whoever's breaker has been open for long enough is half-open now.
    fn wake_breakers(&self, state: &mut State<'_>, now_ns: u64) {
        if !state.targets.take_wake(now_ns) {
            return;
        }
        for head in 0..state.targets.slot_end() as u16 {
            if state.targets.is_head(head) {
                let breaker = state.targets.breaker(head);
                let woken = breaker.at(now_ns);
                // Those still open, too: setting them says when to look again.
                state.targets.set_breaker(head, woken);
                if woken != breaker {
                    self.refresh_availability(state, head);
                }
            }
        }
    }

    /// To be called after whatever availability hangs on has changed: health, breaker, permits, draining, models.
    fn refresh_availability(&self, state: &mut State<'_>, head: u16) {
        let available = self.is_available(state, head);
        for slot in state.targets.slots_of(head) {
            let mask = state.targets.get(Field::Models, slot);
            state.models.set_available(slot, mask, available);
        }
    }

    fn is_available(&self, state: &State<'_>, head: u16) -> bool {
        let targets = &state.targets;
        targets.health(head).is_ready()
            && !targets.draining(head)
            && targets.breaker(head).admits(targets.permits(head), &self.settings.breaker)
    }
}

/// What the region says of a model's policy; of [`ANY`], that of the only model there is.
fn policy_word(state: &State<'_>, model: usize) -> u64 {
    let model = if model == ANY { state.models.single() } else { Some(model) };
    model.map_or(0, |model| state.models.policy(model))
}

fn no_policy(name: &str) -> Error {
    let names: Vec<&str> = policy::names().collect();
    Error::Invalid(format!("no policy is called {name:?}, only {}", names.join(", ")))
}

/// Who can get the request: available for its model, of the rank its client insists on, not yet failed.
fn candidates(
    state: &State<'_>,
    model: usize,
    request: &Request,
    progress: &MutexGuard<'_, Progress>,
    allow_failed: bool,
) -> Candidates {
    let targets = &state.targets;
    let mut candidates = Candidates::new(state.models.available(model), targets.slot_end());
    if let Some(rank) = request.pinned_rank() {
        // Whether anybody has it who might be available again. If not, whoever is asked says so; one that has fewer ranks must
        // not say so while another that has it is only ill.
        let serves = |head| model == ANY || targets.get(Field::Models, head) >> model & 1 == 1;
        let exists = targets.heads().any(|head| targets.ranks(head) > rank && serves(head));
        for slot in candidates.clone().iter().filter(|&slot| exists && targets.rank(slot) != rank) {
            candidates.remove(slot);
        }
    }
    if !allow_failed {
        for &(head, incarnation) in &progress.failed {
            if targets.incarnation(head) == incarnation {
                targets.slots_of(head).for_each(|slot| candidates.remove(slot));
            }
        }
    }
    candidates
}

/// The hash of the model that a request is counted under: the one it named if it is known, else the worker's own.
fn label(state: &State<'_>, model: usize, slot: Option<u16>) -> Option<u64> {
    let primary = |slot| state.targets.get(Field::Primary, slot) as usize;
    let model = if model == ANY { slot.map(primary).or_else(|| state.models.single())? } else { model };
    Some(state.models.hash(model))
}
