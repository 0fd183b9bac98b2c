//! Launches of kernels that other crates bring, and what is checked before.

use core::ops::Range;

use bdia_core::check::{overlap, same};
use bdia_core::{Error, Result};

use crate::Cuda;
use crate::custom::{Arg, CustomKernel, Memory, Slot};
use crate::device::arg;
use crate::error::CudaError;
use crate::span::Span;

/// What a kernel takes for an argument.
#[derive(Clone, Copy)]
enum Value {
    Span(Span),
    U32(u32),
    F32(f32),
}

impl Cuda {
    /// Compiles and loads a kernel, unless it is loaded already. [`launch`](Self::launch) does this
    /// too, in the middle of a step and without what the compiler says.
    ///
    /// # Errors
    /// [`CudaError::Missing`] without NVRTC, which kernels of other crates need with the feature
    /// `prebuilt` as well; [`CudaError::Compile`] with what the compiler said, or where the source
    /// declares no such kernel; [`CudaError::Call`].
    pub fn load(&mut self, kernel: &CustomKernel) -> core::result::Result<(), CudaError> {
        self.device.load_custom(kernel).map(|_| ())
    }

    /// Queues a kernel of one's own: `grid` blocks, of as many threads as its source says. Nothing is
    /// launched where the grid is empty.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of arguments than the source has; [`Error::Setting`] for
    /// one of another kind; [`Error::Handle`] for handles outside their arena or of another layout,
    /// and where an operand that is written overlaps another one; those of [`load`](Self::load),
    /// shortened.
    pub fn launch<const N: usize>(
        &mut self,
        kernel: &CustomKernel,
        grid: [usize; 3],
        args: [Arg; N],
    ) -> Result<()> {
        let (what, loaded) = (kernel.name, self.device.load_custom(kernel)?);
        let slots = self.device.slots(loaded);
        same("arguments of a kernel", slots.len(), N)?;
        let mut values = [Value::U32(0); N];
        let mut places: [Option<(Memory, Range<usize>, bool)>; N] = [const { None }; N];
        for (i, (&slot, arg)) in slots.iter().zip(args).enumerate() {
            let (value, place) = match (slot, arg) {
                (Slot::Operand(memory @ Memory::Reals, out), Arg::Reals(h)) => {
                    let place = self.arenas.reals(what, h)?;
                    (Value::Span(self.reals(h)), Some((memory, place, out)))
                }
                (Slot::Operand(memory @ Memory::Ints, out), Arg::Ints(h)) => {
                    let place = self.arenas.ints(what, h)?;
                    (Value::Span(self.ints(h)), Some((memory, place, out)))
                }
                (Slot::Operand(memory @ Memory::Words, out), Arg::Words(h)) => {
                    let place = self.arenas.words(what, h)?;
                    (Value::Span(self.words(h)), Some((memory, place, out)))
                }
                (Slot::U32, Arg::U32(x)) => (Value::U32(x), None),
                (Slot::F32, Arg::F32(x)) => (Value::F32(x), None),
                (slot, arg) => {
                    let what = "argument of a kernel";
                    return Err(Error::unfit(what, arg.is(), slot.takes()));
                }
            };
            (values[i], places[i]) = (value, place);
        }
        for (i, a) in places.iter().enumerate() {
            for b in &places[..i] {
                if let (Some((of, a, written)), Some((other, b, too))) = (a, b)
                    && of == other
                    && (*written || *too)
                    && overlap(a, b)
                {
                    return Err(Error::Handle(what));
                }
            }
        }
        let mut pointers = values.each_ref().map(|value| match value {
            Value::Span(x) => arg(x),
            Value::U32(x) => arg(x),
            Value::F32(x) => arg(x),
        });
        self.device.launch_custom(loaded, grid, &mut pointers)
    }
}
