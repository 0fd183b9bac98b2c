//! Products of matrices: cuBLASLt, and the room in which their factors stand as bf16.

use core::ffi::{c_int, c_void};

use bdia_core::{Error, Result};
use cudarc::cublaslt::{result, sys};

use crate::error::CudaError;
use crate::span::Span;

/// Bytes that cuBLASLt may use within a product: a fixed workspace, so that the same product gives
/// the same bits.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// How products are computed. The grid, its updates and all sums stay as they are: exactness does
/// not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// `f32` throughout.
    #[default]
    F32,
    /// Factors rounded to TF32 (10 bits of fraction), sums in `f32`.
    Tf32,
    /// Factors rounded to bf16 (7 bits of fraction), sums in `f32`. Master weights stay `f32`.
    Bf16,
}

impl Precision {
    /// As flags and reports write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        }
    }
}

/// A matrix product of column-major matrices, as cuBLAS has it: `C[m, n] = A·B + beta·C`, plus
/// `bias[m]` in every column.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Address and leading dimension, and whether the matrix is transposed.
    pub a: (u64, usize, bool),
    pub b: (u64, usize, bool),
    pub c: (u64, usize),
    /// Whether C is added to.
    pub add: bool,
    pub bias: Option<u64>,
    /// A and B are bf16.
    pub half: bool,
}

/// What the choice of an algorithm depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    sizes: [usize; 6],
    transposed: [bool; 2],
    add: bool,
    bias: bool,
    half: bool,
    alignments: [u32; 3],
}

/// A product with its algorithm, chosen when its shape is seen first.
struct Prepared {
    key: Key,
    product: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // SAFETY: each was made by `Lt::prepare` and is destroyed once; there is nothing to do
        // about failures here.
        unsafe {
            let _ = result::destroy_matmul_desc(self.product);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}

/// cuBLASLt for one device.
pub(crate) struct Lt {
    handle: sys::cublasLtHandle_t,
    precision: Precision,
    /// Address of [`WORKSPACE`] bytes.
    workspace: u64,
    prepared: Vec<Prepared>,
}

fn name(e: result::CublasError) -> &'static str {
    use sys::cublasStatus_t as S;
    match e.0 {
        S::CUBLAS_STATUS_NOT_INITIALIZED => "CUBLAS_STATUS_NOT_INITIALIZED",
        S::CUBLAS_STATUS_ALLOC_FAILED => "CUBLAS_STATUS_ALLOC_FAILED",
        S::CUBLAS_STATUS_INVALID_VALUE => "CUBLAS_STATUS_INVALID_VALUE",
        S::CUBLAS_STATUS_ARCH_MISMATCH => "CUBLAS_STATUS_ARCH_MISMATCH",
        S::CUBLAS_STATUS_EXECUTION_FAILED => "CUBLAS_STATUS_EXECUTION_FAILED",
        S::CUBLAS_STATUS_NOT_SUPPORTED => "CUBLAS_STATUS_NOT_SUPPORTED",
        _ => "a cuBLAS error",
    }
}

fn failed(e: result::CublasError) -> Error {
    Error::Device(name(e))
}

/// The power of two that an address is a multiple of, up to what cuBLASLt asks about.
fn alignment(at: u64) -> u32 {
    1 << at.trailing_zeros().min(8)
}

/// Sets an attribute of a product.
fn set<T>(
    product: sys::cublasLtMatmulDesc_t,
    what: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: the product is there; the value has the attribute's type, by the callers below.
    unsafe {
        result::set_matmul_desc_attribute(product, what, (&raw const value).cast(), size_of::<T>())
    }
    .map_err(failed)
}

impl Lt {
    /// For the current context.
    pub(crate) fn new(
        precision: Precision,
        workspace: u64,
    ) -> core::result::Result<Self, CudaError> {
        let handle = result::create_handle()
            .map_err(|e| CudaError::Call { what: "cublasLtCreate", error: name(e) })?;
        Ok(Self { handle, precision, workspace, prepared: vec![] })
    }

    fn prepare(&self, key: Key) -> Result<Prepared> {
        use sys::cublasComputeType_t as Compute;
        use sys::cublasLtMatmulDescAttributes_t as A;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        use sys::cudaDataType as Type;
        let [m, n, k, lda, ldb, ldc] = key.sizes;
        let factors = if key.half { Type::CUDA_R_16BF } else { Type::CUDA_R_32F };
        let compute = match self.precision {
            _ if key.half => Compute::CUBLAS_COMPUTE_32F,
            Precision::F32 => Compute::CUBLAS_COMPUTE_32F,
            Precision::Tf32 => Compute::CUBLAS_COMPUTE_32F_FAST_TF32,
            Precision::Bf16 => Compute::CUBLAS_COMPUTE_32F_FAST_16BF,
        };
        let layout = |of, rows: usize, cols: usize, ld: usize| {
            let ld = i64::try_from(ld).map_err(|_| Error::TooLarge("matrix product"))?;
            result::create_matrix_layout(of, rows as u64, cols as u64, ld).map_err(failed)
        };
        let turned = |transposed, [rows, cols]: [usize; 2]| {
            if transposed { [cols, rows] } else { [rows, cols] }
        };
        let product = result::create_matmul_desc(compute, Type::CUDA_R_32F).map_err(failed)?;
        let ([ar, ac], [br, bc]) =
            (turned(key.transposed[0], [m, k]), turned(key.transposed[1], [k, n]));
        let layouts = [
            layout(factors, ar, ac, lda)?,
            layout(factors, br, bc, ldb)?,
            layout(Type::CUDA_R_32F, m, n, ldc)?,
        ];
        let mut new = Prepared {
            key,
            product,
            layouts,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        // `CUBLAS_OP_N` is 0, `CUBLAS_OP_T` is 1.
        set(product, A::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(key.transposed[0]))?;
        set(product, A::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(key.transposed[1]))?;
        if key.bias {
            set(
                product,
                A::CUBLASLT_MATMUL_DESC_EPILOGUE,
                sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            )?;
        }
        let wishes = result::create_matmul_pref().map_err(failed)?;
        let [a, b, c] = key.alignments;
        let wish = |what, value: *const c_void, bytes| {
            // SAFETY: the wishes are there; the values have the attributes' types.
            unsafe { result::set_matmul_pref_attribute(wishes, what, value, bytes) }.map_err(failed)
        };
        let found = wish(
            P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const WORKSPACE_BYTES).cast(),
            size_of_val(&WORKSPACE_BYTES),
        )
        .and_then(|()| {
            wish(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, (&raw const a).cast(), 4)
        })
        .and_then(|()| {
            wish(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, (&raw const b).cast(), 4)
        })
        .and_then(|()| {
            wish(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, (&raw const c).cast(), 4)
        })
        .and_then(|()| {
            wish(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, (&raw const c).cast(), 4)
        })
        .and_then(|()| {
            let [a, b, c] = new.layouts;
            // SAFETY: all of them were made above.
            unsafe { result::get_matmul_algo_heuristic(self.handle, product, a, b, c, c, wishes) }
                .map_err(failed)
        });
        // SAFETY: made above, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(wishes) };
        new.algorithm = found?.algo;
        Ok(new)
    }

    /// Queues a product on a stream.
    pub(crate) fn gemm(&mut self, g: &Gemm, stream: *mut c_void) -> Result<()> {
        for n in [g.m, g.n, g.k, g.a.1, g.b.1, g.c.1] {
            c_int::try_from(n).map_err(|_| Error::TooLarge("matrix product"))?;
        }
        let key = Key {
            sizes: [g.m, g.n, g.k, g.a.1, g.b.1, g.c.1],
            transposed: [g.a.2, g.b.2],
            add: g.add,
            bias: g.bias.is_some(),
            half: g.half,
            alignments: [g.a.0, g.b.0, g.c.0].map(alignment),
        };
        let place = match self.prepared.iter().position(|p| p.key == key) {
            Some(place) => place,
            None => {
                let new = self.prepare(key)?;
                self.prepared.push(new);
                self.prepared.len() - 1
            }
        };
        let p = &self.prepared[place];
        if let Some(bias) = g.bias {
            set(
                p.product,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                bias,
            )?;
        }
        let (alpha, beta) = (1.0_f32, if g.add { 1.0_f32 } else { 0.0 });
        let [a, b, c] = p.layouts;
        // SAFETY: the handle is there; callers pass matrices inside their allocations; the factors
        // lie on this stack, where cuBLASLt reads them before it returns.
        unsafe {
            result::matmul(
                self.handle,
                p.product,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                g.a.0 as *const c_void,
                a,
                g.b.0 as *const c_void,
                b,
                g.c.0 as *const c_void,
                c,
                g.c.0 as *mut c_void,
                c,
                &raw const p.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(failed)
    }
}

/// As cuBLASLt takes it.
static WORKSPACE_BYTES: usize = WORKSPACE;

impl Drop for Lt {
    fn drop(&mut self) {
        self.prepared.clear();
        // SAFETY: made by `new`, destroyed once, after the stream was waited for.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Rows and columns of a factor as bf16: rows begin at multiples of 16 bytes, which tensor cores
/// read from, and the inner size of a product is a multiple of 8 for both of its factors. What is
/// beyond the values is 0.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(8)
}

/// A factor: a matrix in memory, by its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Factor {
    pub at: u64,
    pub rows: usize,
    pub cols: usize,
}

impl Factor {
    /// Bytes as bf16.
    fn bytes(&self) -> usize {
        2 * padded(self.rows).saturating_mul(padded(self.cols))
    }

    fn overlaps(&self, x: Span) -> bool {
        let end = self.at + 4 * (self.rows * self.cols) as u64;
        self.at < x.at + 4 * x.len && x.at < end
    }
}

/// A factor that stands in the room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    factor: Factor,
    /// Bytes from the room's beginning.
    at: usize,
}

/// Where the factors of one product stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Address of each, and whether it has yet to be written.
    pub factors: [(u64, bool); 2],
    /// Address of the result's room.
    pub result: u64,
}

/// The room for factors as bf16. What was put there for one product stays for the next, until its
/// matrix is written to.
#[derive(Debug)]
pub(crate) struct Room {
    at: u64,
    bytes: usize,
    kept: Vec<Kept>,
}

impl Room {
    /// Pieces begin at multiples of this.
    const ALIGNMENT: usize = 256;

    pub(crate) const fn new(at: u64, bytes: usize) -> Self {
        Self { at, bytes, kept: vec![] }
    }

    /// Nothing stays.
    pub(crate) fn clear(&mut self) {
        self.kept.clear();
    }

    /// Memory is written to.
    pub(crate) fn forget(&mut self, written: Span) {
        self.kept.retain(|k| !k.factor.overlaps(written));
    }

    /// Places for two factors and `result` bytes, or nothing where there is too little room: a
    /// matter of sizes alone.
    pub(crate) fn place(&mut self, factors: [Factor; 2], result: usize) -> Option<Placed> {
        for attempt in 0..3 {
            match attempt {
                0 => {}
                1 => self.kept.retain(|k| factors.contains(&k.factor)),
                _ => self.kept.clear(),
            }
            let mut kept = self.kept.clone();
            if let Some(placed) = self.fit(&mut kept, factors, result) {
                self.kept = kept;
                return Some(placed);
            }
        }
        None
    }

    fn fit(&self, kept: &mut Vec<Kept>, factors: [Factor; 2], result: usize) -> Option<Placed> {
        let mut places = [(0, false); 2];
        for (place, factor) in places.iter_mut().zip(factors) {
            let old = kept.iter().find(|k| k.factor == factor).map(|k| k.at);
            let at = match old {
                Some(at) => at,
                None => {
                    let at = self.gap(kept, factor.bytes())?;
                    kept.push(Kept { factor, at });
                    at
                }
            };
            *place = (self.at + at as u64, old.is_none());
        }
        Some(Placed { factors: places, result: self.at + self.gap(kept, result)? as u64 })
    }

    /// The first place that has `bytes` bytes.
    fn gap(&self, kept: &mut [Kept], bytes: usize) -> Option<usize> {
        kept.sort_by_key(|k| k.at);
        let mut at = 0;
        for k in kept.iter() {
            if k.at - at >= bytes {
                return Some(at);
            }
            at = (k.at + k.factor.bytes()).next_multiple_of(Self::ALIGNMENT);
        }
        (at.saturating_add(bytes) <= self.bytes).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(at: u64, rows: usize, cols: usize) -> Factor {
        Factor { at, rows, cols }
    }

    #[test]
    fn what_was_placed_stays_until_it_is_written() {
        let mut room = Room::new(1 << 20, 4096);
        let (a, b, c) = (factor(0, 8, 16), factor(4096, 16, 9), factor(8192, 8, 8));
        let first = room.place([a, b], 100).unwrap_or_else(|| panic!("there is room"));
        // 256 bytes of a, 16·16·2 of b.
        assert_eq!(
            first,
            Placed { factors: [(1 << 20, true), ((1 << 20) + 256, true)], result: (1 << 20) + 768 }
        );
        let second = room.place([c, b], 0).unwrap_or_else(|| panic!("there is room"));
        assert_eq!(second.factors, [((1 << 20) + 768, true), ((1 << 20) + 256, false)]);
        // The last value of b.
        room.forget(Span { at: 4096 + 4 * 143, len: 1 });
        let third = room.place([a, b], 0).unwrap_or_else(|| panic!("there is room"));
        assert_eq!(third.factors, [(1 << 20, false), ((1 << 20) + 256, true)]);
        room.forget(Span { at: 4096 + 4 * 144, len: 10 });
        assert!(
            !room.place([a, b], 0).is_some_and(|p| p.factors[1].1),
            "what lies behind it is not written to"
        );
    }

    #[test]
    fn what_finds_room_depends_on_sizes_alone() {
        let mut room = Room::new(0, 2304);
        let small = |i: u64| factor(1 << (20 + i), 8, 16);
        // Pieces here and there.
        for i in 0..7 {
            assert!(room.place([small(i), small(i + 1)], 0).is_some());
        }
        let (wide, high) = (factor(5, 8, 64), factor(6, 64, 8));
        assert!(
            room.place([small(4), wide], 1024).is_some(),
            "256 + 1024 + 1024 bytes, once others have left"
        );
        assert_eq!(room.place([wide, high], 257), None);
        assert!(room.place([wide, wide], 0).is_some_and(|p| p.factors[0].0 == p.factors[1].0));
    }
}
