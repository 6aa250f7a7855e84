//! A group of ranks and what they do together.
//!
//! Every operation has a number, the same on all ranks. A rank has `depth` slots; in operation `n` it writes into slot `n % depth`, then
//! raises its sequence number to `n + 1`: it has arrived, its data can be read. Nobody writes into a slot that somebody may still read:
//! before operation `n` a rank waits until all others have arrived at `n - depth + 1`, by when they are done with `n - depth`.
//! What does not fit a slot is done in several operations.
#![allow(unsafe_code, reason = "memory that other processes map too")]

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sum::sum;
use crate::tag::{described, tag};
use crate::wait::Signal;
use crate::{CommError, Counter, Dtype, Op, Region};

/// How long a rank sleeps before it looks whether everybody stops, and shows that it lives.
const NAP: Duration = Duration::from_millis(200);

const MAX_DEPTH: usize = 16;
const TAGS_AT: usize = 64;
const CONTROL_BYTES: usize = TAGS_AT + MAX_DEPTH * 8;

/// Who is in a group, and how much room each has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupPlan {
    /// As error messages call it.
    pub name: String,
    /// Ranks, in the order in which sums are taken and parts are put together.
    pub members: Vec<usize>,
    /// Slots of each: how far ahead of the slowest one the fastest may be, plus one. 2, 4, 8 or 16.
    pub depth: usize,
    /// Of one slot; a multiple of 64.
    pub slot_bytes: usize,
}

impl GroupPlan {
    pub(crate) fn bytes(&self) -> usize {
        (self.members.len() * self.member_bytes()).next_multiple_of(4096)
    }

    fn member_bytes(&self) -> usize {
        // The control words of two members must not share a line of cache, nor a pair of lines.
        CONTROL_BYTES.next_multiple_of(128) + self.depth * self.slot_bytes
    }
}

/// One rank's end of a group. The ranks must call the same operations in the same order; who does not is told so.
pub struct Group {
    region: Region,
    plan: GroupPlan,
    start: usize,
    /// Place among the members.
    me: usize,
    rank: usize,
    /// Number of the next operation.
    next: u32,
    spin: Duration,
    deadline: Option<Duration>,
    two_stage_from: usize,
}

impl Group {
    pub(crate) fn new(
        region: Region,
        plan: GroupPlan,
        start: usize,
        rank: usize,
        spin: Duration,
        deadline: Option<Duration>,
    ) -> Self {
        let me = plan.members.iter().position(|&member| member == rank);
        let me = me.unwrap_or_else(|| panic!("rank {rank} is not in group {}", plan.name));
        // Operations are counted modulo 2^32, which every power of two divides.
        let depths = 2..=MAX_DEPTH;
        assert!(depths.contains(&plan.depth) && plan.depth.is_power_of_two(), "depth {}", plan.depth);
        assert!(plan.slot_bytes.is_multiple_of(64) && plan.slot_bytes > 0, "slot of {} bytes", plan.slot_bytes);
        Self { region, plan, start, me, rank, next: 0, spin, deadline, two_stage_from: usize::MAX }
    }

    /// How many ranks are in it.
    #[must_use]
    pub fn size(&self) -> usize {
        self.plan.members.len()
    }

    /// Vectors of so many bytes and more are summed in two stages: each rank sums a part and hands it out. The bits are the same.
    pub fn set_two_stage_from(&mut self, bytes: usize) {
        self.two_stage_from = bytes;
    }

    /// `data` becomes the sum of everybody's, taken in the order of the members.
    ///
    /// # Errors
    /// See [`CommError`]; `data` is then undefined.
    pub fn all_reduce(&mut self, data: &mut [u8], dtype: Dtype) -> Result<(), CommError> {
        self.all_reduce_meanwhile(data, dtype, &mut || false)
    }

    /// The same; while the others have not come, `meanwhile` is called as long as it says that it has more to do. It should take no longer
    /// than a microsecond at a time.
    ///
    /// # Errors
    /// As above.
    pub fn all_reduce_meanwhile(
        &mut self,
        data: &mut [u8],
        dtype: Dtype,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Result<(), CommError> {
        if dtype == Dtype::Bytes || !data.len().is_multiple_of(dtype.size()) {
            return Err(CommError::Invalid(format!("no sum over {} bytes of {}", data.len(), dtype.name())));
        }
        let (total, begin) = (data.len(), Instant::now());
        let two_stages = total >= self.two_stage_from && self.size() > 2;
        for chunk in data.chunks_mut(self.plan.slot_bytes) {
            if two_stages {
                self.all_reduce_in_two_stages(chunk, dtype, total)?;
            } else {
                self.all_reduce_at_once(chunk, dtype, total, meanwhile)?;
            }
        }
        self.count(Op::AllReduce, total, begin);
        Ok(())
    }

    /// Of the sum of everybody's `data`, taken in the order of the members, the bytes in `wanted` stand in `data` afterwards; the others are as
    /// they were. Members may want different bytes, or the same ones.
    ///
    /// # Errors
    /// See [`CommError`]; `data` is then undefined.
    pub fn reduce_scatter(&mut self, data: &mut [u8], wanted: Range<usize>, dtype: Dtype) -> Result<(), CommError> {
        let size = dtype.size();
        if dtype == Dtype::Bytes || [data.len(), wanted.start, wanted.end].iter().any(|at| !at.is_multiple_of(size)) {
            return Err(CommError::Invalid(format!("no sum over {} bytes of {}", data.len(), dtype.name())));
        }
        if wanted.start > wanted.end || wanted.end > data.len() {
            return Err(CommError::Invalid(format!("bytes {wanted:?} of {}", data.len())));
        }
        let (total, room, begin) = (data.len(), self.plan.slot_bytes, Instant::now());
        for from in (0..total).step_by(room) {
            let op = self.begin(tag(Op::ReduceScatter, dtype, None, total))?;
            let to = (from + room).min(total);
            self.write(op, &data[from..to]);
            self.arrive(op);
            let own = wanted.start.clamp(from, to)..wanted.end.clamp(from, to);
            if own.is_empty() {
                continue;
            }
            for member in 0..self.size() {
                self.wait_for(member, op)?;
            }
            self.sum_slots(op, &mut data[own.clone()], own.start - from, dtype);
        }
        self.count(Op::ReduceScatter, total, begin);
        Ok(())
    }

    /// The parts of all, one after the other, in `out` at `root`, or at everybody without one. `sizes`: bytes of each part.
    ///
    /// # Errors
    /// See [`CommError`].
    pub fn gather(
        &mut self,
        part: &[u8],
        sizes: &[usize],
        root: Option<usize>,
        out: Option<&mut [u8]>,
    ) -> Result<(), CommError> {
        let here = root.is_none_or(|root| root == self.me);
        if here != out.is_some() {
            return Err(CommError::Invalid("gather: there is a place for the parts where they are wanted".to_owned()));
        }
        let wanted: Vec<_> = sizes.iter().map(|&size| if here { 0..size } else { 0..0 }).collect();
        self.exchange(Op::Gather, part, sizes, &wanted, out.unwrap_or_default())
    }

    /// Everybody shows a part; `out` becomes the bytes in `wanted` of each member's, one after the other.
    ///
    /// `sizes`: bytes of each part, the same on all. `op`: what it is counted as.
    ///
    /// # Errors
    /// See [`CommError`].
    pub fn exchange(
        &mut self,
        kind: Op,
        part: &[u8],
        sizes: &[usize],
        wanted: &[Range<usize>],
        out: &mut [u8],
    ) -> Result<(), CommError> {
        if sizes.len() != self.size() || wanted.len() != self.size() || part.len() != sizes[self.me] {
            return Err(CommError::Invalid(format!(
                "{}: {} bytes are not part {} of {sizes:?}",
                kind.name(),
                part.len(),
                self.me
            )));
        }
        let bad = |(range, &size): (&Range<usize>, &usize)| range.start > range.end || range.end > size;
        if wanted.iter().zip(sizes).any(bad) || out.len() != wanted.iter().map(ExactSizeIterator::len).sum::<usize>() {
            return Err(CommError::Invalid(format!(
                "{}: {wanted:?} of {sizes:?} do not make {} bytes",
                kind.name(),
                out.len()
            )));
        }
        let (total, begin) = (sizes.iter().sum(), Instant::now());
        let room = self.plan.slot_bytes;
        let longest = sizes.iter().copied().max().unwrap_or(0);
        for from in (0..longest).step_by(room) {
            let op = self.begin(tag(kind, Dtype::Bytes, None, total))?;
            let own = &part[from.min(part.len())..(from + room).min(part.len())];
            self.write(op, own);
            self.arrive(op);
            let mut offset = 0;
            for (member, range) in wanted.iter().enumerate() {
                let (low, high) = (range.start.max(from), range.end.min(from + room));
                if low < high {
                    let target = &mut out[offset + low - range.start..offset + high - range.start];
                    if member == self.me {
                        target.copy_from_slice(&part[low..high]);
                    } else {
                        self.wait_for(member, op)?;
                        target.copy_from_slice(&self.slot(member, op, high - from)[low - from..]);
                    }
                }
                offset += range.len();
            }
        }
        self.count(kind, part.len(), begin);
        Ok(())
    }

    /// `data` becomes what it is at `root`.
    ///
    /// # Errors
    /// See [`CommError`].
    pub fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<(), CommError> {
        let begin = Instant::now();
        self.hand_out(data, root)?;
        self.count(Op::Broadcast, if root == self.me { data.len() } else { 0 }, begin);
        Ok(())
    }

    /// At `root`: hands `message` to everybody. Elsewhere (None): waits for it, without a deadline, since there may be none for hours.
    ///
    /// # Errors
    /// See [`CommError`].
    pub fn message(&mut self, message: Option<&[u8]>, root: usize) -> Result<Vec<u8>, CommError> {
        if message.is_some() != (root == self.me) {
            return Err(CommError::Invalid("a message comes from the root and from nobody else".to_owned()));
        }
        let mut head = message.map_or(0, <[u8]>::len).to_le_bytes();
        let deadline = self.deadline.take();
        let result = self.hand_out(&mut head, root);
        self.deadline = deadline;
        result?;
        // Counted from here on: waiting for work is no communication.
        let mut body = message.map_or_else(|| vec![0; usize::from_le_bytes(head)], <[u8]>::to_vec);
        self.broadcast(&mut body, root)?;
        Ok(body)
    }

    /// Returns when everybody has called it.
    ///
    /// # Errors
    /// See [`CommError`].
    pub fn barrier(&mut self) -> Result<(), CommError> {
        let begin = Instant::now();
        let op = self.begin(tag(Op::Barrier, Dtype::Bytes, None, 0))?;
        self.arrive(op);
        for member in 0..self.size() {
            self.wait_for(member, op)?;
        }
        self.count(Op::Barrier, 0, begin);
        Ok(())
    }

    fn hand_out(&mut self, data: &mut [u8], root: usize) -> Result<(), CommError> {
        let total = data.len();
        for chunk in data.chunks_mut(self.plan.slot_bytes) {
            let op = self.begin(tag(Op::Broadcast, Dtype::Bytes, Some(root), total))?;
            if root == self.me {
                self.write(op, chunk);
                self.arrive(op);
            } else {
                self.arrive(op);
                self.wait_for(root, op)?;
                chunk.copy_from_slice(self.slot(root, op, chunk.len()));
            }
        }
        Ok(())
    }

    fn all_reduce_at_once(
        &mut self,
        data: &mut [u8],
        dtype: Dtype,
        total: usize,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Result<(), CommError> {
        let op = self.begin(tag(Op::AllReduce, dtype, None, total))?;
        self.write(op, data);
        self.arrive(op);
        for member in 0..self.size() {
            self.wait_for_meanwhile(member, op, meanwhile)?;
        }
        self.sum_slots(op, data, 0, dtype);
        Ok(())
    }

    fn all_reduce_in_two_stages(&mut self, data: &mut [u8], dtype: Dtype, total: usize) -> Result<(), CommError> {
        let tag = tag(Op::AllReduce, dtype, None, total);
        let op = self.begin(tag)?;
        self.write(op, data);
        self.arrive(op);
        for member in 0..self.size() {
            self.wait_for(member, op)?;
        }
        let (count, size, length) = (data.len() / dtype.size(), self.size(), data.len());
        let bounds = |member: usize| {
            let at = |member: usize| if member == size { length } else { count * member / size * dtype.size() };
            at(member)..at(member + 1)
        };
        let own = bounds(self.me);
        self.sum_slots(op, &mut data[own.clone()], own.start, dtype);
        let op = self.begin(tag)?;
        self.write(op, &data[own]);
        self.arrive(op);
        for member in (0..size).filter(|&member| member != self.me) {
            self.wait_for(member, op)?;
            let part = bounds(member);
            let bytes = part.len();
            data[part].copy_from_slice(self.slot(member, op, bytes));
        }
        Ok(())
    }

    /// Everybody's numbers from byte `from` on, summed into `out`.
    fn sum_slots(&self, op: u32, out: &mut [u8], from: usize, dtype: Dtype) {
        let length = out.len();
        let slots: Vec<&[u8]> = (0..self.size()).map(|member| &self.slot(member, op, from + length)[from..]).collect();
        sum(dtype, out, &slots);
    }

    /// The next operation's number, once its slot may be written.
    fn begin(&mut self, tag: u64) -> Result<u32, CommError> {
        if let Some(text) = self.region.aborted() {
            return Err(CommError::Aborted(text));
        }
        let op = self.next;
        self.next = op.wrapping_add(1);
        let free_from = op.wrapping_sub(self.plan.depth as u32 - 1);
        for member in 0..self.size() {
            self.wait_until_at(member, free_from, op, &mut || false)?;
        }
        self.tag(self.me, op).store(tag, Ordering::Relaxed);
        Ok(op)
    }

    fn arrive(&self, op: u32) {
        self.signal(self.me).set(op.wrapping_add(1));
    }

    /// Until `member` has arrived at `op`, the same operation as ours.
    fn wait_for(&self, member: usize, op: u32) -> Result<(), CommError> {
        self.wait_for_meanwhile(member, op, &mut || false)
    }

    fn wait_for_meanwhile(&self, member: usize, op: u32, meanwhile: &mut dyn FnMut() -> bool) -> Result<(), CommError> {
        self.wait_until_at(member, op, op, meanwhile)?;
        let (theirs, ours) =
            (self.tag(member, op).load(Ordering::Relaxed), self.tag(self.me, op).load(Ordering::Relaxed));
        if theirs == ours {
            return Ok(());
        }
        let text = format!(
            "operation {op} of group {} is {} at rank {} and {} at rank {}",
            self.plan.name,
            described(ours),
            self.rank,
            described(theirs),
            self.plan.members[member],
        );
        self.region.abort(&text);
        Err(CommError::Mismatch(text))
    }

    fn wait_until_at(
        &self,
        member: usize,
        wanted: u32,
        op: u32,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Result<(), CommError> {
        if member == self.me {
            return Ok(());
        }
        let begin = Instant::now();
        let arrived = |sequence: u32| sequence.wrapping_sub(wanted.wrapping_add(1)).cast_signed() >= 0;
        self.signal(member).wait_until(arrived, meanwhile, self.spin, NAP, || {
            self.status().add(Counter::Heartbeat, 1);
            if let Some(text) = self.region.aborted() {
                return Err(CommError::Aborted(text));
            }
            match self.deadline {
                Some(deadline) if begin.elapsed() >= deadline => Err(self.timed_out(op, deadline)),
                _ => Ok(()),
            }
        })
    }

    fn timed_out(&self, op: u32, deadline: Duration) -> CommError {
        let missing = (0..self.size())
            .filter(|&member| self.signal(member).value().wrapping_sub(op.wrapping_add(1)).cast_signed() < 0)
            .map(|member| self.plan.members[member].to_string())
            .collect::<Vec<_>>();
        let text = format!(
            "rank {} did not come to {} (operation {op} of group {}) within {} s",
            missing.join(" and rank "),
            described(self.tag(self.me, op).load(Ordering::Relaxed)),
            self.plan.name,
            deadline.as_secs_f64(),
        );
        self.region.abort(&text);
        CommError::TimedOut(text)
    }

    fn count(&self, op: Op, bytes: usize, begin: Instant) {
        let status = self.status();
        status.count_op(op, bytes as u64);
        status.add(Counter::CommNs, nanoseconds(begin));
    }

    fn status(&self) -> crate::RankStatus<'_> {
        self.region.status(self.rank)
    }

    fn write(&self, op: u32, data: &[u8]) {
        debug_assert!(data.len() <= self.plan.slot_bytes);
        self.status().add(Counter::SlotBytes, data.len() as u64);
        // SAFETY: the slot lies in the mapping and is ours; `begin` has seen that nobody reads it any more.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.region.at(self.slot_at(self.me, op)), data.len()) }
    }

    /// What `member` wrote in `op`; only after `wait_for`, and until we arrive at the next operation but `depth - 1`.
    fn slot(&self, member: usize, op: u32, length: usize) -> &[u8] {
        debug_assert!(length <= self.plan.slot_bytes);
        // SAFETY: inside the mapping, and not written while we have not arrived at the next operation.
        unsafe { std::slice::from_raw_parts(self.region.at(self.slot_at(member, op)), length) }
    }

    fn slot_at(&self, member: usize, op: u32) -> usize {
        let slot = op as usize % self.plan.depth;
        self.control_at(member) + CONTROL_BYTES.next_multiple_of(128) + slot * self.plan.slot_bytes
    }

    fn control_at(&self, member: usize) -> usize {
        self.start + member * self.plan.member_bytes()
    }

    fn signal(&self, member: usize) -> &Signal {
        // SAFETY: inside the mapping, aligned to 64 bytes, used as atomics only.
        unsafe { &*self.region.at(self.control_at(member)).cast::<Signal>() }
    }

    fn tag(&self, member: usize, op: u32) -> &AtomicU64 {
        let at = self.control_at(member) + TAGS_AT + op as usize % self.plan.depth * 8;
        // SAFETY: as above.
        unsafe { &*self.region.at(at).cast::<AtomicU64>() }
    }
}

fn nanoseconds(begin: Instant) -> u64 {
    u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
