//! Workers come, change, are watched, and go.

use super::{Router, Transition, no_policy};
use crate::breaker::Breaker;
use crate::error::Error;
use crate::health::Health;
use crate::policy::Policies;
use crate::region::{Guard, MAX_TARGETS, State};
use crate::target::Field;

impl Router {
    /// A worker with `ranks` dp ranks serves `models`, its own name first. Pending until probes succeed.
    ///
    /// `kv_capacity_tokens` is per rank; 0: unknown. `policy`: how requests for its models are routed; of a model, the first
    /// worker's word counts for as long as anybody serves it.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Invalid`].
    pub fn add_worker(
        &self,
        models: &[String],
        ranks: usize,
        kv_capacity_tokens: u64,
        policy: Option<&str>,
    ) -> Result<Vec<u16>, Error> {
        if !(1..=MAX_TARGETS).contains(&ranks) {
            return Err(Error::Invalid(format!("a worker has 1 to {MAX_TARGETS} dp ranks, not {ranks}")));
        }
        let hashes = self.model_hashes(models)?;
        let policy = policy_word(policy)?;
        let mut guard = self.lock()?;
        let mut state = guard.state();
        let served = state.models.serve(&hashes, policy).ok_or(Error::Full("place for another model"))?;
        let Some(head) = state.targets.claim(ranks as u16) else {
            state.models.unserve(served.0, served.1);
            return Err(Error::Full("run of free slots"));
        };
        let slots: Vec<u16> = state.targets.slots_of(head).collect();
        for &slot in &slots {
            // Whatever the slot's last worker held, this one does not.
            state.index.open_target(slot, self.capacity_bytes(0, 0.0));
        }
        self.describe(&mut state, head, served, kv_capacity_tokens);
        Ok(slots)
    }

    /// The worker at `head` was asked again what it serves and holds.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::Invalid`].
    pub fn update_worker(
        &self,
        head: u16,
        models: &[String],
        kv_capacity_tokens: u64,
        policy: Option<&str>,
    ) -> Result<(), Error> {
        let hashes = self.model_hashes(models)?;
        let policy = policy_word(policy)?;
        let mut guard = self.lock()?;
        let mut state = state_with_worker(&mut guard, head)?;
        let served = state.models.serve(&hashes, policy).ok_or(Error::Full("place for another model"))?;
        withdraw_models(&mut state, head);
        self.describe(&mut state, head, served, kv_capacity_tokens);
        self.refresh_availability(&mut state, head);
        Ok(())
    }

    /// The worker told the size of one rank's cache, which need not be that of its others.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn set_kv_capacity(&self, slot: u16, kv_capacity_tokens: u64) -> Result<(), Error> {
        let mut guard = self.lock()?;
        let mut state = guard.state();
        if !state.targets.is_taken(slot) {
            return Err(Error::Invalid(format!("no worker has slot {slot}")));
        }
        if state.targets.kv_capacity_tokens(slot) != kv_capacity_tokens {
            state.targets.set(Field::KvCapacityTokens, slot, kv_capacity_tokens);
            self.fit_capacity(&mut state, slot);
        }
        Ok(())
    }

    /// The region goes on after its last router: what was in flight is gone, and no worker is known to be well. Heads of the workers
    /// that are still there.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn take_over(&self) -> Result<Vec<u16>, Error> {
        let mut guard = self.lock()?;
        let mut state = guard.state();
        let heads: Vec<u16> = state.targets.heads().collect();
        for &head in &heads {
            state.targets.set_health(head, Health::NEW);
            state.targets.set_breaker(head, Breaker::NEW);
            for field in [Field::Draining, Field::ProbeWanted] {
                state.targets.set(field, head, 0);
            }
            for slot in state.targets.slots_of(head) {
                state.targets.set(Field::IsFed, slot, 0);
            }
            self.refresh_availability(&mut state, head);
        }
        Ok(heads)
    }

    /// Leave `text` for the other processes of the region, and for the next router on it.
    ///
    /// # Errors
    /// [`Error::Full`] when it is too long, [`Error::RegionBusy`].
    pub fn publish_registry(&self, text: &[u8]) -> Result<(), Error> {
        if self.lock()?.state().registry.write(text) {
            Ok(())
        } else {
            Err(Error::Full("room for a text of that length"))
        }
    }

    /// The text that was left last, and its version; 0: none was.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn registry(&self) -> Result<(u64, Vec<u8>), Error> {
        let mut guard = self.lock()?;
        let registry = guard.state().registry;
        Ok((registry.version(), registry.read()))
    }

    /// The worker at `head` has lost its cache.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn restart_worker(&self, head: u16) -> Result<(), Error> {
        let mut guard = self.lock()?;
        let mut state = state_with_worker(&mut guard, head)?;
        for slot in state.targets.slots_of(head) {
            state.index.forget_target(slot);
        }
        Ok(())
    }

    /// No new leases on the worker at `head`.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn drain_worker(&self, head: u16) -> Result<(), Error> {
        let mut guard = self.lock()?;
        let mut state = state_with_worker(&mut guard, head)?;
        state.targets.set(Field::Draining, head, 1);
        self.refresh_availability(&mut state, head);
        Ok(())
    }

    /// The worker at `head` is gone. Leases still out on it release without effect.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn remove_worker(&self, head: u16) -> Result<(), Error> {
        let mut guard = self.lock()?;
        let mut state = state_with_worker(&mut guard, head)?;
        withdraw_models(&mut state, head);
        for slot in state.targets.slots_of(head) {
            state.index.forget_target(slot);
        }
        state.targets.free(head);
        Ok(())
    }

    /// A probe of the worker at `head` went well or not.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn observe_probe(&self, head: u16, ok: bool) -> Result<Vec<Transition>, Error> {
        let mut guard = self.lock()?;
        let mut state = state_with_worker(&mut guard, head)?;
        let targets = &mut state.targets;
        let (health, breaker) = (targets.health(head), targets.breaker(head));
        let observed = health.observe(ok, self.settings.health);
        let probed = if ok { breaker.probed() } else { breaker };
        targets.set_health(head, observed);
        targets.set_breaker(head, probed);
        self.refresh_availability(&mut state, head);
        let moved = [
            Transition::between(head, "health", health.name(), observed.name()),
            Transition::between(head, "breaker", breaker.name(), probed.name()),
        ];
        Ok(moved.into_iter().flatten().collect())
    }

    /// Heads of the workers that failed attempts want probed at once, each named once.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn take_probe_requests(&self) -> Result<Vec<u16>, Error> {
        let mut guard = self.lock()?;
        let targets = &mut guard.state().targets;
        let wanted: Vec<u16> = targets.heads().filter(|&head| targets.get(Field::ProbeWanted, head) != 0).collect();
        for &head in &wanted {
            targets.set(Field::ProbeWanted, head, 0);
        }
        Ok(wanted)
    }

    /// Reclaim index entries past their horizon in at most `max_buckets` buckets, and, once per interval, hold every target to
    /// `max_tree_size`. How many entries were freed.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn evict(&self, now_ns: u64, max_buckets: usize) -> Result<usize, Error> {
        let mut guard = self.lock()?;
        let mut state = guard.state();
        if state.targets.take_eviction(now_ns, self.settings.eviction_interval_ns) {
            for slot in state.targets.slots() {
                state.index.trim(slot, self.settings.max_tree_size);
            }
        }
        let max_idle_ns = self.settings.policy_parameters.max_idle_ns;
        // Without any key its table is left alone: memory that nobody has touched costs nothing.
        if state.targets.slots().any(|slot| state.targets.get(Field::StickyKeys, slot) > 0) {
            state.sticky_keys.sweep(max_buckets / BUCKETS_PER_STICKY_SET, now_ns, max_idle_ns, &mut state.targets);
        }
        Ok(state.index.evict(max_buckets))
    }

    /// Fit what the index credits a target with to what its answers say of its cache.
    pub(super) fn fit_capacity(&self, state: &mut State<'_>, slot: u16) {
        let kv_capacity_tokens = state.targets.get(Field::KvCapacityTokens, slot);
        let cached_tokens = (kv_capacity_tokens as f64 * state.targets.cached_share(slot)) as u64;
        let capacity = self.capacity_bytes(cached_tokens, state.targets.bytes_per_token(slot));
        state.index.set_capacity(slot, capacity);
    }

    /// Text that fits into a KV cache, as far as is known; and no more than may be credited between two evictions.
    fn capacity_bytes(&self, kv_capacity_tokens: u64, bytes_per_token: f64) -> u64 {
        let most = self.settings.max_tree_size.saturating_mul(UNTRIMMED_TREES);
        if kv_capacity_tokens == 0 {
            most
        } else {
            ((kv_capacity_tokens as f64 * bytes_per_token) as u64).clamp(1, most)
        }
    }

    fn describe(&self, state: &mut State<'_>, head: u16, served: (u64, usize), kv_capacity_tokens: u64) {
        for slot in state.targets.slots_of(head) {
            state.targets.set(Field::Models, slot, served.0);
            state.targets.set(Field::Primary, slot, served.1 as u64);
            state.targets.set(Field::KvCapacityTokens, slot, kv_capacity_tokens);
            self.fit_capacity(state, slot);
        }
    }

    fn model_hashes(&self, models: &[String]) -> Result<Vec<u64>, Error> {
        if models.is_empty() || models.iter().any(String::is_empty) {
            return Err(Error::Invalid("a worker serves at least one model, and models have names".to_owned()));
        }
        Ok(self.names.learn(models))
    }
}

/// A set of routing keys is as much to look at as eight buckets.
const BUCKETS_PER_STICKY_SET: usize = 8;

/// Between two evictions a target whose KV capacity is unknown may be credited with this many times `max_tree_size`.
const UNTRIMMED_TREES: u64 = 2;

impl Transition {
    pub(super) fn between(
        head: u16,
        machine: &'static str,
        previous: &'static str,
        current: &'static str,
    ) -> Option<Self> {
        (previous != current).then_some(Self { head, machine, previous, current })
    }
}

fn policy_word(name: Option<&str>) -> Result<u64, Error> {
    Policies::word_of(name).ok_or_else(|| no_policy(name.unwrap_or_default()))
}

fn state_with_worker<'g>(guard: &'g mut Guard<'_>, head: u16) -> Result<State<'g>, Error> {
    let state = guard.state();
    if usize::from(head) < MAX_TARGETS && state.targets.is_head(head) { Ok(state) } else { Err(Error::no_worker(head)) }
}

/// Nobody gets a request for the models of the worker at `head` on its account any more.
fn withdraw_models(state: &mut State<'_>, head: u16) {
    let mask = state.targets.get(Field::Models, head);
    for slot in state.targets.slots_of(head) {
        state.models.set_available(slot, mask, false);
    }
    state.models.unserve(mask, state.targets.get(Field::Primary, head) as usize);
}

// A worker is born as the machines' zero words say.
const _: () = assert!(matches!(Health::NEW, Health::Pending { successes: 0 }));
