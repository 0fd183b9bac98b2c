//! A part of a pass's memory as a Python buffer.

use core::ffi::c_int;

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::pass::Pass;

/// An address inside the arenas of the pass that the region keeps alive.
struct Address(*mut u8);

// SAFETY: an address is only a number here; Python's threads take turns (the interpreter's lock),
// and the arenas belong to an object that the region holds.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

/// `bytes` writable bytes. The pass lives as long as any buffer of it does, and its arenas never
/// move.
#[pyclass(frozen)]
pub(crate) struct Region {
    address: Address,
    bytes: usize,
    /// Who owns the memory.
    _pass: Py<Pass>,
}

impl Region {
    /// A region of the arenas of `pass`.
    pub(crate) fn new(pass: Py<Pass>, start: *mut u8, bytes: usize) -> Self {
        Self { address: Address(start), bytes, _pass: pass }
    }
}

#[pymethods]
impl Region {
    /// # Safety
    /// Called by the interpreter, with a view to fill in.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill in"));
        }
        let this = slf.get();
        let bytes = this.bytes as ffi::Py_ssize_t;
        // SAFETY: the view is the interpreter's; address and length are those of a part of an
        // arena, and the view keeps this object, which keeps the pass, which keeps the arena.
        let code = unsafe {
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), this.address.0.cast(), bytes, 0, flags)
        };
        if code == 0 { Ok(()) } else { Err(PyErr::fetch(slf.py())) }
    }

    fn __len__(&self) -> usize {
        self.bytes
    }
}
