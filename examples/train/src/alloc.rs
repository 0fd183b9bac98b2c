//! What the process really uses: a counting allocator, and the operating system's peak.
//!
//! Everything is of the process, all its threads. A test that compares a count to the byte is a
//! program without a test harness (`harness = false` in its manifest): the harness's threads would
//! allocate beside it.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::alloc::System;

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static COUNT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// What the system refused this thread last.
    static REFUSED: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator with counters. A program installs it:
/// `#[global_allocator] static ALLOCATOR: Counting = Counting;`
#[derive(Debug, Clone, Copy, Default)]
pub struct Counting;

impl Counting {
    /// Bytes allocated now.
    pub fn current() -> usize {
        CURRENT.load(Ordering::Relaxed)
    }

    /// The most bytes that were allocated at one time since the start, or since
    /// [`Counting::reset_peak`].
    pub fn peak() -> usize {
        PEAK.load(Ordering::Relaxed)
    }

    /// Allocations and growths since the start.
    pub fn count() -> u64 {
        COUNT.load(Ordering::Relaxed)
    }

    /// The peak is counted from now on.
    pub fn reset_peak() {
        PEAK.store(CURRENT.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Counts memory that is not the process's own: what a device's driver gave. It stays counted.
    pub fn add_device(bytes: usize) {
        Self::grow(bytes);
    }

    /// Bytes that the system last refused this thread; 0: it never did.
    pub fn refused() -> usize {
        REFUSED.try_with(Cell::get).unwrap_or(0)
    }

    fn got(p: *mut u8, bytes: usize) {
        if p.is_null() {
            // A thread that ends has no such value any more.
            let _ = REFUSED.try_with(|r| r.set(bytes));
        } else {
            Self::grow(bytes);
        }
    }

    fn grow(bytes: usize) {
        COUNT.fetch_add(1, Ordering::Relaxed);
        let now = CURRENT.fetch_add(bytes, Ordering::Relaxed).wrapping_add(bytes);
        PEAK.fetch_max(now, Ordering::Relaxed);
    }

    fn shrink(bytes: usize) {
        CURRENT.fetch_sub(bytes, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed to `System` with its arguments unchanged, and its result is returned
// unchanged; the counters are atomics and allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let p = unsafe { System.alloc(layout) };
        Self::got(p, layout.size());
        p
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let p = unsafe { System.alloc_zeroed(layout) };
        Self::got(p, layout.size());
        p
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are those that `System` asks for; `ptr` came from `System`.
        unsafe { System.dealloc(ptr, layout) };
        Self::shrink(layout.size());
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for; `ptr` came from `System`.
        let p = unsafe { System.realloc(ptr, layout, new_size) };
        if !p.is_null() {
            // Only the difference: the system usually grows a block in place.
            if new_size >= layout.size() {
                Self::grow(new_size - layout.size());
            } else {
                Self::shrink(layout.size() - new_size);
            }
        } else {
            Self::got(p, new_size);
        }
        p
    }
}

/// Threads of the process, where the system tells (Linux).
pub fn threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// The most physical memory that the process has held, where the system tells (Linux, macOS).
pub fn peak_rss_bytes() -> Option<u64> {
    #[cfg(unix)]
    {
        let mut usage = core::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: `usage` is valid for writes of an `rusage`.
        let rc = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
        if rc != 0 {
            return None;
        }
        // SAFETY: all-zero bytes are a valid `rusage`, and the call has succeeded.
        let usage = unsafe { usage.assume_init() };
        let units = u64::try_from(usage.ru_maxrss).ok()?;
        // macOS counts bytes, the others kibibytes.
        Some(if cfg!(target_vendor = "apple") { units } else { units.saturating_mul(1024) })
    }
    #[cfg(not(unix))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    // Called directly: other tests of this process do not go through it, so the counts are exact.
    #[test]
    fn counts_what_is_allocated() {
        let a = Layout::from_size_align(1000, 8).unwrap();
        Counting::reset_peak();
        let (start, count) = (Counting::current(), Counting::count());
        // SAFETY: the layouts have a size, and every pointer is freed once with the layout it was
        // last given.
        unsafe {
            let p = Counting.alloc(a);
            assert!(!p.is_null());
            let p = Counting.realloc(p, a, 5000);
            assert!(!p.is_null());
            assert_eq!(Counting::current() - start, 5000);
            let p = Counting.realloc(p, Layout::from_size_align(5000, 8).unwrap(), 100);
            assert!(!p.is_null());
            assert_eq!(Counting::current() - start, 100);
            Counting.dealloc(p, Layout::from_size_align(100, 8).unwrap());
            let z = Counting.alloc_zeroed(a);
            assert!(!z.is_null() && *z == 0);
            Counting.dealloc(z, a);
        }
        assert_eq!(Counting::current(), start);
        assert_eq!(Counting::peak() - start, 5000);
        assert_eq!(Counting::count() - count, 3);
        Counting::reset_peak();
        assert_eq!(Counting::peak(), start);
    }

    #[cfg(unix)]
    #[test]
    fn the_system_tells_its_peak() {
        assert!(peak_rss_bytes().unwrap() > 1 << 20);
    }
}
