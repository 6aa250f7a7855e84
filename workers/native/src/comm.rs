//! Collectives.
#![allow(unsafe_code, reason = "memory of tensors, by address")]

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use rank_comm::{CommError, Counter, Dtype, Group, GroupPlan, Op, Region};

use crate::memory::numbers_mut;

pyo3::create_exception!(_native, CollectiveError, pyo3::exceptions::PyRuntimeError, "A collective did not take place.");

pub(crate) fn raised(error: CommError) -> PyErr {
    match error {
        CommError::Invalid(text) => PyValueError::new_err(text),
        other => CollectiveError::new_err(other.to_string()),
    }
}

/// (name, members, depth, slot bytes)
type Plan = (String, Vec<usize>, usize, usize);

fn plans(groups: Vec<Plan>) -> Vec<GroupPlan> {
    groups
        .into_iter()
        .map(|(name, members, depth, slot_bytes)| GroupPlan { name, members, depth, slot_bytes })
        .collect()
}

#[pyclass(frozen, name = "Region", module = "warmroute_worker._native")]
pub(crate) struct PyRegion(Region);

#[pymethods]
impl PyRegion {
    #[new]
    fn new(fd: RawFd, ranks: usize, groups: Vec<Plan>) -> PyResult<Self> {
        // SAFETY: borrowed for this call only; a number that is no descriptor makes `try_clone_to_owned` fail.
        let file = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().map(File::from);
        Ok(Self(Region::open(&file?, ranks, &plans(groups))?))
    }

    #[staticmethod]
    fn memory_file(ranks: usize, groups: Vec<Plan>) -> io::Result<RawFd> {
        Region::memory_file(ranks, &plans(groups)).map(IntoRawFd::into_raw_fd)
    }

    fn abort(&self, text: &str) {
        self.0.abort(text);
    }

    fn aborted(&self) -> Option<String> {
        self.0.aborted()
    }

    fn status<'py>(&self, py: Python<'py>, rank: usize) -> PyResult<Bound<'py, PyDict>> {
        let status = self.0.status(self.checked(rank)?);
        let numbers = PyDict::new(py);
        for counter in Counter::ALL {
            numbers.set_item(counter.name(), status.get(counter))?;
        }
        for op in Op::ALL {
            let (calls, bytes) = status.op(op);
            numbers.set_item(format!("{}_calls", op.name()), calls)?;
            numbers.set_item(format!("{}_bytes", op.name()), bytes)?;
        }
        Ok(numbers)
    }

    fn status_words(&self, rank: usize) -> PyResult<Vec<u64>> {
        Ok(self.0.status(self.checked(rank)?).words())
    }

    fn set_status_words(&self, rank: usize, words: Vec<u64>) -> PyResult<()> {
        self.0.status(self.checked(rank)?).set_words(&words);
        Ok(())
    }

    fn get(&self, rank: usize, counter: &str) -> PyResult<u64> {
        Ok(self.0.status(self.checked(rank)?).get(named(counter)?))
    }

    fn set(&self, rank: usize, counter: &str, value: u64) -> PyResult<()> {
        self.0.status(self.checked(rank)?).set(named(counter)?, value);
        Ok(())
    }

    fn add(&self, rank: usize, counter: &str, value: u64) -> PyResult<()> {
        self.0.status(self.checked(rank)?).add(named(counter)?, value);
        Ok(())
    }

    #[pyo3(signature = (index, rank, spin_us, deadline, two_stage_from))]
    fn group(
        &self,
        index: usize,
        rank: usize,
        spin_us: u64,
        deadline: f64,
        two_stage_from: Option<usize>,
    ) -> PyResult<PyGroup> {
        let deadline =
            Duration::try_from_secs_f64(deadline).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let mut group = self.0.group(index, rank, Duration::from_micros(spin_us), Some(deadline));
        group.set_two_stage_from(two_stage_from.unwrap_or(usize::MAX));
        Ok(PyGroup(group))
    }
}

impl PyRegion {
    fn checked(&self, rank: usize) -> PyResult<usize> {
        let ranks = self.0.ranks();
        if rank < ranks { Ok(rank) } else { Err(PyValueError::new_err(format!("there is no rank {rank} of {ranks}"))) }
    }
}

fn named(counter: &str) -> PyResult<Counter> {
    let found = Counter::ALL.into_iter().find(|known| known.name() == counter);
    found.ok_or_else(|| PyValueError::new_err(format!("there is no counter {counter:?}")))
}

#[pyclass(name = "Group", module = "warmroute_worker._native")]
pub(crate) struct PyGroup(pub(crate) Group);

#[pymethods]
impl PyGroup {
    fn all_reduce(&mut self, py: Python<'_>, address: usize, num_bytes: usize, dtype: &str) -> PyResult<()> {
        let dtype = Dtype::of_name(dtype).map_err(raised)?;
        let group = &mut self.0;
        // SAFETY: the caller's tensor is contiguous, has so many bytes and is used by nobody else during the call.
        py.detach(|| group.all_reduce(unsafe { numbers_mut(address, num_bytes) }, dtype)).map_err(raised)
    }

    #[pyo3(signature = (address, sizes, place, root, out))]
    fn gather(
        &mut self,
        py: Python<'_>,
        address: usize,
        sizes: Vec<usize>,
        place: usize,
        root: Option<usize>,
        out: Option<usize>,
    ) -> PyResult<()> {
        let own = *sizes.get(place).ok_or_else(|| PyValueError::new_err("no size for this place"))?;
        let total = sizes.iter().sum();
        let group = &mut self.0;
        py.detach(|| {
            // SAFETY: as above, and the two do not overlap.
            let (part, out) = unsafe { (numbers_mut(address, own), out.map(|out| numbers_mut(out, total))) };
            group.gather(part, &sizes, root, out)
        })
        .map_err(raised)
    }

    fn reduce_scatter(
        &mut self,
        py: Python<'_>,
        address: usize,
        num_bytes: usize,
        wanted: (usize, usize),
        dtype: &str,
    ) -> PyResult<()> {
        let dtype = Dtype::of_name(dtype).map_err(raised)?;
        let group = &mut self.0;
        // SAFETY: as above.
        py.detach(|| group.reduce_scatter(unsafe { numbers_mut(address, num_bytes) }, wanted.0..wanted.1, dtype))
            .map_err(raised)
    }

    #[expect(clippy::too_many_arguments, reason = "a vector comes as address and size")]
    fn exchange(
        &mut self,
        py: Python<'_>,
        kind: &str,
        address: usize,
        sizes: Vec<usize>,
        place: usize,
        wanted: Vec<(usize, usize)>,
        out: usize,
    ) -> PyResult<()> {
        let kind = Op::ALL.into_iter().find(|op| op.name() == kind);
        let kind = kind.ok_or_else(|| PyValueError::new_err("no such operation"))?;
        let own = *sizes.get(place).ok_or_else(|| PyValueError::new_err("no size for this place"))?;
        let total = wanted.iter().map(|(from, to)| to.saturating_sub(*from)).sum();
        let wanted: Vec<_> = wanted.into_iter().map(|(from, to)| from..to).collect();
        let group = &mut self.0;
        py.detach(|| {
            // SAFETY: as above, and the two do not overlap.
            let (part, out) = unsafe { (numbers_mut(address, own), numbers_mut(out, total)) };
            group.exchange(kind, part, &sizes, &wanted, out)
        })
        .map_err(raised)
    }

    fn broadcast(&mut self, py: Python<'_>, address: usize, num_bytes: usize, root: usize) -> PyResult<()> {
        let group = &mut self.0;
        // SAFETY: as above.
        py.detach(|| group.broadcast(unsafe { numbers_mut(address, num_bytes) }, root)).map_err(raised)
    }

    #[pyo3(signature = (message, root))]
    fn message<'py>(&mut self, py: Python<'py>, message: Option<&[u8]>, root: usize) -> PyResult<Bound<'py, PyBytes>> {
        let group = &mut self.0;
        let got = py.detach(|| group.message(message, root)).map_err(raised)?;
        Ok(PyBytes::new(py, &got))
    }

    fn barrier(&mut self, py: Python<'_>) -> PyResult<()> {
        let group = &mut self.0;
        py.detach(|| group.barrier()).map_err(raised)
    }
}
