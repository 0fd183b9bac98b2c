//! What kernels take: plain data with the layout that C has.

use bdia_core::backend::Chunk;
use bdia_core::rng::{Draw, Stream};

/// A type that kernels take.
///
/// # Safety
/// It has the layout of the type that stands in the kernels' source.
pub(crate) unsafe trait Parameter {}

// SAFETY: the same in C: `u32`, `float`, `u64`.
unsafe impl Parameter for u32 {}
// SAFETY: as above.
unsafe impl Parameter for f32 {}
// SAFETY: as above.
unsafe impl Parameter for u64 {}

macro_rules! parameters {
    ($($t:ty),*) => {$(
        // SAFETY: `repr(C)`, with the fields of the source in their order.
        unsafe impl Parameter for $t {}
    )*};
}
parameters!(Span, Streams, Shape, Report, Matrix, Packed, Attend, Constants, Adafactor);

/// `In` or `Out`: an address and a number of values.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub at: u64,
    pub len: u64,
}

impl Span {
    pub(crate) const EMPTY: Self = Self { at: 0, len: 0 };
}

/// `Streams`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streams {
    pub seed: u64,
    pub step: u32,
    pub global: u32,
    pub place: u32,
    pub threshold: u32,
}

impl Streams {
    /// The streams of a chunk's samples; `threshold` is that of dropped words.
    pub(crate) fn new(chunk: &Chunk, draw: Draw, threshold: u32) -> Self {
        let Stream { seed, step, place, .. } = chunk.stream(0, draw);
        Self { seed, step, global: chunk.global, place, threshold }
    }
}

/// `Shape` of update.cu
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub samples: u32,
    pub per: u32,
    pub groups: u32,
    pub sign: i32,
    pub at: u64,
    pub streams: Streams,
    pub m: u32,
    pub magnitude: f32,
    pub scale: f32,
}

/// `Status`; all ones where there is no fault.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Status {
    pub owner: u32,
    pub code: u32,
    pub site_kind: u32,
    pub frac_bits: u32,
    pub site: u64,
    pub first: u64,
    pub per: u64,
    pub vocab: u64,
    pub detail: u64,
}

/// `Report`
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Report {
    pub status: u64,
    pub seq: u32,
    pub code: u32,
    pub site_kind: u32,
    pub frac_bits: u32,
    pub site: u64,
    pub first: u64,
    pub per: u64,
    pub vocab: u64,
}

/// `Matrix` of nn.cu
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    pub stride: u32,
    pub at: u32,
}

/// `Packed` of nn.cu
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed {
    pub rows: u64,
    pub blocks: u32,
    pub values: u32,
    pub bytes: u32,
    pub neighbours: u32,
    pub packing: u32,
}

/// `Attend` of attention.cu
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attend {
    pub heads: u32,
    pub kv_heads: u32,
    pub group: u32,
    pub head_dim: u32,
    pub queries: u32,
    pub keys: u32,
    pub mask: u32,
    pub window: u32,
    pub scale: f32,
    pub kept: f32,
    pub streams: Streams,
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub dq: Matrix,
    pub dk: Matrix,
    pub dv: Matrix,
}

/// `Rule` of optim.cu
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Constants {
    pub shrink: f32,
    pub scale: f32,
    pub rate: f32,
    pub keep1: f32,
    pub take1: f32,
    pub keep2: f32,
    pub take2: f32,
    pub inverse: f32,
    pub eps: f32,
    pub correction: f64,
}

/// `Adafactor` of optim.cu
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adafactor {
    pub shrink: f32,
    pub scale: f32,
    pub keep: f32,
    pub take: f32,
    pub eps: f64,
    pub lr: f64,
    pub threshold: f64,
}
