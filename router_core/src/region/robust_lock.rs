//! A mutex that lives in the region, that several processes share, and that survives the death of whoever holds it.
//!
//! The POSIX robust mutex (pthread_mutexattr_setrobust): the kernel hands the lock of a dead holder to the next, and says so.
#![allow(unsafe_code, reason = "a mutex in shared memory has no safe interface")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use libc::pthread_mutex_t;

/// Words of the region that the lock takes: a cache line.
pub(super) const WORDS: usize = 8;

const _: () = assert!(size_of::<pthread_mutex_t>() <= WORDS * size_of::<u64>());

/// How the lock was had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Locked {
    Normally,
    /// Its last holder died with it.
    FromTheDead,
    /// Not at all: not in time.
    Busy,
}

/// Ten times what a decision for a 32 KB prompt keeps it.
const SPIN: Duration = Duration::from_micros(20);
const PAUSES_PER_TRY: usize = 8;

pub(super) struct RobustLock {
    mutex: NonNull<pthread_mutex_t>,
}

// SAFETY: the mutex is made for use by many threads; only the thread that locked it unlocks it, since guards are not `Send`.
unsafe impl Send for RobustLock {}
// SAFETY: as above.
unsafe impl Sync for RobustLock {}

impl RobustLock {
    /// Make the lock that stands at `words`.
    ///
    /// # Safety
    /// [`WORDS`] words from there on are this lock's alone, in a mapping that outlives it, and nobody uses them yet.
    pub(super) unsafe fn create(words: NonNull<u64>) -> io::Result<Self> {
        let mutex: NonNull<pthread_mutex_t> = words.cast();
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: the attributes are initialised by the first call; `mutex` is the caller's promise.
        unsafe {
            check(libc::pthread_mutexattr_init(attributes.as_mut_ptr()))?;
            check(libc::pthread_mutexattr_setpshared(attributes.as_mut_ptr(), libc::PTHREAD_PROCESS_SHARED))?;
            #[cfg(target_os = "linux")]
            check(libc::pthread_mutexattr_setrobust(attributes.as_mut_ptr(), libc::PTHREAD_MUTEX_ROBUST))?;
            check(libc::pthread_mutex_init(mutex.as_ptr(), attributes.as_ptr()))?;
            libc::pthread_mutexattr_destroy(attributes.as_mut_ptr());
        }
        Ok(Self { mutex })
    }

    /// The lock that another process has made at `words`.
    ///
    /// # Safety
    /// As [`RobustLock::create`], and it was made there.
    pub(super) unsafe fn attach(words: NonNull<u64>) -> Self {
        Self { mutex: words.cast() }
    }

    /// And how many ns it took, if somebody else had it.
    pub(super) fn lock(&self, timeout: Duration) -> (Locked, u64) {
        // SAFETY: the mutex was made, by whoever created this lock.
        let result = unsafe { libc::pthread_mutex_trylock(self.mutex.as_ptr()) };
        let mut waited_ns = 0;
        let result = if result == libc::EBUSY {
            let began = Instant::now();
            let result = self.spin(began).unwrap_or_else(|| self.wait(timeout));
            waited_ns = began.elapsed().as_nanos() as u64;
            result
        } else {
            result
        };
        let locked = match result {
            0 => Locked::Normally,
            #[cfg(target_os = "linux")]
            libc::EOWNERDEAD => {
                // SAFETY: this thread holds the mutex.
                unsafe { libc::pthread_mutex_consistent(self.mutex.as_ptr()) };
                Locked::FromTheDead
            }
            _ => Locked::Busy,
        };
        (locked, waited_ns)
    }

    /// Whoever has it gives it back within a microsecond or so, unless it has lost its CPU: waiting awake for a moment is cheaper
    /// than to sleep and be woken. None: it is still taken.
    fn spin(&self, began: Instant) -> Option<i32> {
        while began.elapsed() < SPIN {
            (0..PAUSES_PER_TRY).for_each(|_| std::hint::spin_loop());
            // SAFETY: as above.
            let result = unsafe { libc::pthread_mutex_trylock(self.mutex.as_ptr()) };
            if result != libc::EBUSY {
                return Some(result);
            }
        }
        None
    }

    #[cfg(target_os = "linux")]
    fn wait(&self, timeout: Duration) -> i32 {
        let until = (SystemTime::now() + timeout).duration_since(UNIX_EPOCH).unwrap_or_default();
        let deadline =
            libc::timespec { tv_sec: until.as_secs() as libc::time_t, tv_nsec: until.subsec_nanos() as libc::c_long };
        // SAFETY: as above; the deadline lives as long as the call.
        unsafe { libc::pthread_mutex_timedlock(self.mutex.as_ptr(), &raw const deadline) }
    }

    #[cfg(not(target_os = "linux"))]
    fn wait(&self, _timeout: Duration) -> i32 {
        // SAFETY: as above.
        unsafe { libc::pthread_mutex_lock(self.mutex.as_ptr()) }
    }

    /// To be called by the thread that locked it.
    pub(super) fn unlock(&self) {
        // SAFETY: this thread holds the mutex.
        unsafe { libc::pthread_mutex_unlock(self.mutex.as_ptr()) };
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}
