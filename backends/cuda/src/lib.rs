#![doc = include_str!("../README.md")]

pub mod compile;
mod custom;
mod device;
mod error;
mod launch;
mod library;
mod nn;
mod optim;
mod products;
mod span;
mod status;
mod update;

use std::sync::{Mutex, PoisonError};

use bdia_core::backend::Identity;
use bdia_core::check::{Arenas, same};
use bdia_core::{Error, Fault, Ints, Layout, Reals, Result, Site, Storage, Words};

use device::{Device, Kernel, Memory, THREADS, arg};
use span::{Report, Span, Status};
use status::{Cause, Code, NONE};

pub use custom::{Arg, CustomKernel};
pub use device::{Time, Times};
pub use error::CudaError;
pub use products::Precision;

/// Bytes for partial sums.
const SCRATCH: usize = 4 << 20;
/// Bytes for the factors of one product as bf16: those of GPT-2 up to 774M, head and all.
const HALF: usize = 320 << 20;

/// Where a backend runs, and how it multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Number of the device, as the driver counts.
    pub device: usize,
    /// Precision of matrix products.
    pub precision: Precision,
}

/// The backend: three arenas in a device's memory, and one stream of work.
#[derive(Debug)]
pub struct Cuda {
    device: Device,
    /// For [`Identity`]: precision, device, architecture.
    name: &'static str,
    arenas: Arenas,
    ints: Memory,
    reals: Memory,
    words: Memory,
    status: Memory,
    scratch: Memory,
    /// Blocks of the sum under way that are done: 0 between sums.
    finished: Memory,
    /// Room for the factors of a product as bf16 ([`products::Room`] says what stands where).
    half: Memory,
    /// Number of the next operation that may raise a fault.
    seq: u32,
    /// The fault that the host raised first since the status was read, and its number.
    raised: Option<(u32, Fault)>,
    /// Why a fault could not be raised, for the next one who asks.
    lost: Option<Error>,
}

impl Cuda {
    /// A backend with the arenas of a layout, all zero.
    ///
    /// # Errors
    /// [`CudaError`]: a library or the device is missing, the kernels do not compile, or the plan does not fit.
    pub fn new(layout: &Layout, options: Options) -> core::result::Result<Self, CudaError> {
        let arenas = Arenas::of(layout);
        let half = if options.precision == Precision::Bf16 { HALF } else { 0 };
        let [ints, reals, words] =
            [arenas.ints, arenas.reals, arenas.words].map(|n| n.saturating_mul(4));
        let library = Self::library_bytes(options.precision);
        let bytes = [ints, reals, words].iter().fold(library, |sum, &b| sum.saturating_add(b));
        let mut device =
            Device::open(options.device, options.precision, bytes, layout.total().max(bytes))?;
        let [ints, reals, words] = [device.alloc(ints), device.alloc(reals), device.alloc(words)];
        let [status, scratch, half] =
            [device.alloc(size_of::<Status>()), device.alloc(SCRATCH), device.alloc(half)];
        let finished = device.alloc(4);
        let call =
            |_| CudaError::Call { what: "cuMemsetD8Async", error: "the status could not be set" };
        device.set(status.at, 0xFF, status.bytes).map_err(call)?;
        let short = match options.precision {
            Precision::F32 => String::new(),
            other => format!("-{}", other.name()),
        };
        let name = interned(format!("cuda{short} {} sm_{}", device.name(), device.capability()));
        let (seq, raised, lost) = (0, None, None);
        device.furnish(half);
        Ok(Self {
            device,
            name,
            arenas,
            ints,
            reals,
            words,
            status,
            scratch,
            finished,
            half,
            seq,
            raised,
            lost,
        })
    }

    /// Memory outside the arenas of a layout: the fixed workspace of cuBLASLt, room for partial
    /// sums and bf16 factors, the status, gaps between them. It does not depend on the model. The
    /// driver's own context (some hundred MB, for kernels and its queues) is not in it.
    pub const fn library_bytes(precision: Precision) -> usize {
        let half = if matches!(precision, Precision::Bf16) { HALF } else { 0 };
        // Each of the arenas begins at a multiple, and so does what follows the status.
        products::WORKSPACE
            + SCRATCH
            + half
            + 3 * device::ALIGNMENT
            + size_of::<Status>().next_multiple_of(device::ALIGNMENT)
            + device::ALIGNMENT
    }

    /// The device's name.
    pub fn device_name(&self) -> &str {
        self.device.name()
    }

    /// Compute capability of the device, `10·major + minor`.
    pub fn capability(&self) -> u32 {
        self.device.capability()
    }

    /// Bytes that this backend has allocated on the device, all of them when it was made.
    pub fn allocated_bytes(&self) -> usize {
        self.device.allocated()
    }

    /// The same by the driver's count of free memory, before and after: the driver hands out whole
    /// pages, of 2 MiB each.
    pub fn taken_bytes(&self) -> usize {
        self.device.taken()
    }

    /// From here on the time of everything that the device does is taken, with two events each,
    /// until [`times`](Self::times) is asked for.
    pub fn take_times(&mut self) {
        self.device.take_times();
    }

    /// Waits for all work and gives what was done since [`take_times`](Self::take_times), by name,
    /// in the order in which each came first; products have their shape in the name.
    ///
    /// # Errors
    /// [`CudaError::Call`]
    pub fn times(&mut self) -> core::result::Result<Times, CudaError> {
        self.device.times()
    }

    /// Bytes free on the device, and all that it has, as the driver says.
    ///
    /// # Errors
    /// [`CudaError::Call`]
    pub fn device_memory(&self) -> core::result::Result<(usize, usize), CudaError> {
        self.device.memory()
    }

    // Spans of checked handles: addresses inside the arenas.

    fn reals(&self, h: Reals) -> Span {
        span(self.reals, h.start(), h.len())
    }

    fn ints(&self, h: Ints) -> Span {
        span(self.ints, h.start(), h.len())
    }

    fn words(&self, h: Words) -> Span {
        span(self.words, h.start(), h.len())
    }

    /// What the next operation reports with.
    fn report(&mut self, cause: Cause) -> Report {
        let seq = self.seq;
        // It stands at the last number until the status is read: then the later ones of two faults
        // may stay.
        self.seq = seq.saturating_add(1).min(NONE - 1);
        cause.report(self.status.at, seq)
    }

    /// Waits for the work before it.
    fn status(&self) -> Result<Status> {
        let mut status = [Status {
            owner: NONE,
            code: 0,
            site_kind: 0,
            frac_bits: 0,
            site: 0,
            first: 0,
            per: 0,
            vocab: 0,
            detail: 0,
        }];
        self.device.read(self.status.at, &mut status)?;
        Ok(status[0])
    }

    fn fill(&self, dst: Span, bits: u32) -> Result<()> {
        self.device.launch(
            Kernel::Fill,
            nn::streamed(dst.len),
            THREADS,
            &mut [arg(&dst), arg(&bits)],
        )
    }
}

/// The same text for the rest of the program, once for each that differs: an [`Identity`] is plain
/// data.
fn interned(name: String) -> &'static str {
    static ALL: Mutex<Vec<&'static str>> = Mutex::new(vec![]);
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = all.iter().find(|known| **known == name) {
        return known;
    }
    let known: &'static str = name.leak();
    all.push(known);
    known
}

/// `len` values of four bytes from the `start`-th on.
fn span(memory: Memory, start: usize, len: usize) -> Span {
    if len == 0 { Span::EMPTY } else { Span { at: memory.at + 4 * start as u64, len: len as u64 } }
}

impl Storage for Cuda {
    type Real = f32;

    fn identity(&self) -> Identity {
        Identity { name: self.name, lanes: 32, fused: true }
    }

    fn read_reals(&self, src: Reals, dst: &mut [f32]) -> Result<()> {
        same("read_reals", src.len(), dst.len())?;
        self.arenas.reals("read_reals", src)?;
        self.device.read(self.reals(src).at, dst)
    }

    fn write_reals(&mut self, dst: Reals, src: &[f32]) -> Result<()> {
        same("write_reals", dst.len(), src.len())?;
        self.arenas.reals("write_reals", dst)?;
        self.device.write(self.reals(dst).at, src)
    }

    fn read_ints(&self, src: Ints, dst: &mut [i32]) -> Result<()> {
        same("read_ints", src.len(), dst.len())?;
        self.arenas.ints("read_ints", src)?;
        self.device.read(self.ints(src).at, dst)
    }

    fn write_ints(&mut self, dst: Ints, src: &[i32]) -> Result<()> {
        same("write_ints", dst.len(), src.len())?;
        self.arenas.ints("write_ints", dst)?;
        self.device.write(self.ints(dst).at, src)
    }

    fn read_words(&self, src: Words, dst: &mut [u32]) -> Result<()> {
        same("read_words", src.len(), dst.len())?;
        self.arenas.words("read_words", src)?;
        self.device.read(self.words(src).at, dst)
    }

    fn write_words(&mut self, dst: Words, src: &[u32]) -> Result<()> {
        same("write_words", dst.len(), src.len())?;
        self.arenas.words("write_words", dst)?;
        self.device.write(self.words(dst).at, src)
    }

    fn fill_reals(&mut self, dst: Reals, value: f32) -> Result<()> {
        self.arenas.reals("fill_reals", dst)?;
        self.fill(self.reals(dst), value.to_bits())
    }

    fn fill_words(&mut self, dst: Words, value: u32) -> Result<()> {
        self.arenas.words("fill_words", dst)?;
        self.fill(self.words(dst), value)
    }

    fn copy_reals(&mut self, src: Reals, dst: Reals) -> Result<()> {
        self.arenas.copy_reals(src, dst)?;
        self.device.copy(self.reals(src).at, self.reals(dst).at, 4 * src.len())
    }

    fn copy_ints(&mut self, src: Ints, dst: Ints) -> Result<()> {
        self.arenas.copy_ints(src, dst)?;
        self.device.copy(self.ints(src).at, self.ints(dst).at, 4 * src.len())
    }

    fn raise(&mut self, fault: Fault) {
        let report = self.report(Cause::new(Code::Host, Site::Head));
        self.raised.get_or_insert((report.seq, fault));
        if let Err(error) = self.device.launch(Kernel::Raise, [1, 1, 1], 32, &mut [arg(&report)]) {
            self.lost.get_or_insert(error);
        }
    }

    fn take_fault(&mut self) -> Result<Option<Fault>> {
        let fault = self.peek_fault()?;
        if fault.is_some() {
            self.device.set(self.status.at, 0xFF, self.status.bytes)?;
        }
        // Numbers start anew: all work before is done.
        (self.seq, self.raised) = (0, None);
        Ok(fault)
    }

    fn clear_fault(&mut self) -> Result<()> {
        if let Some(error) = self.lost.take() {
            return Err(error);
        }
        // What is queued reports before it is cleared, so numbers may start anew.
        (self.seq, self.raised) = (0, None);
        self.device.set(self.status.at, 0xFF, self.status.bytes)
    }

    fn peek_fault(&mut self) -> Result<Option<Fault>> {
        if let Some(error) = self.lost.take() {
            return Err(error);
        }
        // Nothing was queued since there was none: it is known without waiting.
        if !self.device.worked() {
            return Ok(None);
        }
        let fault = status::fault(&self.status()?, self.raised);
        if fault.is_none() {
            self.device.rested();
        }
        Ok(fault)
    }
}
