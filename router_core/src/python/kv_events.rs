//! What caches tell the engine.

use pyo3::prelude::*;

use super::core::Core;
use crate::kv_mirror::{SnapshotBlock, Stored};

#[pymethods]
impl Core {
    #[pyo3(signature = (slot, models, is_new, is_whole, /))]
    fn kv_begin(&self, slot: u16, models: Vec<String>, is_new: bool, is_whole: bool) -> PyResult<()> {
        Ok(self.router.kv_begin(slot, &models, is_new, is_whole)?)
    }

    #[pyo3(signature = (slot, /))]
    fn kv_end(&self, slot: u16) -> PyResult<()> {
        Ok(self.router.kv_end(slot)?)
    }

    #[pyo3(signature = (slot, hashes, parent, tokens, block_size, medium, plain, /))]
    #[allow(clippy::too_many_arguments)]
    fn kv_stored(
        &self,
        slot: u16,
        hashes: Vec<u64>,
        parent: Option<u64>,
        tokens: Vec<u32>,
        block_size: usize,
        medium: u8,
        plain: bool,
    ) -> PyResult<bool> {
        let stored = Stored { hashes: &hashes, parent, tokens: &tokens, block_size, medium, plain };
        Ok(self.router.kv_stored(slot, &stored)?)
    }

    #[pyo3(signature = (slot, hashes, medium, /))]
    fn kv_removed(&self, slot: u16, hashes: Vec<u64>, medium: Option<u8>) -> PyResult<()> {
        Ok(self.router.kv_removed(slot, &hashes, medium)?)
    }

    #[pyo3(signature = (slot, blocks, /))]
    fn kv_resync(&self, slot: u16, blocks: Vec<SnapshotBlock>) -> PyResult<()> {
        Ok(self.router.kv_resync(slot, &blocks)?)
    }

    #[pyo3(signature = (slot, /))]
    fn kv_view(&self, slot: u16) -> Option<(usize, u64, usize)> {
        self.router.kv_view(slot).map(|view| (view.blocks, view.tokens, view.unmapped))
    }
}
