//! The CPU backend of [`bdia_core`]: SIMD lanes (`wide`), threads (`rayon`), packed matrix products
//! in `f32` or of factors as bf16.
//!
//! ```
//! use bdia_core::{Category, Layout, Storage};
//! use bdia_cpu::{Cpu, require_cpu};
//!
//! require_cpu()?; // first thing in every program
//! let mut layout = Layout::new(size_of::<f32>());
//! let x = layout.reals(Category::Workspace, 100);
//! let mut cpu = Cpu::new(&layout, 0)?; // 0: as many threads as there are cores
//! cpu.write_reals(x, &[1.0; 100])?;
//! assert_eq!(cpu.reals(x)?[99], 1.0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it keeps
//! * **The same bits for any number of threads.** Work is cut into pieces by the shape of the
//!   operands alone, and partial sums are combined in the order of the pieces. Bits do depend on
//!   the build (lanes, fused multiply-add) and on the processor's instruction sets, through
//!   [`Products`]: [`Cpu::with_precision`] takes the fastest kind of a precision.
//! * [`UpdateOps`](bdia_core::UpdateOps) give the bits of the reference backend, everywhere.
//! * **No allocation within an operation**, except the memory for packed operands, which the first
//!   matrix product makes, and the packing buffers of `gemm`; [`Cpu::library_bytes`] bounds both.
//! * A bad handle or length is an [`Error`], never a panic.
//! * **Operations of one's own** run on its threads and its memory: [`Cpu::each_part`].
//!
//! # Which processors
//! `wide` chooses its lanes when it is compiled. A workspace that depends on this crate should
//! compile for its own processor (`RUSTFLAGS="-C target-cpu=native"`, or `x86-64-v3` for any with
//! AVX2 and FMA); a plain build works with half the lanes. [`require_cpu`] says in words when a
//! processor is too old for a build.

mod memory;
mod nn;
mod optim;
mod parts;
mod processor;
mod simd;
mod update;

use core::fmt;
use core::ops::Range;
use std::sync::Arc;

use bdia_core::backend::Identity;
use bdia_core::check::{Arenas, overlap, same};
use bdia_core::{Error, ErrorKind, Fault, Ints, Layout, LayoutId, Reals, Result, Storage, Words};
use rayon::prelude::*;

use memory::{Arena, Reserved, get, get_mut, split};

pub use nn::matmul::{Precision, Products};
pub use parts::{Inputs, Values};
pub use processor::require_cpu;

/// Elements of one piece of element-wise work: 64 KiB, half of an L2 cache with a few operands, and
/// a multiple of 32.
const BLOCK: usize = 1 << 14;

/// Why there is no backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuError {
    /// The program was compiled for instructions that this processor does not have.
    Processor {
        /// The first one that is missing.
        missing: &'static str,
    },
    /// The processor cannot multiply as it was asked to.
    Products {
        /// How.
        asked: Products,
    },
    /// The operating system has not enough memory.
    Memory {
        /// Size of what was asked for.
        bytes: usize,
    },
    /// More than [`Cpu::MAX_THREADS`].
    TooManyThreads {
        /// How many were asked for.
        threads: usize,
    },
    /// The threads could not be started.
    Threads {
        /// How many were asked for.
        threads: usize,
    },
}

impl fmt::Display for CpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Processor { missing } => write!(
                f,
                "this program was compiled for processors with {missing}, which this one does not \
                 have; rebuild it here \
                 with RUSTFLAGS=\"-C target-cpu=native\" cargo build --release"
            ),
            Self::Products { asked } => {
                write!(
                    f,
                    "this processor has no instructions for products of kind {asked:?}; ask for \
                     another kind"
                )
            }
            Self::Memory { .. } | Self::TooManyThreads { .. } => Error::from(*self).fmt(f),
            Self::Threads { threads } => {
                write!(f, "{threads} threads could not be started; ask for fewer")
            }
        }
    }
}

impl core::error::Error for CpuError {}

impl CpuError {
    /// What the error is about: the same as that of the [`Error`] it becomes.
    pub const fn kind(self) -> ErrorKind {
        match self {
            Self::Processor { .. } | Self::Threads { .. } => ErrorKind::Device,
            Self::Products { .. } | Self::TooManyThreads { .. } => ErrorKind::Argument,
            Self::Memory { .. } => ErrorKind::Memory,
        }
    }
}

impl From<CpuError> for Error {
    fn from(e: CpuError) -> Self {
        match e {
            CpuError::Processor { .. } => {
                Self::Device("the processor lacks instructions that this program was compiled for")
            }
            CpuError::Products { asked } => {
                Self::unfit("products", asked.identity(), "those that this processor can compute")
            }
            CpuError::Memory { bytes } => Self::Memory { bytes },
            CpuError::TooManyThreads { threads } => {
                Self::setting("threads", threads as f64, "1 to 1024, or 0 for as many as cores")
            }
            CpuError::Threads { .. } => Self::Device("the threads could not be started"),
        }
    }
}

/// The threads, and how work is spread over them.
#[derive(Debug)]
struct Team {
    /// None for a single thread: the caller's.
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Team {
    /// Starts the threads. One that gets no memory on its way ends the program, so what all of them
    /// need is set aside before, and given back to one after the other; each is waited for, since
    /// allocators set a lot aside for a moment when a thread allocates for the first time.
    fn start(threads: usize) -> core::result::Result<Self, CpuError> {
        const STACK: usize = 2 << 20;
        const START: usize = 256 << 10;
        if threads == 1 {
            return Ok(Self { pool: None, threads });
        }
        let refused = CpuError::Threads { threads };
        // One more for the pool's own memory.
        let room: core::result::Result<Vec<_>, _> =
            (0..=threads).map(|_| Reserved::new(STACK + START)).collect();
        let mut room = room.map_err(|_| refused)?;
        room.pop();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).spawn_handler(|thread| {
            room.pop();
            let (started, starts) = std::sync::mpsc::channel();
            let builder = std::thread::Builder::new().name(format!("bdia-{}", thread.index()));
            builder.stack_size(STACK).spawn(move || {
                // The other end waits.
                let _ = started.send(());
                thread.run();
            })?;
            starts.recv().map_err(std::io::Error::other)
        });
        Ok(Self { pool: Some(pool.build().map_err(|_| refused)?), threads })
    }

    /// Runs `f(slot, piece)` for all pieces. Two calls that run at the same time have different
    /// slots, all of them below the number of threads.
    fn each(&self, pieces: usize, f: impl Fn(usize, usize) + Sync) {
        match &self.pool {
            Some(pool) if pieces > 1 => pool.install(|| {
                (0..pieces)
                    .into_par_iter()
                    .with_max_len(1)
                    .for_each(|piece| f(pool.current_thread_index().unwrap_or(0), piece));
            }),
            _ => (0..pieces).for_each(|piece| f(0, piece)),
        }
    }

    /// Combines `f(piece)` of all pieces. The order is not fixed: `join` must not depend on it.
    fn reduce<R: Copy + Send + Sync>(
        &self,
        pieces: usize,
        none: R,
        f: impl Fn(usize) -> R + Sync,
        join: impl Fn(R, R) -> R + Sync,
    ) -> R {
        match &self.pool {
            Some(pool) if pieces > 1 => pool.install(|| {
                (0..pieces).into_par_iter().with_max_len(1).map(&f).reduce(|| none, &join)
            }),
            _ => (0..pieces).map(f).fold(none, join),
        }
    }
}

/// The number of threads, also where 0 stands for it.
fn actual_threads(threads: usize) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, core::num::NonZero::get);
    match threads {
        0 => cores().min(Cpu::MAX_THREADS),
        n => n,
    }
}

/// The backend: three arenas, allocated once, and its own threads.
#[derive(Debug)]
pub struct Cpu {
    ints: Arena<i32>,
    reals: Arena<f32>,
    words: Arena<u32>,
    /// Memory that is given, by its place among the mapped words.
    mapped: Vec<(Range<usize>, &'static [u8])>,
    mapped_words: usize,
    /// Packed operands of matrix products; empty until there is one, which programs with blocks of
    /// their own never need.
    packing: Arena<f32>,
    layout: LayoutId,
    fault: Option<Fault>,
    team: Arc<Team>,
    products: Products,
}

impl Cpu {
    /// The most threads: more than any processor has, and few enough to start.
    pub const MAX_THREADS: usize = 1024;

    /// A backend with the arenas of a layout, all zero, and `threads` threads (0: as many as there
    /// are cores).
    ///
    /// # Errors
    /// [`CpuError`]: an unsuitable processor, not enough memory, more than
    /// [`MAX_THREADS`](Self::MAX_THREADS), or threads that cannot be started.
    pub fn new(layout: &Layout, threads: usize) -> core::result::Result<Self, CpuError> {
        Self::with_precision(layout, threads, Precision::F32)
    }

    /// As [`new`](Self::new), with the fastest products of a precision.
    ///
    /// # Errors
    /// As for `new`.
    pub fn with_precision(
        layout: &Layout,
        threads: usize,
        precision: Precision,
    ) -> core::result::Result<Self, CpuError> {
        Self::with_products(layout, threads, Products::best(precision))
    }

    /// As [`new`](Self::new), with products of one's choice, such as a test needs to see them all.
    ///
    /// # Errors
    /// As for `new`, and [`CpuError::Products`].
    pub fn with_products(
        layout: &Layout,
        threads: usize,
        products: Products,
    ) -> core::result::Result<Self, CpuError> {
        require_cpu()?;
        if !products.is_available() {
            return Err(CpuError::Products { asked: products });
        }
        let threads = actual_threads(threads);
        if threads > Self::MAX_THREADS {
            return Err(CpuError::TooManyThreads { threads });
        }
        Self::with_team(layout, Arc::new(Team::start(threads)?), products)
    }

    /// Another backend, with the arenas of another layout and a status of its own, on the same
    /// threads. For programs that hold several passes at a time, or lay memory out again for every
    /// shape they meet.
    ///
    /// # Errors
    /// [`CpuError::Memory`].
    pub fn sibling(&self, layout: &Layout) -> core::result::Result<Self, CpuError> {
        Self::with_team(layout, Arc::clone(&self.team), self.products)
    }

    fn with_team(
        layout: &Layout,
        team: Arc<Team>,
        products: Products,
    ) -> core::result::Result<Self, CpuError> {
        let (ints, reals, words) = layout.arenas();
        Ok(Self {
            ints: Arena::new(ints)?,
            reals: Arena::new(reals)?,
            words: Arena::new(words)?,
            mapped: Vec::new(),
            mapped_words: layout.mapped_words(),
            packing: Arena::new(0)?,
            layout: layout.id(),
            fault: None,
            team,
            products,
        })
    }

    fn arenas(&self) -> Arenas {
        Arenas {
            ints: self.ints.len(),
            reals: self.reals.len(),
            words: self.words.len(),
            mapped: self.mapped_words,
            layout: self.layout,
        }
    }

    /// The number of threads.
    pub fn threads(&self) -> usize {
        self.team.threads
    }

    /// A bound on the memory outside the arenas of a layout when `threads` threads (0: as many as
    /// there are cores) compute: packed operands of matrix products, and what `gemm` allocates
    /// within a call (packing buffers and one slab of the size of the L2 cache per thread). It does
    /// not depend on the model. More than [`MAX_THREADS`](Self::MAX_THREADS) count as that many.
    pub fn library_bytes(threads: usize) -> usize {
        let threads = actual_threads(threads).min(Self::MAX_THREADS);
        threads * nn::matmul::thread_bytes() + nn::matmul::scratch(threads) * size_of::<f32>()
    }

    /// The values of a handle.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena, as for the accessors below.
    pub fn reals(&self, h: Reals) -> Result<&[f32]> {
        self.arenas().reals("reals", h)?;
        get(&self.reals, h, "reals")
    }

    /// The values of a handle, to be changed.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena.
    pub fn reals_mut(&mut self, h: Reals) -> Result<&mut [f32]> {
        self.arenas().reals("reals", h)?;
        get_mut(&mut self.reals, h, "reals")
    }

    /// The integers of a handle.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena.
    pub fn ints(&self, h: Ints) -> Result<&[i32]> {
        self.arenas().ints("ints", h)?;
        get(&self.ints, h, "ints")
    }

    /// The words of a handle.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena.
    pub fn words(&self, h: Words) -> Result<&[u32]> {
        self.arenas().words("words", h)?;
        get(&self.words, h, "words")
    }

    /// The address of a handle's values, for blocks that another language computes: they read and
    /// write the arena itself, nothing is copied. Aligned to 64 bytes where the handle comes from a
    /// [`Layout`]; valid, and always the same, as long as the backend lives. An access while an
    /// operation of the backend runs is a data race.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena, or of another layout.
    pub fn reals_pointer(&mut self, h: Reals) -> Result<*mut f32> {
        self.arenas().reals("reals_pointer", h)?;
        self.reals.pointer(h).ok_or(Error::Handle("reals_pointer"))
    }

    /// As [`reals_pointer`](Self::reals_pointer).
    ///
    /// # Errors
    /// As for [`reals_pointer`](Self::reals_pointer).
    pub fn ints_pointer(&mut self, h: Ints) -> Result<*mut i32> {
        self.arenas().ints("ints_pointer", h)?;
        self.ints.pointer(h).ok_or(Error::Handle("ints_pointer"))
    }

    /// Writes values stored in half precision.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena, [`Error::Shape`] for another length.
    pub fn write_f16(&mut self, dst: Reals, src: &[half::f16]) -> Result<()> {
        self.arenas().reals("write_f16", dst)?;
        let dst = get_mut(&mut self.reals, dst, "write_f16")?;
        same("write_f16", dst.len(), src.len())?;
        dst.iter_mut().zip(src).for_each(|(d, s)| *d = s.to_f32());
        Ok(())
    }

    /// Writes values stored as `bfloat16`.
    ///
    /// # Errors
    /// [`Error::Handle`] outside the arena, [`Error::Shape`] for another length.
    pub fn write_bf16(&mut self, dst: Reals, src: &[half::bf16]) -> Result<()> {
        self.arenas().reals("write_bf16", dst)?;
        let dst = get_mut(&mut self.reals, dst, "write_bf16")?;
        same("write_bf16", dst.len(), src.len())?;
        dst.iter_mut().zip(src).for_each(|(d, s)| *d = s.to_f32());
        Ok(())
    }
}

/// Copies between slices of the same length.
fn copy<T: Copy>(what: &'static str, src: &[T], dst: &mut [T]) -> Result<()> {
    same(what, dst.len(), src.len())?;
    dst.copy_from_slice(src);
    Ok(())
}

impl Storage for Cpu {
    type Real = f32;

    fn attach(&mut self, at: Words, bytes: &'static [u8]) -> Result<()> {
        let place = self.arenas().attach(at, bytes)?;
        self.mapped.retain(|(other, _)| !overlap(other, &place));
        self.mapped.push((place, bytes));
        Ok(())
    }

    fn identity(&self) -> Identity {
        Identity {
            name: self.products.identity(),
            lanes: simd::lanes(),
            fused: cfg!(target_feature = "fma"),
        }
    }

    fn read_reals(&self, src: Reals, dst: &mut [f32]) -> Result<()> {
        self.arenas().reals("read_reals", src)?;
        copy("read_reals", get(&self.reals, src, "read_reals")?, dst)
    }

    fn write_reals(&mut self, dst: Reals, src: &[f32]) -> Result<()> {
        self.arenas().reals("write_reals", dst)?;
        copy("write_reals", src, get_mut(&mut self.reals, dst, "write_reals")?)
    }

    fn read_ints(&self, src: Ints, dst: &mut [i32]) -> Result<()> {
        self.arenas().ints("read_ints", src)?;
        copy("read_ints", get(&self.ints, src, "read_ints")?, dst)
    }

    fn write_ints(&mut self, dst: Ints, src: &[i32]) -> Result<()> {
        self.arenas().ints("write_ints", dst)?;
        copy("write_ints", src, get_mut(&mut self.ints, dst, "write_ints")?)
    }

    fn read_words(&self, src: Words, dst: &mut [u32]) -> Result<()> {
        self.arenas().words("read_words", src)?;
        copy("read_words", get(&self.words, src, "read_words")?, dst)
    }

    fn write_words(&mut self, dst: Words, src: &[u32]) -> Result<()> {
        self.arenas().words("write_words", dst)?;
        copy("write_words", src, get_mut(&mut self.words, dst, "write_words")?)
    }

    fn fill_reals(&mut self, dst: Reals, value: f32) -> Result<()> {
        self.arenas().reals("fill_reals", dst)?;
        let dst = memory::Shared::new(get_mut(&mut self.reals, dst, "fill_reals")?);
        self.team.each(dst.len().div_ceil(BLOCK), |_, b| {
            // SAFETY: blocks are disjoint.
            unsafe { dst.part(b * BLOCK, BLOCK.min(dst.len() - b * BLOCK)) }.fill(value);
        });
        Ok(())
    }

    fn fill_words(&mut self, dst: Words, value: u32) -> Result<()> {
        self.arenas().words("fill_words", dst)?;
        get_mut(&mut self.words, dst, "fill_words")?.fill(value);
        Ok(())
    }

    fn copy_reals(&mut self, src: Reals, dst: Reals) -> Result<()> {
        self.arenas().copy_reals(src, dst)?;
        let [src, dst] = split(&mut self.reals, [src, dst], "copy_reals")?;
        let (src, dst) = (&*src, memory::Shared::new(dst));
        self.team.each(src.len().div_ceil(BLOCK), |_, b| {
            let part = &src[b * BLOCK..src.len().min((b + 1) * BLOCK)];
            // SAFETY: blocks are disjoint.
            unsafe { dst.part(b * BLOCK, part.len()) }.copy_from_slice(part);
        });
        Ok(())
    }

    fn copy_ints(&mut self, src: Ints, dst: Ints) -> Result<()> {
        self.arenas().copy_ints(src, dst)?;
        let [src, dst] = split(&mut self.ints, [src, dst], "copy_ints")?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn raise(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    fn take_fault(&mut self) -> Result<Option<Fault>> {
        Ok(self.fault.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_core::Category;

    #[test]
    fn siblings_share_threads_and_nothing_else() {
        let mut layout = Layout::new(4);
        let x = layout.reals(Category::Workspace, 40_000);
        let mut a = Cpu::new(&Layout::new(4), 3).unwrap();
        let mut b = a.sibling(&layout).unwrap();
        assert!(Arc::ptr_eq(&a.team, &b.team) && b.threads() == 3);
        assert!(a.fill_reals(x, 1.0).is_err());
        b.fill_reals(x, 1.0).unwrap();
        a.raise(Fault::Loss { sample: 0, value: 1.0 });
        assert_eq!(b.take_fault().unwrap(), None);
        // The threads stay with whoever is left, and addresses are those of the arena.
        drop(a);
        b.fill_reals(x, 2.0).unwrap();
        let p = b.reals_pointer(x).unwrap();
        // SAFETY: the last value of the arena, which nothing else uses now.
        assert_eq!(unsafe { *p.add(39_999) }, 2.0);
        assert!(b.reals_pointer(Reals::new(0, 40_001)).is_err());
    }

    #[test]
    fn handles_of_another_layout_are_refused_everywhere() {
        let mut layout = Layout::new(4);
        let (x, i) = (layout.reals(Category::Workspace, 4), layout.ints(Category::Workspace, 4));
        let mut cpu = Cpu::new(&layout, 1).unwrap();
        let mut other = Layout::new(4);
        let (y, j) = (other.reals(Category::Workspace, 4), other.ints(Category::Workspace, 4));
        assert!(cpu.reals_pointer(x).is_ok() && cpu.ints_pointer(i).is_ok());
        assert_eq!(cpu.reals_pointer(y), Err(Error::Handle("reals_pointer")));
        assert_eq!(cpu.ints_pointer(j), Err(Error::Handle("ints_pointer")));
        let (f16, bf16) = ([half::f16::ONE; 4], [half::bf16::ONE; 4]);
        assert!(cpu.write_f16(x, &f16).is_ok() && cpu.write_bf16(x, &bf16).is_ok());
        assert_eq!(cpu.write_f16(y, &f16), Err(Error::Handle("write_f16")));
        assert_eq!(cpu.write_bf16(y, &bf16), Err(Error::Handle("write_bf16")));
    }

    #[test]
    fn threads_have_a_limit() {
        let layout = Layout::new(4);
        for threads in [Cpu::MAX_THREADS + 1, 1 << 40, usize::MAX] {
            let error = Cpu::new(&layout, threads).unwrap_err();
            assert_eq!(error, CpuError::TooManyThreads { threads });
            assert!(error.to_string().contains("1 to 1024"), "{error}");
            assert_eq!(Cpu::library_bytes(threads), Cpu::library_bytes(Cpu::MAX_THREADS));
        }
        assert_eq!(Cpu::MAX_THREADS, 1024, "the text says so");
        assert!(Cpu::new(&layout, 3).is_ok());
    }

    /// A mistake of the caller, memory, the machine: an adapter tells them apart by either error.
    #[test]
    fn errors_keep_their_kind() {
        for e in [
            CpuError::Processor { missing: "AVX2" },
            CpuError::Products { asked: Products::Amx },
            CpuError::Memory { bytes: 5 },
            CpuError::TooManyThreads { threads: 5000 },
            CpuError::Threads { threads: 5 },
        ] {
            assert_eq!(Error::from(e).kind(), e.kind(), "{e}");
        }
        assert_eq!(
            CpuError::Memory { bytes: 5 }.to_string(),
            Error::Memory { bytes: 5 }.to_string()
        );
        assert_eq!(CpuError::Memory { bytes: 5 }.kind(), ErrorKind::Memory);
    }
}
