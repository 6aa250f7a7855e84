//! The clocks of targets: what a target is sent moves its clock, and the clock decides what it still holds.
//!
//! A clock counts *quanta*: 1/4096 of the target's capacity, so that ages of different targets compare. A stamp is the clock's
//! value when a block was last sent, in 20 bits; its block is resident iff its age is below the *window*: the horizon (one
//! capacity), or less if the target came, restarted or was flushed since (the clock's *floor*).
//!
//! **Invariant.** A stored stamp is younger than 2^20 quanta, so its age modulo 2^20 is its age. A sweep cycle drops everything
//! older than a window, and no clock may advance more than [`CYCLE_QUANTA`] and one step during a cycle: at most
//! `MAX_HORIZON + 2 * (CYCLE_QUANTA + MAX_STEP)` = 548,864 < 1,048,576.

use super::matches::{GROUP, ones};
use super::table::Holder;

pub(super) const WORDS: usize = 8;

const NOW: usize = 0;
const HORIZON: usize = 1;
const FLOOR: usize = 2;
const UNIT_BYTES: usize = 3;
const REMAINDER_BYTES: usize = 4;
const CYCLE: usize = 5;
const CYCLE_START: usize = 6;
/// Of the quanta since the floor, those that stand for text that was lifted, not sent.
const LIFTED: usize = 7;

pub(super) const STAMP_BITS: u32 = 20;
const STAMP_MASK: u64 = (1 << STAMP_BITS) - 1;

/// The horizon of a clock when its capacity is set anew, in quanta; it may be set between a quarter and twice of that before the
/// quantum is chosen anew.
const HORIZON_QUANTA: u64 = 1 << 12;
const MAX_HORIZON: u64 = 2 * HORIZON_QUANTA;

/// One step forgets everything when it is longer than the longest horizon; no need for longer ones.
const MAX_STEP: u64 = MAX_HORIZON;

/// How far a clock may advance while the sweep walks the table once. The longer, the less work per request: sending 1 % of a
/// target's capacity owes 1/6400 of the table.
pub(super) const CYCLE_QUANTA: u64 = 1 << 18;

/// So many are faster looked at one by one than all of a group at once.
const FEW: u32 = 6;

/// The clocks of all targets.
pub(super) struct Clocks<'m> {
    /// One cache line each.
    pub(super) clocks: &'m mut [u64],
    /// What a lookup reads of each clock, close together: window 32 | the stamp of now 32.
    pub(super) faces: &'m mut [u64],
}

/// The stamps of one prompt: the deeper, the older, as if the prompt's end had been used first. Caches give up a prompt from its
/// end, and when that goes, the whole prompt has been used since.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stamps {
    now: u32,
    quanta_per_byte: f64,
    /// No older than the target's present life.
    oldest: u32,
}

impl Stamps {
    /// Of the block that ends at `end` bytes of text.
    #[inline]
    pub(super) fn at(&self, end: u32) -> u32 {
        let age = (f64::from(end) * self.quanta_per_byte) as u32;
        self.now.wrapping_sub(age.min(self.oldest)) & STAMP_MASK as u32
    }
}

/// Quanta since the stamp, by a clock with this face; None if the block is not resident.
#[inline]
fn age_by(face: u64, stamp: u32) -> Option<u32> {
    let age = (face as u32).wrapping_sub(stamp) & STAMP_MASK as u32;
    (age < (face >> 32) as u32).then_some(age)
}

/// Which of the stamps are of resident blocks, by the clocks with these faces; a bit for each. 4 ns with AVX2, else 10.
#[inline]
fn resident_of(faces: &[u64; GROUP], stamps: &[u64; GROUP / 2]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        #[allow(unsafe_code, reason = "the same code for a processor that has more")]
        // SAFETY: it does.
        return unsafe { resident_of_avx2(faces, stamps) };
    }
    resident_of_any(faces, stamps)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn resident_of_avx2(faces: &[u64; GROUP], stamps: &[u64; GROUP / 2]) -> u32 {
    resident_of_any(faces, stamps)
}

#[inline(always)]
fn resident_of_any(faces: &[u64; GROUP], stamps: &[u64; GROUP / 2]) -> u32 {
    // In plain loops, of which the compiler makes vector code: one loop with `age_by` takes 16 ns.
    let mut unpacked = [0; GROUP];
    for (pair, &two) in stamps.iter().enumerate() {
        unpacked[2 * pair] = two as u32;
        unpacked[2 * pair + 1] = (two >> 32) as u32;
    }
    let mut is_resident = [0; GROUP];
    for (index, &face) in faces.iter().enumerate() {
        let age = (face as u32).wrapping_sub(unpacked[index]) & STAMP_MASK as u32;
        // Both are below 2^31: the difference is negative iff the age is below the window.
        is_resident[index] = (age.wrapping_sub((face >> 32) as u32) >> 31) as u8;
    }
    // Eight bytes of 0 or 1 to eight bits by one multiplication.
    let (eights, _) = is_resident.as_chunks::<8>();
    let bits = eights.iter().map(|&eight| u64::from_le_bytes(eight).wrapping_mul(0x0102_0408_1020_4080) >> 56);
    bits.rev().fold(0, |resident, bits| resident << 8 | bits as u32)
}

impl Clocks<'_> {
    /// Quanta since the holder was stamped; None if it is not resident.
    #[inline]
    pub(super) fn age(&self, holder: Holder) -> Option<u32> {
        age_by(*self.faces.get(usize::from(holder.slot()))?, holder.stamp())
    }

    /// Which `asked` bits of a group of slots have stamps of resident blocks.
    #[inline]
    pub(super) fn resident(&self, group: usize, asked: u32, stamps: &[u64; GROUP / 2]) -> u32 {
        let Some(faces) = self.faces.get(group * GROUP..).and_then(|faces| faces.first_chunk()) else { return 0 };
        if asked.count_ones() > FEW {
            return asked & resident_of(faces, stamps);
        }
        let is_resident = |&index: &usize| {
            let stamp = (stamps[index / 2] >> (32 * (index % 2))) as u32;
            age_by(faces[index], stamp).is_some()
        };
        ones(asked).filter(is_resident).fold(0, |resident, index| resident | 1 << index)
    }

    /// The age of a resident holder as a share of its target's horizon, else 1.
    pub(super) fn age_share(&self, holder: Holder) -> f64 {
        let horizon = self.clock(holder.slot()).map_or(1, |clock| clock[HORIZON].max(1));
        self.age(holder).map_or(1.0, |age| f64::from(age) / horizon as f64)
    }

    /// What part of the target's capacity `bytes` are: how much older a block that ends there is stamped than the prompt's first.
    pub(super) fn share(&self, slot: u16, bytes: u32) -> f64 {
        f64::from(bytes) / self.capacity(slot).max(1) as f64
    }

    pub(super) fn now_and_horizon(&self, slot: u16) -> (u64, u64) {
        self.clock(slot).map_or((0, 0), |clock| (clock[NOW], clock[HORIZON]))
    }

    pub(super) fn capacity(&self, slot: u16) -> u64 {
        self.clock(slot).map_or(0, |clock| clock[HORIZON].saturating_mul(clock[UNIT_BYTES]))
    }

    /// What to stamp the blocks of a prompt with now.
    pub(super) fn stamps(&self, slot: u16) -> Stamps {
        let clock = self.clock(slot).unwrap_or(&[0; WORDS]);
        Stamps {
            now: (clock[NOW] & STAMP_MASK) as u32,
            quanta_per_byte: 1.0 / clock[UNIT_BYTES].max(1) as f64,
            // Answers whose length nobody tells are in the prompts that follow, and not in the clock.
            oldest: clock[NOW].wrapping_sub(clock[FLOOR]).min(MAX_STEP) as u32,
        }
    }

    /// The whole quanta in `bytes` and what was left over before; what is left over now is kept for the next time.
    pub(super) fn quanta(&mut self, slot: u16, bytes: u64) -> u64 {
        let Some(clock) = self.clock_mut(slot) else { return 0 };
        let bytes = clock[REMAINDER_BYTES].saturating_add(bytes);
        let unit = clock[UNIT_BYTES].max(1);
        clock[REMAINDER_BYTES] = bytes % unit;
        bytes / unit
    }

    /// The next `quanta` are of text that was lifted.
    pub(super) fn count_lifted(&mut self, slot: u16, quanta: u64) {
        if let Some(clock) = self.clock_mut(slot) {
            clock[LIFTED] = clock[LIFTED].saturating_add(quanta);
        }
    }

    /// Advance by `quanta`; how far the clock has advanced in this sweep cycle.
    pub(super) fn tick(&mut self, slot: u16, quanta: u64, cycle: u64) -> u64 {
        let Some((clock, face)) = self.clock_and_face(slot) else { return 0 };
        if clock[CYCLE] != cycle {
            clock[CYCLE] = cycle;
            clock[CYCLE_START] = clock[NOW];
        }
        clock[NOW] = clock[NOW].wrapping_add(quanta.min(MAX_STEP));
        *face = face_of(clock);
        clock[NOW].wrapping_sub(clock[CYCLE_START])
    }

    /// The next tick (of at least one quantum) begins a new life: nothing stamped before it is resident after it.
    pub(super) fn forget_at_next_tick(&mut self, slot: u16) {
        if let Some(clock) = self.clock_mut(slot) {
            clock[FLOOR] = clock[NOW].wrapping_add(1);
            clock[REMAINDER_BYTES] = 0;
            clock[LIFTED] = 0;
        }
    }

    /// Nothing stamped more than `bytes` ago is resident from now on, however much room there is.
    pub(super) fn trim(&mut self, slot: u16, bytes: u64) {
        let Some((clock, face)) = self.clock_and_face(slot) else { return };
        let kept = (bytes / clock[UNIT_BYTES].max(1)).max(1);
        let lived = clock[NOW].wrapping_sub(clock[FLOOR]).wrapping_add(1);
        if lived > kept {
            clock[FLOOR] = clock[NOW].wrapping_add(1).wrapping_sub(kept);
            *face = face_of(clock);
        }
    }

    /// From now on the target holds `bytes` of text. Small changes move the horizon; larger ones choose a new quantum, and ages keep
    /// their share of the capacity.
    pub(super) fn set_capacity(&mut self, slot: u16, bytes: u64) {
        let Some((clock, face)) = self.clock_and_face(slot) else { return };
        let horizon = bytes / clock[UNIT_BYTES].max(1);
        if clock[UNIT_BYTES] > 0 && (HORIZON_QUANTA / 4..=MAX_HORIZON).contains(&horizon) {
            clock[HORIZON] = horizon;
        } else {
            clock[UNIT_BYTES] = (bytes / HORIZON_QUANTA).max(1);
            clock[HORIZON] = (bytes / clock[UNIT_BYTES]).min(MAX_HORIZON);
            clock[REMAINDER_BYTES] = 0;
        }
        *face = face_of(clock);
    }

    pub(super) fn characters(&self, slot: u16) -> u64 {
        let Some(clock) = self.clock(slot) else { return 0 };
        let lived = clock[NOW].wrapping_sub(clock[FLOOR]);
        let lived = lived.saturating_sub(clock[LIFTED]).min(clock[HORIZON]);
        let rest = if lived < clock[HORIZON] { clock[REMAINDER_BYTES] } else { 0 };
        lived.saturating_mul(clock[UNIT_BYTES]).saturating_add(rest)
    }

    pub(super) fn is_full(&self, slot: u16) -> bool {
        self.clock(slot).is_some_and(|clock| clock[NOW].wrapping_sub(clock[FLOOR]) >= clock[HORIZON])
    }

    pub(super) fn check_integrity(&self) -> Result<(), String> {
        for (slot, (clock, &face)) in self.clocks.chunks_exact(WORDS).zip(self.faces.iter()).enumerate() {
            // Whoever dies between a clock and its face leaves a face of before: no more than a hint, until the next tick.
            let window = face >> 32;
            if clock[HORIZON] > MAX_HORIZON || window > MAX_HORIZON {
                return Err(format!("target {slot}: window {window} of horizon {}", clock[HORIZON]));
            }
            if clock[UNIT_BYTES] > 0 && clock[REMAINDER_BYTES] >= clock[UNIT_BYTES] {
                return Err(format!("target {slot}: more than a quantum is left over"));
            }
        }
        Ok(())
    }

    fn clock(&self, slot: u16) -> Option<&[u64]> {
        let start = usize::from(slot) * WORDS;
        self.clocks.get(start..start + WORDS)
    }

    fn clock_mut(&mut self, slot: u16) -> Option<&mut [u64]> {
        let start = usize::from(slot) * WORDS;
        self.clocks.get_mut(start..start + WORDS)
    }

    fn clock_and_face(&mut self, slot: u16) -> Option<(&mut [u64], &mut u64)> {
        let start = usize::from(slot) * WORDS;
        let face = self.faces.get_mut(usize::from(slot))?;
        Some((self.clocks.get_mut(start..start + WORDS)?, face))
    }
}

fn face_of(clock: &[u64]) -> u64 {
    // In its first moment (now == floor) a target is credited with what is stamped in that moment.
    let lived = clock[NOW].wrapping_sub(clock[FLOOR]).wrapping_add(1);
    lived.min(clock[HORIZON]) << 32 | clock[NOW] & STAMP_MASK
}
