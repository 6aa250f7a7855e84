//! Waiting for a word in shared memory: for a moment awake, then asleep.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::futex;

/// What passes before a waiting rank offers its core to others.
const AWAKE_ALONE: Duration = Duration::from_micros(20);

/// A word that one process changes and others wait for, with how many of them sleep.
///
/// The order of the two is everything: who waits says so before looking at the word for the last time, who changes it looks for
/// sleepers afterwards. So one of them always sees the other.
#[repr(C)]
pub(crate) struct Signal {
    word: AtomicU32,
    sleepers: AtomicU32,
}

impl Signal {
    pub(crate) fn value(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    /// What was written before is seen by who sees the value.
    pub(crate) fn set(&self, value: u32) {
        self.word.store(value, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // An error would say that the address is bad, which it cannot be; and who sleeps wakes by itself, later.
            let _ = futex::wake(&self.word, futex::Flags::empty(), u32::MAX >> 1);
        }
    }

    /// First calls `meanwhile` as long as that says that there is more to do, a moment each time, if there is any `spin`. Then awake for
    /// `spin`, then asleep; `nap` is how long at a time, after which `on_nap` may end it with an error.
    pub(crate) fn wait_until<E>(
        &self,
        reached: impl Fn(u32) -> bool,
        meanwhile: &mut dyn FnMut() -> bool,
        spin: Duration,
        nap: Duration,
        mut on_nap: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        loop {
            if reached(self.value()) {
                return Ok(());
            }
            // Without a core of its own a rank leaves it to those who are waited for.
            if spin.is_zero() || !meanwhile() {
                break;
            }
        }
        if !spin.is_zero() {
            let begin = Instant::now();
            loop {
                for _ in 0..64 {
                    if reached(self.value()) {
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
                let elapsed = begin.elapsed();
                if elapsed >= spin {
                    break;
                }
                if elapsed >= AWAKE_ALONE {
                    // Somebody else may need the core, perhaps the one we wait for.
                    std::thread::yield_now();
                }
            }
        }
        let timeout = futex::Timespec { tv_sec: nap.as_secs().cast_signed(), tv_nsec: i64::from(nap.subsec_nanos()) };
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let result = loop {
            let value = self.word.load(Ordering::SeqCst);
            if reached(value) {
                break Ok(());
            }
            match futex::wait(&self.word, futex::Flags::empty(), value, Some(&timeout)) {
                // Changed before we slept, or woken, or a signal: look again.
                Ok(()) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(_) => {
                    if let Err(error) = on_nap() {
                        break Err(error);
                    }
                }
            }
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        result
    }
}
