//! Ranks whose KV caches tell what they gain and lose.
//!
//! What a fed target is credited with follows from its events in three ways. Blocks of token ids map to blocks of the index, and are
//! held from stored to removed. Text has no tokens here, so it is still judged by age: but the target's clock then advances with
//! the tokens that its cache took in, whoever sent them, and its capacity is what the cache was seen to hold. And a cache that was
//! cleared, or that begins anew, holds nothing.

use super::Router;
use crate::error::Error;
use crate::kv_mirror::{Changes, Mirror, SnapshotBlock, Stored};
use crate::prompt::IdBlock;
use crate::region::State;
use crate::target::Field;

/// Blocks of the index that are changed at once: some microseconds of the lock.
const BLOCKS_AT_ONCE: usize = 64;

/// All that a cache holds is stamped again when its clock has come this part of its horizon further: of each new token that is a
/// sixteenth of a block at most.
const STAMPED_AGAIN: u64 = 4;

/// A mirror, and whose cache it shows.
#[derive(Debug)]
pub(super) struct Feed {
    incarnation: u64,
    mirror: Mirror,
    /// Whether the mirror shows all of the cache. If not, its size says nothing.
    is_whole: bool,
    /// The target's clock when all that the mirror holds was stamped last.
    stamped_at: u64,
}

/// What is known of a fed rank's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeedView {
    /// Blocks that the cache holds, as its engine cuts them.
    pub blocks: usize,
    /// Tokens in them.
    pub tokens: u64,
    /// Of the blocks, those that the index cannot use: what stands before them is not known.
    pub unmapped: usize,
}

impl Router {
    /// From now on events tell what the rank in `slot` holds, which serves `models`; what events told before does not count any
    /// more. `is_new`: its cache is not the one that was known until now, and neither does what was sent there. `is_whole`: it
    /// is empty now, or a snapshot of it follows; else some of it is not known.
    ///
    /// # Errors
    /// [`Error::Invalid`] when no worker has the slot, [`Error::RegionBusy`].
    pub fn kv_begin(&self, slot: u16, models: &[String], is_new: bool, is_whole: bool) -> Result<(), Error> {
        let mut feeds = self.feeds();
        if let Some(mut feed) = feeds.remove(&slot) {
            // An error here means that the worker is gone, and its blocks with it.
            let _ = self.give_up(slot, feed.incarnation, &feed.mirror.take_all());
        }
        let mut guard = self.lock()?;
        let mut state = guard.state();
        if !state.targets.is_taken(slot) {
            return Err(Error::Invalid(format!("no worker has slot {slot}")));
        }
        if is_new {
            state.index.forget_target(slot);
        }
        state.targets.set(Field::IsFed, slot, 1);
        let incarnation = state.targets.incarnation(slot);
        feeds.insert(slot, Feed { incarnation, mirror: Mirror::new(&self.reader, models), is_whole, stamped_at: 0 });
        Ok(())
    }

    /// Nothing tells any more what the rank in `slot` holds: what is known of it ages as that of any other.
    ///
    /// # Errors
    /// [`Error::RegionBusy`].
    pub fn kv_end(&self, slot: u16) -> Result<(), Error> {
        let feed = self.feeds().remove(&slot);
        let mut guard = self.lock()?;
        let mut state = guard.state();
        if feed.is_some_and(|feed| state.targets.incarnation(slot) == feed.incarnation) {
            state.targets.set(Field::IsFed, slot, 0);
        }
        Ok(())
    }

    /// Blocks were stored. False: the event contradicts itself, and was left out.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the rank is not fed, or is gone; [`Error::RegionBusy`].
    pub fn kv_stored(&self, slot: u16, stored: &Stored<'_>) -> Result<bool, Error> {
        let mut is_sane = true;
        self.apply(slot, |mirror| {
            let changes = mirror.store(&self.reader, stored);
            is_sane = changes.is_some();
            changes.unwrap_or_default()
        })?;
        Ok(is_sane)
    }

    /// Blocks were given up in a medium; None: wherever they were.
    ///
    /// # Errors
    /// As [`Router::kv_stored`].
    pub fn kv_removed(&self, slot: u16, hashes: &[u64], medium: Option<u8>) -> Result<(), Error> {
        self.apply(slot, |mirror| mirror.remove(hashes, medium))
    }

    /// The cache holds just `snapshot`, in which each block stands behind the one before it.
    ///
    /// # Errors
    /// As [`Router::kv_stored`].
    pub fn kv_resync(&self, slot: u16, snapshot: &[SnapshotBlock]) -> Result<(), Error> {
        if let Some(feed) = self.feeds().get_mut(&slot) {
            feed.is_whole = true;
        }
        self.apply(slot, |mirror| mirror.resync(&self.reader, snapshot))
    }

    /// What is known of the cache of the rank in `slot`; None: it is not fed.
    pub fn kv_view(&self, slot: u16) -> Option<FeedView> {
        let feeds = self.feeds();
        let mirror = &feeds.get(&slot)?.mirror;
        Some(FeedView { blocks: mirror.blocks(), tokens: mirror.tokens(), unmapped: mirror.unmapped() })
    }

    fn apply(&self, slot: u16, event: impl FnOnce(&mut Mirror) -> Changes) -> Result<(), Error> {
        let mut feeds = self.feeds();
        let feed = feeds.get_mut(&slot).ok_or_else(|| Error::Invalid(format!("slot {slot} is not fed")))?;
        let changes = event(&mut feed.mirror);
        let tokens = feed.is_whole.then(|| feed.mirror.tokens());
        let incarnation = feed.incarnation;
        // First what is gone: of a block that moved, the new place counts.
        self.give_up(slot, incarnation, &changes.dropped)?;
        let (mut now, mut horizon) = (0, 0);
        self.with_fed(slot, incarnation, |state| {
            let bytes = changes.new_tokens as f64 * state.targets.bytes_per_token(slot);
            state.index.advance(slot, bytes as u64);
            if let Some(tokens) = tokens {
                self.follow_capacity(state, slot, tokens, changes.evicted);
            }
            (now, horizon) = state.index.clock(slot);
        })?;
        // Who holds it is told, not guessed from its age: what the cache has used again without our knowledge stays as well.
        if now.abs_diff(feed.stamped_at) > horizon / STAMPED_AGAIN {
            feed.stamped_at = now;
            let all: Vec<IdBlock> = feed.mirror.held().cloned().collect();
            return self.hold(slot, incarnation, &all);
        }
        self.hold(slot, incarnation, &changes.held)
    }

    fn hold(&self, slot: u16, incarnation: u64, blocks: &[IdBlock]) -> Result<(), Error> {
        for held in blocks.chunks(BLOCKS_AT_ONCE) {
            self.with_fed(slot, incarnation, |state| {
                for block in held {
                    block.keys.iter().for_each(|&key| state.index.hold(slot, block.index, key));
                }
            })?;
        }
        Ok(())
    }

    /// In pieces, so that decisions wait for no more than one.
    fn give_up(&self, slot: u16, incarnation: u64, blocks: &[IdBlock]) -> Result<(), Error> {
        for dropped in blocks.chunks(BLOCKS_AT_ONCE) {
            self.with_fed(slot, incarnation, |state| {
                let keys = dropped.iter().flat_map(|block| &block.keys);
                keys.for_each(|&key| state.index.give_up(slot, key));
            })?;
        }
        Ok(())
    }

    fn with_fed(&self, slot: u16, incarnation: u64, act: impl FnOnce(&mut State<'_>)) -> Result<(), Error> {
        let mut guard = self.lock()?;
        let mut state = guard.state();
        if state.targets.incarnation(slot) != incarnation || !state.targets.is_taken(slot) {
            return Err(Error::Invalid(format!("the worker that had slot {slot} is gone")));
        }
        act(&mut state);
        Ok(())
    }

    /// What a cache holds when it gives something up is what it can hold beside the requests in flight; and it can hold what it does.
    fn follow_capacity(&self, state: &mut State<'_>, slot: u16, tokens: u64, evicted: bool) {
        let capacity = state.targets.kv_capacity_tokens(slot) as f64;
        let credited = capacity * state.targets.cached_share(slot);
        if capacity > 0.0 && (evicted || tokens as f64 > credited) {
            state.targets.set_cached_share(slot, tokens as f64 / capacity);
            self.fit_capacity(state, slot);
        }
    }
}
