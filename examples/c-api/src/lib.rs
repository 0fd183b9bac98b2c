//! The C interface of `bdia-core`: see `include/bdia.h`, which is generated from this crate.
//!
//! | file | what it has |
//! |---|---|
//! | `lib.rs` | status codes, the message of the last failure, the border that no panic crosses |
//! | `pointer.rs` | checks of pointers and sizes that come from C |
//! | `stack.rs` | the stack over callbacks |
//! | `raw.rs` | quantize, step, inverse and gradient on raw buffers |
//!
//! What the callers of unsafe functions promise is the same everywhere, and at the top of the
//! header: pointers are NULL, or they point to as many values as their function says and to nothing
//! that is in use elsewhere.
#![allow(
    clippy::missing_safety_doc,
    reason = "said once, above; these documents are the comments of a C header"
)]
#![allow(rustdoc::broken_intra_doc_links, reason = "the comments of a C header index arrays")]

mod pointer;
mod raw;
mod stack;

use core::cell::RefCell;
use core::ffi::{CStr, c_char};
use core::fmt;
use core::panic::AssertUnwindSafe;
use std::ffi::CString;
use std::panic::catch_unwind;

use bdia_core::{Error, ErrorKind, Fault};

pub use raw::*;
pub use stack::*;

/// What a call reports. bdia_last_message says it in words.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// A pointer is NULL or not aligned, or two buffers overlap.
    Pointer = 1,
    /// A size is 0 where it may not be, does not fit, or is beyond the address space.
    Size = 2,
    /// A setting outside what it may be (gamma, frac_bits, ...).
    Setting = 3,
    /// Not enough memory.
    Memory = 4,
    /// The processor lacks instructions that the library was compiled for, or threads could not be
    /// started.
    Machine = 5,
    /// A value is not finite or leaves the range of the grid. bdia_stack_fault has its place.
    Range = 6,
    /// A rebuilt activation differs from the original, or an input from what a block was given:
    /// memory was changed, or a block does not repeat itself or writes into x.
    Checksum = 7,
    /// A callback returned a number other than 0.
    Callback = 8,
    /// The call does not come in its turn (backward without a forward), or from within a callback
    /// of the same stack.
    State = 9,
    /// A mistake in this library. The stack it happened in can only be freed.
    Internal = 10,
    /// A gradient is not finite: gk, as it was given, or gx after the vjp of a block.
    /// bdia_stack_fault has its place.
    Gradient = 11,
}

/// Why a call failed.
#[derive(Debug)]
struct Failure {
    status: Status,
    text: String,
}

impl Failure {
    fn new(status: Status, text: impl fmt::Display) -> Self {
        Self { status, text: text.to_string() }
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        let status = match e {
            Error::Shape { .. } | Error::TooLarge(_) => Status::Size,
            Error::Setting { .. } => Status::Setting,
            Error::Fault(Fault::Gradient { .. } | Fault::ActivationGradient { .. }) => {
                Status::Gradient
            }
            _ => match e.kind() {
                ErrorKind::Memory => Status::Memory,
                ErrorKind::Numbers => Status::Range,
                ErrorKind::Mismatch => Status::Checksum,
                ErrorKind::Device => Status::Machine,
                ErrorKind::Foreign => Status::Callback,
                _ => Status::Internal,
            },
        };
        Self::new(status, e)
    }
}

impl From<bdia_cpu::CpuError> for Failure {
    fn from(e: bdia_cpu::CpuError) -> Self {
        let status = match e.kind() {
            ErrorKind::Memory => Status::Memory,
            ErrorKind::Argument => Status::Setting,
            _ => Status::Machine,
        };
        Self::new(status, e)
    }
}

type Outcome = Result<(), Failure>;

thread_local! {
    static MESSAGE: RefCell<CString> = RefCell::new(CString::default());
}

fn set_message(text: &str) {
    let clean: String = text.chars().filter(|&c| c != '\0').collect();
    // A thread that is ending has no message any more; the code is still returned.
    let _ = MESSAGE.try_with(|m| {
        if let (Ok(mut m), Ok(text)) = (m.try_borrow_mut(), CString::new(clean)) {
            *m = text;
        }
    });
}

/// Runs the body of a function that C calls: failures become codes and a message, and no panic gets
/// through.
fn border(body: impl FnOnce() -> Outcome) -> Status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(failure)) => {
            set_message(&failure.text);
            failure.status
        }
        Err(panic) => {
            let what = panic
                .downcast_ref::<&str>()
                .copied()
                .or(panic.downcast_ref::<String>().map(String::as_str));
            set_message(&format!(
                "a mistake in bdia, please report it: {}",
                what.unwrap_or("no words")
            ));
            Status::Internal
        }
    }
}

/// Words for the last failure in this thread: what was expected, what was found, what to do. Empty
/// before the first one. Valid until the next failure in this thread or its end; never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn bdia_last_message() -> *const c_char {
    let none: &'static CStr = c"";
    MESSAGE
        .try_with(|m| m.try_borrow().map_or(none.as_ptr(), |m| m.as_ptr()))
        .unwrap_or(none.as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        // SAFETY: the pointer is a string of this thread, and no call comes between.
        unsafe { CStr::from_ptr(bdia_last_message()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn no_panic_crosses_the_border() {
        assert_eq!(border(|| panic!("of {}", "some kind")), Status::Internal);
        assert!(message().ends_with("of some kind"), "{}", message());
        assert_eq!(border(|| panic!("plain")), Status::Internal);
        assert!(message().ends_with("plain"));
        assert_eq!(border(|| std::panic::panic_any(3)), Status::Internal);
        assert_eq!(border(|| Err(Failure::new(Status::Size, "a\0b"))), Status::Size);
        assert_eq!(message(), "ab");
        assert_eq!(border(|| Ok(())), Status::Ok);
        // Messages are the thread's own.
        std::thread::spawn(|| assert_eq!(message(), "")).join().unwrap();
    }
}
