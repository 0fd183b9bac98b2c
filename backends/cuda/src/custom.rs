//! Kernels that other crates bring: their source, and what it says of their parameters.

use bdia_core::{Ints, Reals, Words};

use crate::compile::{declarations, threads};

/// A kernel of one's own: CUDA C++ as text, and the name of a kernel in it.
///
/// NVRTC compiles the text as it does the backend's own kernels: for the very device, without fused
/// multiply-add but where `fmaf` asks for it, without includes, and behind `kernels/common.cu`, whose
/// names it may use. A kernel is declared so, on a line of its own:
///
/// ```cuda
/// // y = factor·x
/// KERNEL(THREADS, 4) scale(float factor, In<float> x, Out<float> y) {
///     u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
///     if (i < y.n) y[i] = factor * x[i];
/// }
/// ```
///
/// `KERNEL(threads, blocks)` has the threads of a block (a number, or `THREADS`, 256; whole warps) and
/// how many blocks should find registers on a multiprocessor. A parameter is `In<T>` (read) or
/// `Out<T>` (written, or read and written) of `float`, `i32` or `u32`, with its number of values in
/// `n`; or a plain `float` or `u32`.
///
/// Several kernels may share a text, which is then compiled once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CustomKernel {
    pub(crate) source: &'static str,
    pub(crate) name: &'static str,
}

impl CustomKernel {
    /// The kernel `name` of `source`.
    ///
    /// # Safety
    /// Whoever makes it answers for every launch of it: with the grids and arguments that it will be
    /// launched with, the kernel touches only the values of its operands, below each one's `n`, writes
    /// only to those that are `Out`, and no two threads touch the same value unordered where one of
    /// them writes.
    pub const unsafe fn new(source: &'static str, name: &'static str) -> Self {
        Self { source, name }
    }
}

/// An argument of a kernel. Which operands are written, the kernel's own parameters say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// `In<float>` or `Out<float>`.
    Reals(Reals),
    /// `In<i32>` or `Out<i32>`.
    Ints(Ints),
    /// `In<u32>` or `Out<u32>`.
    Words(Words),
    /// `u32`
    U32(u32),
    /// `float`
    F32(f32),
}

macro_rules! from {
    ($($variant:ident $t:ty),*) => {$(
        impl From<$t> for Arg {
            fn from(x: $t) -> Self {
                Self::$variant(x)
            }
        }
    )*};
}
from!(Reals Reals, Ints Ints, Words Words, U32 u32, F32 f32);

/// A parameter, as the source declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Of which arena, and whether it is written.
    Operand(Memory, bool),
    U32,
    F32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    Reals,
    Ints,
    Words,
}

impl Slot {
    /// From the text between two commas.
    pub(crate) fn of(declaration: &str) -> Option<Self> {
        let (kind, _) = declaration.trim().rsplit_once(' ')?;
        Some(match kind.trim() {
            "In<float>" => Self::Operand(Memory::Reals, false),
            "Out<float>" => Self::Operand(Memory::Reals, true),
            "In<i32>" => Self::Operand(Memory::Ints, false),
            "Out<i32>" => Self::Operand(Memory::Ints, true),
            "In<u32>" => Self::Operand(Memory::Words, false),
            "Out<u32>" => Self::Operand(Memory::Words, true),
            "u32" => Self::U32,
            "float" => Self::F32,
            _ => return None,
        })
    }

    /// In words.
    pub(crate) const fn takes(self) -> &'static str {
        match self {
            Self::Operand(Memory::Reals, _) => "reals",
            Self::Operand(Memory::Ints, _) => "integers",
            Self::Operand(Memory::Words, _) => "words",
            Self::U32 => "a u32",
            Self::F32 => "an f32",
        }
    }
}

impl Arg {
    /// As [`Slot::takes`].
    pub(crate) const fn is(self) -> &'static str {
        match self {
            Self::Reals(_) => Slot::Operand(Memory::Reals, false).takes(),
            Self::Ints(_) => Slot::Operand(Memory::Ints, false).takes(),
            Self::Words(_) => Slot::Operand(Memory::Words, false).takes(),
            Self::U32(_) => Slot::U32.takes(),
            Self::F32(_) => Slot::F32.takes(),
        }
    }
}

/// What a kernel takes, as its source declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Signature {
    /// Threads of a block.
    pub threads: u32,
    pub slots: Vec<Slot>,
}

impl Signature {
    /// That of a kernel, if its source declares it and a launch can give it what it takes.
    pub(crate) fn of(kernel: &CustomKernel) -> Option<Self> {
        let found = declarations(kernel.source).find(|d| d.name == kernel.name)?;
        let threads = threads(found.bounds.split(',').next()?)?;
        let slots: Option<_> = found.parameters.split(',').map(Slot::of).collect();
        // Votes and shuffles take whole warps.
        let fits = (1..=1024).contains(&threads) && threads.is_multiple_of(32);
        slots.filter(|_| fits).map(|slots| Self { threads, slots })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_a_source() {
        let of = Slot::of;
        assert_eq!(of(" In<float> x"), Some(Slot::Operand(Memory::Reals, false)));
        assert_eq!(of("Out<i32>  many"), Some(Slot::Operand(Memory::Ints, true)));
        assert_eq!(of("Out<u32> w "), Some(Slot::Operand(Memory::Words, true)));
        assert_eq!((of("u32 n"), of("float eps")), (Some(Slot::U32), Some(Slot::F32)));
        for other in ["", "x", "double x", "const float* x", "In<double> x", "In<float>x"] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn signatures_of_kernels() {
        const SOURCE: &str = "KERNEL(32, 1) first(Out<u32> n) {}\n\
                              KERNEL(THREADS, 4) second(float a,\n    In<float> x) {}\n\
                              KERNEL(48, 4) no_whole_warps(u32 n) {}\n\
                              KERNEL(64, 4) pointer(float* x) {}\n\
                              // KERNEL(64, 4) comment(u32 n) {}\n";
        // SAFETY: none of them is launched.
        let of = |name| Signature::of(&unsafe { CustomKernel::new(SOURCE, name) });
        let words = Slot::Operand(Memory::Words, true);
        assert_eq!(of("first"), Some(Signature { threads: 32, slots: vec![words] }));
        let slots = vec![Slot::F32, Slot::Operand(Memory::Reals, false)];
        assert_eq!(of("second"), Some(Signature { threads: 256, slots }));
        for name in ["no_whole_warps", "pointer", "comment", "third", ""] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}
