//! Arenas, and slices of them that several threads write at once.

use core::alloc::Layout;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut, Range};
use core::ptr::NonNull;
use std::alloc::{alloc, dealloc};

use bdia_core::{Error, Ints, Reals, Result, Words};

use crate::CpuError;

mod sealed {
    /// Numbers of four bytes.
    ///
    /// # Safety
    /// All bits zero is a valid value, and the type has no destructor.
    pub unsafe trait Plain: Copy + Send + Sync {}

    // SAFETY: zero bits are the number 0.
    unsafe impl Plain for i32 {}
    // SAFETY: zero bits are the number 0.
    unsafe impl Plain for f32 {}
    // SAFETY: zero bits are the number 0.
    unsafe impl Plain for u32 {}
}
pub(crate) use sealed::Plain;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes of a large page.
const PAGE: usize = 2 << 20;

/// Asks for large pages where whole ones lie within new memory. Strided reads of weights and panels
/// of several MiB otherwise wait for page tables.
fn ask_for_large_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        let skip = start.align_offset(PAGE);
        let whole = bytes.saturating_sub(skip) / PAGE * PAGE;
        if whole > 0 {
            // SAFETY: whole pages within one allocation; the advice changes no contents, and a
            // refusal does no harm.
            unsafe { libc::madvise(start.wrapping_add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes, PAGE);
}

/// Memory that is there for someone else once this is dropped. None of it is touched.
pub(crate) struct Reserved(#[expect(dead_code, reason = "it is held")] Vec<u8>);

impl Reserved {
    pub(crate) fn new(bytes: usize) -> core::result::Result<Self, CpuError> {
        let mut room = Vec::new();
        room.try_reserve_exact(bytes).map_err(|_| CpuError::Memory { bytes })?;
        // Seen by someone, or the compiler would leave it out.
        Ok(Self(core::hint::black_box(room)))
    }
}

/// One allocation of zeros, aligned to cache lines, in large pages where the system has them.
#[derive(Debug)]
pub(crate) struct Arena<T: Plain> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: the arena owns its memory, as a `Box<[T]>` does, and `T: Send + Sync`.
unsafe impl<T: Plain> Send for Arena<T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for Arena<T> {}

impl<T: Plain> Arena<T> {
    pub(crate) fn new(len: usize) -> core::result::Result<Self, CpuError> {
        if len == 0 {
            return Ok(Self { start: NonNull::dangling(), len });
        }
        let bytes = len.saturating_mul(size_of::<T>());
        let layout =
            Layout::from_size_align(bytes, LINE).map_err(|_| CpuError::Memory { bytes })?;
        // SAFETY: the layout's size is not 0.
        let start: NonNull<T> =
            NonNull::new(unsafe { alloc(layout) }.cast()).ok_or(CpuError::Memory { bytes })?;
        ask_for_large_pages(start.as_ptr().cast(), bytes);
        // SAFETY: all of the allocation, which nothing else knows yet.
        unsafe { start.write_bytes(0, len) };
        Ok(Self { start, len })
    }

    /// The address of a handle's values, none where they lie outside. It comes from the allocation
    /// itself, not from a reference, so it stays good while the arena is borrowed again and again.
    pub(crate) fn pointer(&self, h: impl Handle) -> Option<*mut T> {
        (h.place().end <= self.len && h.start() <= self.len)
            .then(|| self.start.as_ptr().wrapping_add(h.start()))
    }
}

impl<T: Plain> Drop for Arena<T> {
    fn drop(&mut self) {
        if let Ok(layout) = Layout::from_size_align(self.len * size_of::<T>(), LINE)
            && self.len > 0
        {
            // SAFETY: `new` allocated it with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) }
        }
    }
}

impl<T: Plain> Deref for Arena<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values from `start` are allocated and initialized (zero bits are a `T`).
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Arena<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` is the only access.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// A handle into any of the arenas.
pub(crate) trait Handle: Copy {
    fn start(self) -> usize;
    fn len(self) -> usize;

    /// The place in the arena; an end beyond the address space becomes one outside every arena.
    fn place(self) -> Range<usize> {
        self.start()..self.start().saturating_add(self.len())
    }
}

macro_rules! handle {
    ($($t:ty),*) => {$(
        impl Handle for $t {
            fn start(self) -> usize {
                <$t>::start(self)
            }
            fn len(self) -> usize {
                <$t>::len(self)
            }
        }
    )*};
}
handle!(Ints, Reals, Words);

/// The values of a handle.
pub(crate) fn get<'s, T>(arena: &'s [T], h: impl Handle, what: &'static str) -> Result<&'s [T]> {
    arena.get(h.place()).ok_or(Error::Handle(what))
}

/// The values of a handle, to be changed.
pub(crate) fn get_mut<'s, T>(
    arena: &'s mut [T],
    h: impl Handle,
    what: &'static str,
) -> Result<&'s mut [T]> {
    arena.get_mut(h.place()).ok_or(Error::Handle(what))
}

/// The bytes of packed values: of the arena, or of memory that is `given`.
pub(crate) fn packed_bytes<'s>(
    arena: &'s [u32],
    given: &'s [(Range<usize>, &'static [u8])],
    h: Words,
) -> Result<&'s [u8]> {
    let Some(place) = h.mapped() else {
        let words = get(arena, h, "packed words")?;
        // Words are little-endian wherever this crate runs (x86-64, 64-bit ARM).
        // SAFETY: the memory of the words, of which every byte is a number.
        return Ok(unsafe {
            core::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words))
        });
    };
    if place.is_empty() {
        return Ok(&[]);
    }
    let inside = |(at, _): &&(Range<usize>, _)| at.start <= place.start && place.end <= at.end;
    let (at, bytes) =
        given.iter().find(inside).ok_or(Error::Handle("mapped words that were not attached"))?;
    let from = 4 * (place.start - at.start);
    let end = (from + 4 * place.len()).min(bytes.len());
    bytes.get(from..end).ok_or(Error::Handle("packed words"))
}

/// The values of several handles; an error where they overlap or lie outside.
pub(crate) fn split<'s, T, H: Handle, const N: usize>(
    arena: &'s mut [T],
    handles: [H; N],
    what: &'static str,
) -> Result<[&'s mut [T]; N]> {
    let len = arena.len();
    // An empty handle is moved to the start, where it overlaps nothing.
    let places =
        handles.map(Handle::place).map(|p| if p.is_empty() && p.start <= len { 0..0 } else { p });
    arena.get_disjoint_mut(places).map_err(|_| Error::Handle(what))
}

/// A mutable slice of which several threads take disjoint parts.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for the `&mut [T]` it was made of; that parts are disjoint is the duty of
// `part`'s callers.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `len` values from `at` on.
    ///
    /// # Safety
    /// As long as the part lives, no other access to its values happens.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts are disjoint")]
    pub(crate) unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at);
        // SAFETY: within the slice; the caller promises that no other access happens.
        unsafe { core::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// `len` values from `at` on, to be read.
    ///
    /// # Safety
    /// As long as the part lives, nothing writes to its values.
    pub(crate) unsafe fn view(&self, at: usize, len: usize) -> &[T] {
        assert!(at <= self.len && len <= self.len - at);
        // SAFETY: within the slice; the caller promises that nothing is written.
        unsafe { core::slice::from_raw_parts(self.start.add(at), len) }
    }

    /// The first value's address, for strided access.
    pub(crate) fn pointer(&self) -> *mut T {
        self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_are_aligned_and_zero() {
        let a = Arena::<f32>::new(1000).unwrap();
        assert_eq!(a.as_ptr() as usize % LINE, 0);
        assert!(a.len() == 1000 && a.iter().all(|&x| x == 0.0));
        assert!(Arena::<i32>::new(0).unwrap().is_empty());
    }

    #[test]
    fn pointers_are_those_of_the_slices() {
        let mut a = Arena::<f32>::new(10).unwrap();
        let p = a.pointer(Reals::new(4, 6)).unwrap();
        assert_eq!(p.cast_const(), a[4..].as_ptr());
        // SAFETY: within the arena, and no reference to it is alive.
        unsafe { *p = 2.5 };
        a[5] = 1.0;
        // SAFETY: as above; the pointer outlives borrows of the arena.
        assert_eq!(unsafe { (*p, *p.add(1)) }, (2.5, 1.0));
        assert!(a.pointer(Reals::new(5, 6)).is_none());
        assert!(a.pointer(Reals::new(usize::MAX, 6)).is_none());
        assert!(a.pointer(Reals::new(11, 0)).is_none());
        assert!(a.pointer(Reals::new(10, 0)).is_some());
    }

    #[test]
    fn too_much_memory_is_an_error() {
        assert!(matches!(Arena::<f32>::new(usize::MAX / 8), Err(CpuError::Memory { .. })));
        assert!(matches!(Arena::<f32>::new(usize::MAX), Err(CpuError::Memory { .. })));
    }

    #[test]
    fn handles_outside_are_errors() {
        let mut a = Arena::<f32>::new(10).unwrap();
        assert!(get(&a, Reals::new(5, 6), "x").is_err());
        assert!(get(&a, Reals::new(usize::MAX, 6), "x").is_err());
        assert!(split(&mut a, [Reals::new(0, 6), Reals::new(5, 2)], "x").is_err());
        assert!(split(&mut a, [Reals::new(0, 6), Reals::new(6, 4)], "x").is_ok());
    }
}
