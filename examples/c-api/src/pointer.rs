//! Checks of what comes from C. What cannot be checked (that memory is there) is the caller's
//! promise, made in the header.

use core::ops::Range;

use crate::{Failure, Status};

/// The failure of a pointer that cannot be used.
fn bad(what: &str, why: &str) -> Failure {
    Failure::new(Status::Pointer, format_args!("{what} {why}"))
}

fn check<T>(what: &str, p: *const T, len: usize) -> Result<(), Failure> {
    if len > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::new(
            Status::Size,
            format_args!("{what}: {len} values are beyond the address space"),
        ));
    }
    if p.is_null() {
        return Err(bad(what, "is NULL"));
    }
    if !p.is_aligned() {
        return Err(bad(what, "is not aligned for its type"));
    }
    Ok(())
}

/// `len` values that C lets us read.
///
/// # Safety
/// If the pointer is not null and aligned, `len` values are there and nothing changes them while
/// the slice lives.
pub(crate) unsafe fn input<'a, T>(what: &str, p: *const T, len: usize) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    check(what, p, len)?;
    // SAFETY: checked above, and promised by the caller.
    Ok(unsafe { core::slice::from_raw_parts(p, len) })
}

/// `len` values that C lets us write.
///
/// # Safety
/// If the pointer is not null and aligned, `len` values are there and nothing else reads or changes
/// them while the slice lives; [`disjoint`] has been asked where other buffers come with it.
pub(crate) unsafe fn output<'a, T>(
    what: &str,
    p: *mut T,
    len: usize,
) -> Result<&'a mut [T], Failure> {
    if len == 0 {
        return Ok(&mut []);
    }
    check(what, p, len)?;
    // SAFETY: checked above, and promised by the caller.
    Ok(unsafe { core::slice::from_raw_parts_mut(p, len) })
}

/// One value that is read.
///
/// # Safety
/// As [`input`].
pub(crate) unsafe fn one<'a, T>(what: &str, p: *const T) -> Result<&'a T, Failure> {
    check(what, p, 1)?;
    // SAFETY: checked above, and promised by the caller.
    Ok(unsafe { &*p })
}

/// One value that is written.
///
/// # Safety
/// As [`output`].
pub(crate) unsafe fn one_mut<'a, T>(what: &str, p: *mut T) -> Result<&'a mut T, Failure> {
    check(what, p, 1)?;
    // SAFETY: checked above, and promised by the caller.
    Ok(unsafe { &mut *p })
}

/// The addresses of `len` values.
pub(crate) fn span<T>(p: *const T, len: usize) -> Range<usize> {
    p.addr()..p.addr().saturating_add(len.saturating_mul(size_of::<T>()))
}

/// A failure where two of the spans overlap.
pub(crate) fn disjoint(spans: &[Range<usize>]) -> Result<(), Failure> {
    for (i, a) in spans.iter().enumerate() {
        for b in &spans[i + 1..] {
            if a.start.max(b.start) < a.end.min(b.end) {
                return Err(bad("a buffer", "overlaps another one of the same call"));
            }
        }
    }
    Ok(())
}

/// `a·b` values.
pub(crate) fn values(what: &str, a: usize, b: usize) -> Result<usize, Failure> {
    a.checked_mul(b).ok_or_else(|| {
        Failure::new(
            Status::Size,
            format_args!("{what}: {a}·{b} values are beyond the address space"),
        )
    })
}
