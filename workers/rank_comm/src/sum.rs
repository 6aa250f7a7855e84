//! Sums of vectors in the order of ranks: the same bits on every rank, whoever came first.

use half::{bf16, f16};

use crate::CommError;

/// What the bytes of a vector are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Dtype {
    /// IEEE 754 single.
    Float32,
    /// The upper half of a single.
    Bfloat16,
    /// IEEE 754 half.
    Float16,
    /// Nothing to calculate with.
    Bytes,
}

impl Dtype {
    /// Bytes of one number.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 | Self::Float16 => 2,
            Self::Bytes => 1,
        }
    }

    /// torch's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
            Self::Bytes => "bytes",
        }
    }

    /// The one with that name.
    ///
    /// # Errors
    /// For any other name.
    pub fn of_name(name: &str) -> Result<Self, CommError> {
        [Self::Float32, Self::Bfloat16, Self::Float16, Self::Bytes]
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| CommError::Invalid(format!("no collective over {name}")))
    }
}

/// `out` = `parts[0]` + `parts[1]` + ..., from left to right; 16-bit numbers are added in single precision and rounded once.
pub(crate) fn sum(dtype: Dtype, out: &mut [u8], parts: &[&[u8]]) {
    match dtype {
        Dtype::Float32 => sum_of::<4, _>(out, parts, f32::from_le_bytes, f32::to_le_bytes),
        Dtype::Bfloat16 => sum_of::<2, _>(
            out,
            parts,
            |bytes| bf16::from_le_bytes(bytes).to_f32(),
            |sum| bf16::from_f32(sum).to_le_bytes(),
        ),
        Dtype::Float16 => {
            sum_of::<2, _>(
                out,
                parts,
                |bytes| f16::from_le_bytes(bytes).to_f32(),
                |sum| f16::from_f32(sum).to_le_bytes(),
            );
        }
        Dtype::Bytes => unreachable!("bytes are not summed"),
    }
}

fn sum_of<const N: usize, S: Fn([u8; N]) -> f32>(
    out: &mut [u8],
    parts: &[&[u8]],
    read: S,
    write: impl Fn(f32) -> [u8; N],
) {
    let outs = out.as_chunks_mut::<N>().0;
    // Two ranks are the usual case, and a loop over two known slices is what the compiler vectorises best.
    if let [first, second] = parts {
        let pairs = first.as_chunks::<N>().0.iter().zip(second.as_chunks::<N>().0);
        for (out, (a, b)) in outs.iter_mut().zip(pairs) {
            *out = write(read(*a) + read(*b));
        }
        return;
    }
    const BLOCK: usize = 256;
    let mut sums = [0.0_f32; BLOCK];
    for (block, outs) in outs.chunks_mut(BLOCK).enumerate() {
        for (place, part) in parts.iter().enumerate() {
            let numbers = &part.as_chunks::<N>().0[block * BLOCK..][..outs.len()];
            for (sum, number) in sums.iter_mut().zip(numbers) {
                *sum = if place == 0 { read(*number) } else { *sum + read(*number) };
            }
        }
        for (out, sum) in outs.iter_mut().zip(&sums) {
            *out = write(*sum);
        }
    }
}
