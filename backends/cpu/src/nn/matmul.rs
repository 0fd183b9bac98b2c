//! Matrix products: which kernel computes them, in which precision, and `gemm` in tiles that the
//! shape alone decides.
//!
//! Products go through [`super::packed`], which packs nothing twice; without fused multiply-add
//! `gemm` serves, which chooses at run time what a build cannot.

use gemm::Parallelism;
use gemm_common::cache::CACHE_INFO;

use super::view::{View, cut};
use crate::Team;
use crate::memory::Shared;

/// Most rows of a tile of `C`.
const ROWS: usize = 512;
/// Most columns of a tile of `C`.
const COLS: usize = 384;
/// Most inner terms that are summed before they are added to `C`. `gemm` never cuts so few of them
/// again, so neither the order of sums nor the packing buffers depend on the sizes of the caches.
const INNER: usize = 512;

/// A bound on what `gemm` allocates in one thread. Read from `gemm-common` 0.19: both packed
/// operands of a tile, with the columns rounded up to a micro-kernel (or 128 of them, where the L3
/// cache is unknown), and its slab of L2 size.
pub(crate) fn thread_bytes() -> usize {
    const MICRO_ROWS: usize = 96;
    const MICRO_COLS: usize = 8;
    let packed = (ROWS + MICRO_COLS).max(128 * MICRO_COLS) + (COLS + MICRO_ROWS);
    packed * INNER * size_of::<f32>() + CACHE_INFO[1].cache_bytes + 4096
}

/// `C = A·B`, or `C += A·B`, in this thread. The rows of `c` are `stride` apart; `memory` is
/// [`own_scratch`].
///
/// # Safety
/// The operands lie in readable memory, one step of each is 1, and `c` lies in memory that nothing
/// else accesses.
pub(crate) unsafe fn product(
    products: Products,
    shape: [usize; 3],
    a: View,
    b: View,
    c: *mut f32,
    stride: usize,
    accumulate: bool,
    memory: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    use super::packed::{amx::Amx, avx512::Avx512, bf16::Avx512Bf16};
    use super::packed::{lanes::Lanes, rounded::Rounded, small};
    let kernel = match products {
        // SAFETY: the caller's promise.
        Products::Gemm => return unsafe { by_gemm(shape, a, b, c, stride, accumulate) },
        Products::Lanes => small::<Lanes>,
        Products::RoundedLanes => small::<Rounded<Lanes>>,
        #[cfg(target_arch = "x86_64")]
        Products::Avx512 => small::<Avx512>,
        #[cfg(target_arch = "x86_64")]
        Products::RoundedAvx512 => small::<Rounded<Avx512>>,
        #[cfg(target_arch = "x86_64")]
        Products::Avx512Bf16 => small::<Avx512Bf16>,
        #[cfg(target_arch = "x86_64")]
        Products::Amx => small::<Amx>,
        // Not available elsewhere.
        #[cfg(not(target_arch = "x86_64"))]
        Products::Avx512 | Products::RoundedAvx512 | Products::Avx512Bf16 | Products::Amx => return,
    };
    // SAFETY: as above, and who makes a backend has asked whether the kernel is available.
    unsafe { kernel(shape, a, b, c, stride, accumulate, memory) }
}

/// [`product`] by `gemm`.
///
/// # Safety
/// As for `product`.
unsafe fn by_gemm(
    [rows, cols, inner]: [usize; 3],
    a: View,
    b: View,
    c: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    let (deep, tall, broad) = (cut(inner, INNER, 8), cut(rows, ROWS, 8), cut(cols, COLS, 48));
    for col in (0..cols).step_by(broad) {
        let n = broad.min(cols - col);
        for row in (0..rows).step_by(tall) {
            let m = tall.min(rows - row);
            let c = c.wrapping_add(row * stride + col);
            let mut k = 0;
            loop {
                let part = deep.min(inner - k);
                let (a, b) = (a.at(row, k), b.at(k, col));
                // SAFETY: a part of what the caller promises.
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        part,
                        c,
                        1,
                        stride as isize,
                        accumulate || k > 0,
                        a.start,
                        a.col as isize,
                        a.row as isize,
                        b.start,
                        b.col as isize,
                        b.row as isize,
                        1.0,
                        1.0,
                        false,
                        false,
                        false,
                        Parallelism::None,
                    );
                }
                k += part;
                if k >= inner {
                    break;
                }
            }
        }
    }
}

/// The precision of matrix products. Everything else is `f32`, sums and weights included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Precision {
    /// `f32` throughout.
    #[default]
    F32,
    /// Factors rounded to bf16 while they are packed.
    Bf16,
}

/// How the products of layers are computed: each gives the same bits for any number of threads, and
/// other bits than the next one.
///
/// The kinds for bf16 multiply the same rounded factors exactly, and differ in sums: those of AMX
/// and AVX512-BF16 add two terms at a time in an order of their own, and take and leave 0 for what
/// is below the range of normal numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Products {
    /// By the `gemm` crate, which chooses its kernels at run time: for a build without fused
    /// multiply-add. It allocates within a product. Whether there is memory is asked before the
    /// first one; where several threads are refused memory later, the program ends.
    Gemm,
    /// Packed operands and the lanes that the program was compiled for.
    Lanes,
    /// Packed operands and AVX-512.
    Avx512,
    /// bf16 by AMX.
    Amx,
    /// bf16 by AVX512-BF16.
    Avx512Bf16,
    /// [`Avx512`](Self::Avx512) of factors rounded to bf16.
    RoundedAvx512,
    /// [`Lanes`](Self::Lanes) of factors rounded to bf16.
    RoundedLanes,
}

impl Products {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Gemm,
        Self::Lanes,
        Self::Avx512,
        Self::Amx,
        Self::Avx512Bf16,
        Self::RoundedAvx512,
        Self::RoundedLanes,
    ];

    /// The precision of the factors.
    pub const fn precision(self) -> Precision {
        match self {
            Self::Gemm | Self::Lanes | Self::Avx512 => Precision::F32,
            Self::Amx | Self::Avx512Bf16 | Self::RoundedAvx512 | Self::RoundedLanes => {
                Precision::Bf16
            }
        }
    }

    /// Whether this processor has what it needs.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        use std::is_x86_feature_detected as has;
        match self {
            Self::Gemm | Self::Lanes | Self::RoundedLanes => true,
            Self::Avx512 | Self::RoundedAvx512 => has!("avx512f"),
            Self::Avx512Bf16 => has!("avx512f") && has!("avx512bw") && has!("avx512bf16"),
            Self::Amx => Self::Avx512Bf16.is_available() && super::packed::amx::is_available(),
        }
    }

    /// Whether this processor has what it needs.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        matches!(self, Self::Gemm | Self::Lanes | Self::RoundedLanes)
    }

    /// The fastest one here.
    pub fn best(precision: Precision) -> Self {
        let order: &[Self] = match precision {
            Precision::F32 if cfg!(any(target_feature = "fma", target_arch = "aarch64")) => {
                &[Self::Avx512, Self::Lanes]
            }
            Precision::F32 => &[Self::Avx512, Self::Gemm],
            // Intel's processors compute `vdpbf16ps` at half the rate of FMA, which has half its
            // terms.
            Precision::Bf16 if crate::processor::is_intel() => {
                &[Self::Amx, Self::RoundedAvx512, Self::RoundedLanes]
            }
            Precision::Bf16 => {
                &[Self::Amx, Self::Avx512Bf16, Self::RoundedAvx512, Self::RoundedLanes]
            }
        };
        order.iter().copied().find(|p| p.is_available()).unwrap_or(Self::Lanes)
    }

    /// For [`Identity`](bdia_core::backend::Identity): the name of a backend that multiplies so.
    pub(crate) const fn identity(self) -> &'static str {
        match self {
            Self::Gemm => "cpu gemm",
            Self::Lanes => "cpu",
            Self::Avx512 => "cpu avx512",
            Self::Amx => "cpu-bf16 amx",
            Self::Avx512Bf16 => "cpu-bf16 avx512-bf16",
            Self::RoundedAvx512 => "cpu-bf16 rounded avx512",
            Self::RoundedLanes => "cpu-bf16 rounded",
        }
    }
}

/// Values of packing memory that [`matmul`] needs.
pub(crate) fn scratch(threads: usize) -> usize {
    super::packed::scratch(threads)
}

/// The part of them that is one thread's.
///
/// # Safety
/// As long as it lives, nothing else uses the memory of this slot.
#[expect(clippy::mut_from_ref, reason = "the caller promises that slots are disjoint")]
pub(crate) unsafe fn own_scratch<'a>(memory: &'a Shared<f32>, slot: usize) -> &'a mut [f32] {
    use super::packed::{OWN, SHARED};
    // SAFETY: the caller's promise.
    unsafe { memory.part(SHARED + slot * OWN, OWN) }
}

/// `C (+)= A·B (+ bias)` for dense `c`, over the threads; `memory` holds [`scratch`] values.
pub(crate) fn matmul(
    team: &Team,
    products: Products,
    shape: [usize; 3],
    a: View,
    b: View,
    bias: Option<&[f32]>,
    c: &mut [f32],
    accumulate: bool,
    memory: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    use super::packed::{amx::Amx, avx512::Avx512, bf16::Avx512Bf16};
    use super::packed::{lanes::Lanes, product, rounded::Rounded};
    let kernel = match products {
        Products::Gemm => return tiles(team, shape, a, b, bias, c, accumulate),
        Products::Lanes => product::<Lanes>,
        Products::RoundedLanes => product::<Rounded<Lanes>>,
        #[cfg(target_arch = "x86_64")]
        Products::Avx512 => product::<Avx512>,
        #[cfg(target_arch = "x86_64")]
        Products::RoundedAvx512 => product::<Rounded<Avx512>>,
        #[cfg(target_arch = "x86_64")]
        Products::Avx512Bf16 => product::<Avx512Bf16>,
        #[cfg(target_arch = "x86_64")]
        Products::Amx => product::<Amx>,
        // Not available elsewhere.
        #[cfg(not(target_arch = "x86_64"))]
        Products::Avx512 | Products::RoundedAvx512 | Products::Avx512Bf16 | Products::Amx => return,
    };
    // SAFETY: who makes a backend has asked whether the kernel is available.
    unsafe { kernel(team, shape, a, b, bias, c, accumulate, memory) }
}

/// [`matmul`] by `gemm`, in tiles.
fn tiles(
    team: &Team,
    [rows, cols, inner]: [usize; 3],
    a: View,
    b: View,
    bias: Option<&[f32]>,
    c: &mut [f32],
    accumulate: bool,
) {
    // Smaller tiles where there are few, so that every thread has some; not so small that packing
    // them costs more than it gains.
    let (mut most_rows, mut most_cols) = (ROWS, COLS);
    let count = |r: usize, c: usize| rows.div_ceil(r) * cols.div_ceil(c);
    while count(most_rows, most_cols) < 32 && (most_rows > 256 || most_cols > 192) {
        if most_rows > 256 {
            most_rows /= 2;
        } else {
            most_cols /= 2;
        }
    }
    let (tall, broad) = (cut(rows, most_rows, 8), cut(cols, most_cols, 48));
    let (down, across) = (rows.div_ceil(tall), cols.div_ceil(broad));
    let c = Shared::new(c);
    team.each(down * across, |_, tile| {
        let (row, col) = (tile / across * tall, tile % across * broad);
        let (m, n) = (tall.min(rows - row), broad.min(cols - col));
        if let Some(bias) = bias {
            let bias = &bias[col..col + n];
            for r in row..row + m {
                // SAFETY: tiles are disjoint.
                let c = unsafe { c.part(r * cols + col, n) };
                if accumulate {
                    c.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
                } else {
                    c.copy_from_slice(bias);
                }
            }
        }
        let start = c.pointer().wrapping_add(row * cols + col);
        // SAFETY: the caller's slices have these shapes, and tiles of `C` are disjoint.
        unsafe {
            by_gemm(
                [m, n, inner],
                a.at(row, 0),
                b.at(0, col),
                start,
                cols,
                accumulate || bias.is_some(),
            )
        }
    });
}
