//! The limits of the router as a whole, over all of its processes.

use super::Router;
use crate::admission::{Counts, Entry, Turn};
use crate::error::Error;

impl Router {
    /// A request comes.
    ///
    /// # Errors
    /// [`Error::RegionBusy`]; likewise below.
    pub fn enter(&self, now_ns: u64) -> Result<Entry, Error> {
        Ok(self.lock()?.state().admission.enter(&self.settings.admission, now_ns))
    }

    /// Whether one that waits in this process may run.
    ///
    /// # Errors
    /// As above.
    pub fn next_turn(&self, now_ns: u64) -> Result<Turn, Error> {
        Ok(self.lock()?.state().admission.next(&self.settings.admission, now_ns))
    }

    /// One that ran in this process has ended. Whether anybody waits, in whatever process.
    ///
    /// # Errors
    /// As above.
    pub fn leave(&self) -> Result<bool, Error> {
        Ok(self.lock()?.state().admission.leave())
    }

    /// One that waited in this process does not any more; `refused`: because it waited for too long.
    ///
    /// # Errors
    /// As above.
    pub fn withdraw(&self, refused: bool) -> Result<(), Error> {
        self.lock()?.state().admission.withdraw(refused);
        Ok(())
    }

    /// What runs and waits.
    ///
    /// # Errors
    /// As above.
    pub fn admission(&self) -> Result<Counts, Error> {
        Ok(self.lock()?.state().admission.counts())
    }
}
