//! What ranks compare before they trust each other's bytes.

use crate::{Dtype, Op};

/// An operation in one word, for comparison: what it is, over what, from or to whom (0: everybody), and how many bytes.
pub(crate) fn tag(op: Op, dtype: Dtype, root: Option<usize>, bytes: usize) -> u64 {
    let root = root.map_or(0, |root| root as u64 + 1);
    (op as u64 + 1) << 60 | (dtype as u64) << 56 | root << 40 | bytes as u64 & BYTES
}

const BYTES: u64 = (1 << 40) - 1;

/// In words.
pub(crate) fn described(tag: u64) -> String {
    let op = Op::ALL.into_iter().find(|&op| op as u64 + 1 == tag >> 60).map_or("nothing", Op::name);
    let dtypes = [Dtype::Float32, Dtype::Bfloat16, Dtype::Float16, Dtype::Bytes];
    let dtype = dtypes.into_iter().find(|&dtype| dtype as u64 == tag >> 56 & 0xf).unwrap_or(Dtype::Bytes);
    let root = match tag >> 40 & 0xffff {
        0 => String::new(),
        root => format!(" with root {}", root - 1),
    };
    format!("{op} of {} {}{root}", (tag & BYTES) as usize / dtype.size(), dtype.name())
}
