//! Vectors come as addresses, since a torch tensor of any dtype has one.
#![allow(unsafe_code, reason = "memory of tensors, by address")]

/// SAFETY: `count` numbers from `address` on are valid and aligned, and nobody else writes them as long as the slice is used.
pub(crate) unsafe fn numbers<'a, T>(address: usize, count: usize) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), count) }
}

/// SAFETY: as above, and nobody else reads them either.
pub(crate) unsafe fn numbers_mut<'a, T>(address: usize, count: usize) -> &'a mut [T] {
    if count == 0 {
        return &mut [];
    }
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), count) }
}
