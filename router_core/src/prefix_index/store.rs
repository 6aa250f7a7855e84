//! Blocks and who holds them: entries and their rows together, and what gives way when there is no room.
//!
//! Residency is not known here: whoever calls says how old a holder is (`age`: None when it is not resident).

use super::clock::Clocks;
use super::dense::Dense;
use super::matches::{Match, Matches};
use super::rows::{HOLDERS, Rows};
use super::table::{Entry, Holder, Table};

/// A dense row with so many holders left goes back to a row: some less than its places, so that the next holder finds one.
const FEW: usize = HOLDERS - 2;

pub(super) struct Store<'m> {
    pub(super) table: Table<'m>,
    pub(super) rows: Rows<'m>,
    pub(super) dense: Dense<'m>,
}

impl Store<'_> {
    #[inline]
    pub(super) fn each_holder(&self, position: u32, mut see: impl FnMut(Holder)) {
        match self.table.entry(position) {
            Entry::Empty => {}
            Entry::One(holder) => see(holder),
            Entry::Two(holders) => holders.into_iter().for_each(see),
            Entry::Row(row) if self.rows.belongs(row, position) => self.rows.holders(row).for_each(see),
            Entry::Dense(row) if self.dense.belongs(row, position) => self.dense.holders(row).for_each(see),
            Entry::Row(_) | Entry::Dense(_) => {}
        }
    }

    /// The resident holders hold `found`, but for those that are settled.
    #[inline]
    pub(super) fn settle(&self, position: u32, found: Match, clocks: &Clocks<'_>, matches: &mut Matches) {
        match self.table.entry(position) {
            Entry::Dense(row) if self.dense.belongs(row, position) => self.dense.settle(row, found, clocks, matches),
            _ => self.each_holder(position, |holder| {
                matches.settle_one(holder, found, |holder| clocks.age(holder).is_some());
            }),
        }
    }

    /// What the target in `slot` was stamped with.
    pub(super) fn holder(&self, position: u32, slot: u16) -> Option<Holder> {
        match self.table.entry(position) {
            Entry::Dense(row) if self.dense.belongs(row, position) => self.dense.get(row, slot),
            _ => {
                let mut found = None;
                self.each_holder(position, |holder| {
                    if holder.slot() == slot {
                        found = Some(holder);
                    }
                });
                found
            }
        }
    }

    /// `holder` does not hold the block, if it is still stamped as given.
    pub(super) fn remove(&mut self, position: u32, holder: Holder) {
        match self.table.entry(position) {
            Entry::Dense(row) if self.dense.belongs(row, position) => self.dense.remove(row, holder),
            _ => drop(self.retain(position, |other| other != holder)),
        }
    }

    /// `holder` was sent the block of `key`.
    pub(super) fn stamp(&mut self, key: u64, class: u8, holder: Holder, age: impl Fn(Holder) -> Option<u32>) {
        match self.table.find(key) {
            Some(position) => self.add(position, holder, age),
            None => {
                if let Some(position) = self.room(key, class, age) {
                    self.table.replace(position, key, class, holder);
                }
            }
        }
    }

    /// Keep the holders for which `keep` says so. Whether the entry is empty now.
    pub(super) fn retain(&mut self, position: u32, keep: impl Fn(Holder) -> bool) -> bool {
        match self.table.entry(position) {
            Entry::Empty => {}
            Entry::One(holder) => {
                if !keep(holder) {
                    self.table.set(position, Entry::Empty);
                }
            }
            Entry::Two([first, second]) => match (keep(first), keep(second)) {
                (true, true) => {}
                (true, false) => self.table.set(position, Entry::One(first)),
                (false, true) => self.table.set(position, Entry::One(second)),
                (false, false) => self.table.set(position, Entry::Empty),
            },
            Entry::Row(row) if self.rows.belongs(row, position) => self.retain_row(row, position, keep),
            Entry::Dense(row) if self.dense.belongs(row, position) => self.retain_dense(row, position, keep),
            Entry::Row(_) | Entry::Dense(_) => self.table.set(position, Entry::Empty),
        }
        self.table.entry(position) == Entry::Empty
    }

    fn retain_row(&mut self, row: u32, position: u32, keep: impl Fn(Holder) -> bool) {
        if self.rows.retain(row, position, keep) > 2 {
            return;
        }
        // Few enough to stand in the entry again.
        let entry = entry_of(self.rows.holders(row));
        self.table.set(position, entry);
    }

    fn retain_dense(&mut self, dense_row: u32, position: u32, keep: impl Fn(Holder) -> bool) {
        let left = self.dense.retain(dense_row, keep);
        if left <= 2 {
            let entry = entry_of(self.dense.holders(dense_row));
            self.table.set(position, entry);
        } else if left <= FEW {
            let table = &self.table;
            let Some(row) = self.rows.claim(position, |owner, row| table.entry(owner) == Entry::Row(row)) else {
                return;
            };
            for holder in self.dense.holders(dense_row) {
                self.rows.push(row, position, holder);
            }
            self.table.set(position, Entry::Row(row));
        }
    }

    fn add(&mut self, position: u32, holder: Holder, age: impl Fn(Holder) -> Option<u32>) {
        let slot = holder.slot();
        match self.table.entry(position) {
            Entry::One(other) if other.slot() != slot => self.table.set(position, Entry::Two([other, holder])),
            Entry::Empty | Entry::One(_) => self.table.set(position, Entry::One(holder)),
            Entry::Two([first, second]) => {
                let entry = if first.slot() == slot {
                    Entry::Two([holder, second])
                } else if second.slot() == slot {
                    Entry::Two([first, holder])
                } else if age(first).is_some() && age(second).is_some() {
                    return self.add_third(position, [first, second], holder, age);
                } else if age(first).is_none() {
                    Entry::Two([holder, second])
                } else {
                    Entry::Two([first, holder])
                };
                self.table.set(position, entry);
            }
            Entry::Row(row) if self.rows.belongs(row, position) => self.add_to_row(row, position, holder, age),
            Entry::Dense(row) if self.dense.belongs(row, position) => drop(self.put_dense(row, holder)),
            Entry::Row(_) | Entry::Dense(_) => self.table.set(position, Entry::One(holder)),
        }
    }

    fn add_third(
        &mut self,
        position: u32,
        [first, second]: [Holder; 2],
        holder: Holder,
        age: impl Fn(Holder) -> Option<u32>,
    ) {
        let table = &self.table;
        match self.rows.claim(position, |owner, row| table.entry(owner) == Entry::Row(row)) {
            Some(row) => {
                for each in [first, second, holder] {
                    self.rows.push(row, position, each);
                }
                self.table.set(position, Entry::Row(row));
            }
            // No room for three: the newest stay.
            None if age(first) > age(second) => self.table.set(position, Entry::Two([holder, second])),
            None => self.table.set(position, Entry::Two([first, holder])),
        }
    }

    fn add_to_row(&mut self, row: u32, position: u32, holder: Holder, age: impl Fn(Holder) -> Option<u32>) {
        let place = self.rows.holders(row).position(|other| other.slot() == holder.slot());
        if let Some(place) = place {
            self.rows.set(row, place, holder);
        } else if self.rows.count(row) < HOLDERS {
            self.rows.push(row, position, holder);
        } else {
            let ages = self.rows.holders(row).map(|other| staleness(age(other)));
            let (place, oldest) = ages.enumerate().max_by_key(|&(_, age)| age).unwrap_or_default();
            if oldest == staleness(None) || !self.become_dense(row, position, holder) {
                self.rows.set(row, place, holder);
            }
        }
    }

    /// Move the holders of a row and one more to a dense row. False, and nothing is changed, if there is no room for all of them.
    fn become_dense(&mut self, row: u32, position: u32, holder: Holder) -> bool {
        let table = &self.table;
        let claimed = self.dense.claim(position, |owner, row| table.entry(owner) == Entry::Dense(row));
        let Some(dense_row) = claimed else { return false };
        // From here on, so that no two of its holders are given the same chunk.
        self.table.set(position, Entry::Dense(dense_row));
        for index in 0..=self.rows.count(row) {
            let each = self.rows.holders(row).nth(index).unwrap_or(holder);
            if !self.put_dense(dense_row, each) {
                self.table.set(position, Entry::Row(row));
                return false;
            }
        }
        true
    }

    fn put_dense(&mut self, row: u32, holder: Holder) -> bool {
        let table = &self.table;
        self.dense.put(row, holder, |owner, row| table.entry(owner) == Entry::Dense(row))
    }

    /// Where a new block goes: a free place in the emptier of its buckets, or that of the victim, which is an entry without a
    /// resident holder, else the oldest, else the deepest; none if all are as young as the new block and not deeper.
    fn room(&self, key: u64, class: u8, age: impl Fn(Holder) -> Option<u32>) -> Option<u32> {
        let [first, second] = self.table.candidates(key);
        // The emptier one: at 90 % load half as many blocks are lost as by filling the first bucket first.
        let (free, place) =
            [first, second].map(|bucket| self.table.free_places(bucket)).into_iter().max().unwrap_or_default();
        if free > 0 { Some(place) } else { self.victim([first, second], class, age) }
    }

    fn victim(&self, buckets: [usize; 2], class: u8, age: impl Fn(Holder) -> Option<u32>) -> Option<u32> {
        let mut victim = None;
        let mut worst = (staleness(Some(0)), class);
        for position in buckets.into_iter().flat_map(Table::positions_of_bucket) {
            let rank = (self.staleness(position, &age), self.table.depth_class(position));
            if rank > worst {
                (victim, worst) = (Some(position), rank);
            }
        }
        victim
    }

    /// That of its freshest holder. What so many hold that it has a dense row is as good as fresh.
    fn staleness(&self, position: u32, age: impl Fn(Holder) -> Option<u32>) -> u32 {
        if let Entry::Dense(row) = self.table.entry(position) {
            let is_resident = self.dense.holders(row).any(|holder| age(holder).is_some());
            return staleness(is_resident.then_some(0));
        }
        let mut freshest = staleness(None);
        self.each_holder(position, |holder| freshest = freshest.min(staleness(age(holder))));
        freshest
    }

    pub(super) fn check_integrity(&self) -> Result<(), String> {
        for bucket in 0..self.table.buckets() {
            for position in Table::positions_of_bucket(bucket) {
                self.check_entry(position).map_err(|problem| format!("entry {position}: {problem}"))?;
            }
        }
        Ok(())
    }

    fn check_entry(&self, position: u32) -> Result<(), String> {
        let entry = self.table.entry(position);
        if entry == Entry::Empty {
            return Ok(());
        }
        if !self.table.is_alone(position) {
            return Err("another entry of its bucket has its tag".to_owned());
        }
        if let Entry::Row(row) = entry {
            if !self.rows.belongs(row, position) {
                return Err(format!("row {row} does not point back"));
            }
            if self.rows.count(row) <= 2 {
                return Err(format!("row {row} has {} holders", self.rows.count(row)));
            }
        }
        if let Entry::Dense(row) = entry {
            if !self.dense.belongs(row, position) {
                return Err(format!("dense row {row} does not point back"));
            }
            self.dense.check_row(row)?;
        }
        let mut slots = Vec::new();
        self.each_holder(position, |holder| slots.push(holder.slot()));
        slots.sort_unstable();
        match slots.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("target {} holds it twice", pair[0])),
            None => Ok(()),
        }
    }
}

fn entry_of(mut holders: impl Iterator<Item = Holder>) -> Entry {
    match (holders.next(), holders.next()) {
        (Some(first), Some(second)) => Entry::Two([first, second]),
        (Some(only), None) => Entry::One(only),
        _ => Entry::Empty,
    }
}

/// Orders holders from fresh to stale; not resident is stalest.
fn staleness(age: Option<u32>) -> u32 {
    age.unwrap_or(u32::MAX)
}
