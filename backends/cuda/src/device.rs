//! The device: context, stream, memory, kernels and products, through cudarc's thin layer over the
//! driver and cuBLAS.
//!
//! All work goes to one stream, in the order of the calls. Nothing waits but [`Device::read`].

use core::ffi::{CStr, c_int, c_void};
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::ffi::CString;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bdia_core::{Error, Result};
use cudarc::driver::{result, sys};

use crate::compile;
use crate::custom::{CustomKernel, Signature, Slot};
use crate::error::CudaError;
use crate::library;
use crate::products::{Gemm, Lt, Precision, Room, WORKSPACE};
use crate::span::Span;

/// Page-locked memory of the host, from which uploads go on their own while the program goes on.
/// What a step uploads fits: tokens, labels, a batch of images; more than that waits for the work
/// before it.
const STAGING: usize = 8 << 20;
/// Memory is handed out from places that are multiples of this, as the driver's own is.
pub(crate) const ALIGNMENT: usize = 256;
/// Threads of a block, as `THREADS` in `common.cu`.
pub(crate) const THREADS: u32 = 256;
/// Values that a thread takes at once, as `AT_ONCE` in `common.cu`.
pub(crate) const AT_ONCE: usize = 4;
/// Most blocks of a kernel whose blocks take several pieces each: enough for every device, and the
/// same on all of them, because partial sums are combined by block.
pub(crate) const BLOCKS: usize = 2048;

macro_rules! kernels {
    ($($kernel:ident $name:literal)*) => {
        /// The kernels, by the names that they have in the source.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Kernel { $($kernel),* }

        impl Kernel {
            const ALL: &[Self] = &[$(Self::$kernel),*];

            /// Whether it is one of those for tensor cores, which older devices do without.
            fn optional(self) -> bool {
                self.name().to_bytes().windows(5).any(|part| part == b"bf16_")
            }

            /// Whether the factors of products stay as they are: it writes to none, or its caller
            /// says to which.
            const fn leaves_factors(self) -> bool {
                matches!(
                    self,
                    Self::ToBf16
                        | Self::Unpad
                        | Self::SumRows
                        | Self::AddParts
                        | Self::CrossEntropy
                )
            }

            const fn name(self) -> &'static CStr {
                match self { $(Self::$kernel => $name),* }
            }
        }
    };
}

kernels! {
    Raise c"raise"
    Fill c"fill"
    Quantize c"quantize"
    Dequantize c"dequantize"
    AddQuantized c"add_quantized"
    SubtractQuantized c"subtract_quantized"
    Step c"step"
    Inverse c"inverse"
    Blend c"blend"
    Unblend c"unblend"
    Combine c"combine"
    CheckGradient c"check_gradient"
    CheckInput c"check_input"
    Compare c"compare"
    CountDifferences c"count_differences"
    Add c"add"
    Unpack c"unpack"
    UnpackRows c"unpack_rows"
    AddColumns c"add_columns"
    BiasRows c"bias_rows"
    ToBf16 c"to_bf16"
    Unpad c"unpad"
    AddParts c"add_parts"
    SumRows c"sum_rows"
    LayerNorm c"layer_norm"
    LayerNormDx c"layer_norm_dx"
    LayerNormDw c"layer_norm_dw"
    RmsParts c"rms_parts"
    RmsPartsDx c"rms_parts_dx"
    RmsPartsDw c"rms_parts_dw"
    Rotate c"rotate"
    Gated c"gated"
    GatedVjp c"gated_vjp"
    Gelu c"gelu"
    GeluVjp c"gelu_vjp"
    Dropout c"dropout"
    Embed c"embed"
    EmbedPositions c"embed_positions"
    EmbedTable c"embed_table"
    CrossEntropy c"cross_entropy"
    Attention32 c"attention_32"
    Attention64 c"attention_64"
    Attention128 c"attention_128"
    Attention256 c"attention_256"
    AttentionDelta c"attention_delta"
    AttentionDq32 c"attention_dq_32"
    AttentionDq64 c"attention_dq_64"
    AttentionDq128 c"attention_dq_128"
    AttentionDq256 c"attention_dq_256"
    AttentionDkv32 c"attention_dkv_32"
    AttentionDkv64 c"attention_dkv_64"
    AttentionDkv128 c"attention_dkv_128"
    AttentionDkv256 c"attention_dkv_256"
    AttentionBf16Round c"attention_bf16_round"
    AttentionBf16x32 c"attention_bf16_32"
    AttentionBf16x64 c"attention_bf16_64"
    AttentionBf16x128 c"attention_bf16_128"
    AttentionDqBf16x32 c"attention_dq_bf16_32"
    AttentionDqBf16x64 c"attention_dq_bf16_64"
    AttentionDqBf16x128 c"attention_dq_bf16_128"
    AttentionDkvBf16x32 c"attention_dkv_bf16_32"
    AttentionDkvBf16x64 c"attention_dkv_bf16_64"
    AttentionDkvBf16x128 c"attention_dkv_bf16_128"
    AddTotal c"add_total"
    Squares c"squares"
    Sgd c"sgd"
    AdamW c"adam_w"
    SetAdamMoments c"set_adam_moments"
    SetAdamSums c"set_adam_sums"
    SetAdamStep c"set_adam_step"
    AdamW8bit c"adam_w_8bit"
    AdafactorRows c"adafactor_rows"
    AdafactorCols c"adafactor_cols"
    AdafactorMean c"adafactor_mean"
    AdafactorVector c"adafactor_vector"
    AdafactorSquares c"adafactor_squares"
    AdafactorStep c"adafactor_step"
}

/// The driver's name of an error.
fn name_of(e: result::DriverError) -> &'static str {
    let mut name = core::ptr::null();
    // SAFETY: the driver gives the address of a text that it never frees.
    let found = unsafe { sys::cuGetErrorName(e.0, &mut name) }.result().is_ok() && !name.is_null();
    if found {
        // SAFETY: as above.
        unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("unknown error")
    } else {
        "unknown error"
    }
}

fn call(what: &'static str) -> impl Fn(result::DriverError) -> CudaError {
    move |e| CudaError::Call { what, error: name_of(e) }
}

fn device_error(e: result::DriverError) -> Error {
    Error::Device(name_of(e))
}

/// Memory of the device. It is freed by [`Device`], which owns it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    pub at: u64,
    pub bytes: usize,
}

/// What the device did under one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Time {
    /// A kernel, a copy, or a product with its rows, columns and inner size.
    pub name: String,
    /// How many times.
    pub calls: usize,
    /// In all of them together.
    pub seconds: f64,
}

/// What [`Cuda::times`](crate::Cuda::times) found.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Times {
    /// By name.
    pub by_name: Vec<Time>,
    /// From the first beginning to the last end, gaps and all.
    pub seconds: f64,
}

/// A stretch of work between two events.
struct Stretch {
    name: String,
    start: sys::CUevent,
    end: sys::CUevent,
}

/// A kernel of another crate that is loaded.
struct Custom {
    kernel: CustomKernel,
    module: sys::CUmodule,
    function: sys::CUfunction,
    signature: Signature,
}

pub(crate) struct Device {
    ordinal: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: Option<sys::CUmodule>,
    /// In the order of [`Kernel::ALL`]; none for kernels that an image for older devices lacks.
    functions: Vec<Option<sys::CUfunction>>,
    /// Those of a text have one module.
    custom: Vec<Custom>,
    lt: Mutex<Option<Lt>>,
    /// All that is used on the device, in one piece, and how much of it is handed out.
    block: Memory,
    handed_out: usize,
    /// Bytes that the driver's count of free memory fell by when the piece was allocated.
    taken: usize,
    /// [`STAGING`] bytes of the host, and how many of them hold uploads that may still be under
    /// way.
    staging: *mut u8,
    staged: AtomicUsize,
    /// The room for factors as bf16.
    room: Mutex<Room>,
    /// Whether anything was queued since [`Device::rested`].
    worked: AtomicBool,
    /// Work whose time is taken, where that was asked for.
    stretches: Mutex<Option<Vec<Stretch>>>,
    name: String,
    capability: u32,
    multiprocessors: usize,
    precision: Precision,
}

// SAFETY: handles of the driver and of cuBLAS may be used from any thread, one at a time; `enter`
// makes the context that of the calling thread.
unsafe impl Send for Device {}
// SAFETY: `&Device` only reads fields and makes calls that the driver orders itself.
unsafe impl Sync for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, sm_{})", self.name, self.capability)
    }
}

impl Device {
    /// Opens device `number`, loads the kernels and allocates `bytes` bytes, all that there will
    /// be, for a plan of `plan`.
    pub(crate) fn open(
        number: usize,
        precision: Precision,
        bytes: usize,
        plan: usize,
    ) -> core::result::Result<Self, CudaError> {
        library::driver()?;
        library::cublas_lt()?;
        let none = |e: result::DriverError| match e.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaError::Device { asked: number, found: 0 },
            _ => call("cuInit")(e),
        };
        result::init().map_err(none)?;
        let found = usize::try_from(result::device::get_count().map_err(none)?).unwrap_or(0);
        let ordinal = c_int::try_from(number).ok().filter(|_| number < found);
        let ordinal = ordinal.ok_or(CudaError::Device { asked: number, found })?;
        let ordinal = result::device::get(ordinal).map_err(call("cuDeviceGet"))?;
        let attribute = |a| {
            // SAFETY: the device is there.
            let value = unsafe { result::device::get_attribute(ordinal, a) };
            value.map(|v| u32::try_from(v).unwrap_or(0)).map_err(call("cuDeviceGetAttribute"))
        };
        use sys::CUdevice_attribute_enum as A;
        let capability = 10 * attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let name = result::device::get_name(ordinal).map_err(call("cuDeviceGetName"))?;
        let kernels = compile::kernels(capability)?;
        // SAFETY: the device is there; the context is released when the device is dropped.
        let context = unsafe { result::primary_ctx::retain(ordinal) }
            .map_err(call("cuDevicePrimaryCtxRetain"))?;
        let mut device = Self {
            ordinal,
            context,
            stream: core::ptr::null_mut(),
            module: None,
            functions: vec![],
            custom: vec![],
            lt: Mutex::new(None),
            block: Memory { at: 0, bytes: 0 },
            handed_out: 0,
            taken: 0,
            staging: core::ptr::null_mut(),
            staged: AtomicUsize::new(0),
            room: Mutex::new(Room::new(0, 0)),
            worked: AtomicBool::new(true),
            stretches: Mutex::new(None),
            name,
            capability,
            multiprocessors,
            precision,
        };
        device.enter()?;
        device.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(call("cuStreamCreate"))?;
        device.load_own(kernels)?;
        device.allocate(bytes, plan)?;
        // SAFETY: the address is freed once, in `drop`.
        let staging = unsafe { result::malloc_host(STAGING, 0) };
        device.staging = staging.map_err(call("cuMemHostAlloc"))?.cast();
        let workspace = device.alloc(WORKSPACE);
        device.lt = Mutex::new(Some(Lt::new(precision, workspace.at)?));
        Ok(device)
    }

    /// Loads the image of a source.
    fn module(
        &self,
        source: &str,
        kernels: &compile::Kernels,
    ) -> core::result::Result<sys::CUmodule, CudaError> {
        // SAFETY: the image ends with a zero byte, which text must and code may.
        let load = |image: &[u8]| unsafe { result::module::load_data(image.as_ptr().cast()) };
        let mut loaded = load(&kernels.image);
        if let (Err(_), Some(file)) = (&loaded, &kernels.cached) {
            // A file that was damaged: once more from the source.
            loaded = load(&compile::fresh(source, self.capability, Some(file))?);
        }
        loaded.map_err(call("cuModuleLoadData"))
    }

    fn load_own(&mut self, kernels: compile::Kernels) -> core::result::Result<(), CudaError> {
        let module = self.module(compile::SOURCE, &kernels)?;
        self.module = Some(module);
        for kernel in Kernel::ALL {
            // SAFETY: the module is loaded.
            let function =
                unsafe { result::module::get_function(module, CString::from(kernel.name())) };
            self.functions.push(match function {
                Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NOT_FOUND && kernel.optional() => None,
                other => Some(other.map_err(call("cuModuleGetFunction"))?),
            });
        }
        Ok(())
    }

    /// The place among those loaded of a kernel of another crate, which is compiled when it is
    /// asked for first.
    pub(crate) fn load_custom(
        &mut self,
        kernel: &CustomKernel,
    ) -> core::result::Result<usize, CudaError> {
        if let Some(loaded) = self.custom.iter().position(|c| c.kernel == *kernel) {
            return Ok(loaded);
        }
        let failed = |log: String| {
            let arch = format!("sm_{}", self.capability);
            CudaError::Compile { arch, log }
        };
        let signature = Signature::of(kernel).ok_or_else(|| {
            failed(format!(
                "the source has no line KERNEL(threads, blocks) {}(parameters) with whole warps, \
                 and parameters that are In<T> or Out<T> of float, i32 or u32, or float or u32",
                kernel.name
            ))
        })?;
        let name = CString::new(kernel.name).map_err(|_| failed("a name with a zero".into()))?;
        self.enter()?;
        let known = self.custom.iter().find(|c| c.kernel.source == kernel.source);
        let module = match known.map(|c| c.module) {
            Some(module) => module,
            None => {
                let source = compile::custom(kernel.source, kernel.name);
                self.module(&source, &compile::image(&source, self.capability)?)?
            }
        };
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(module, name) };
        let function = function.map_err(call("cuModuleGetFunction"))?;
        self.custom.push(Custom { kernel: *kernel, module, function, signature });
        Ok(self.custom.len() - 1)
    }

    /// What a loaded kernel of another crate takes.
    pub(crate) fn slots(&self, custom: usize) -> &[Slot] {
        &self.custom[custom].signature.slots
    }

    /// Starts it with `grid` blocks. `args` are the addresses of its parameters.
    pub(crate) fn launch_custom(
        &self,
        custom: usize,
        grid: [usize; 3],
        args: &mut [*mut c_void],
    ) -> Result<()> {
        let Custom { kernel, function, signature, .. } = &self.custom[custom];
        // It may write to any factor.
        self.room().clear();
        self.start(|| kernel.name.to_owned(), *function, grid, signature.threads, args)
    }

    /// Whether attention goes to tensor cores: with bf16, where the image has the kernels for it.
    pub(crate) fn tensor_attention(&self) -> bool {
        self.precision == Precision::Bf16
            && self.functions[Kernel::AttentionBf16x32 as usize].is_some()
    }

    /// Makes this device that of the calling thread.
    fn enter(&self) -> core::result::Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(call("cuCtxSetCurrent"))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn capability(&self) -> u32 {
        self.capability
    }

    pub(crate) fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    /// Bytes of all memory that was allocated.
    pub(crate) fn allocated(&self) -> usize {
        self.block.bytes
    }

    /// The same by the driver's count of free memory.
    pub(crate) fn taken(&self) -> usize {
        self.taken
    }

    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes free on the device, and all that it has.
    pub(crate) fn memory(&self) -> core::result::Result<(usize, usize), CudaError> {
        self.enter()?;
        result::mem_get_info().map_err(call("cuMemGetInfo"))
    }

    /// Allocates everything, full of zeros.
    fn allocate(&mut self, bytes: usize, plan: usize) -> core::result::Result<(), CudaError> {
        let (free, total) = self.memory()?;
        if bytes > free {
            return Err(CudaError::Memory { plan, free, total });
        }
        // SAFETY: the address is freed once, in `drop`.
        let at = match unsafe { result::malloc_sync(bytes) } {
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                return Err(CudaError::Memory { plan, free, total });
            }
            other => other.map_err(call("cuMemAlloc"))?,
        };
        self.block = Memory { at, bytes };
        self.taken = free.saturating_sub(self.memory()?.0);
        // SAFETY: the allocation has `bytes` bytes.
        unsafe { result::memset_d8_async(at, 0, bytes, self.stream) }
            .map_err(call("cuMemsetD8Async"))
    }

    /// The next `bytes` bytes of what [`Device::open`] allocated. Its caller counted them.
    pub(crate) fn alloc(&mut self, bytes: usize) -> Memory {
        let at = self.block.at + self.handed_out as u64;
        self.handed_out += bytes.next_multiple_of(ALIGNMENT);
        debug_assert!(self.handed_out <= self.block.bytes);
        Memory { at, bytes }
    }

    /// Gives the room for factors its place.
    pub(crate) fn furnish(&mut self, room: Memory) {
        self.room = Mutex::new(Room::new(room.at, room.bytes));
    }

    /// The room for factors.
    pub(crate) fn room(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anything was queued since [`Self::rested`].
    pub(crate) fn worked(&self) -> bool {
        self.worked.load(Ordering::Relaxed)
    }

    /// All work is done, and looked at.
    pub(crate) fn rested(&self) {
        self.worked.store(false, Ordering::Relaxed);
    }

    /// Times are taken from here on.
    pub(crate) fn take_times(&mut self) {
        self.stretches.get_mut().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
    }

    /// What was done since, once all of it is done.
    pub(crate) fn times(&mut self) -> core::result::Result<Times, CudaError> {
        self.enter()?;
        let stretches = self
            .stretches
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .unwrap_or_default();
        // SAFETY: the stream is there.
        unsafe { result::stream::synchronize(self.stream) }.map_err(call("cuStreamSynchronize"))?;
        let between = |start, end| {
            // SAFETY: both events were recorded on the stream and are not destroyed yet.
            let ms = unsafe { result::event::elapsed(start, end) };
            ms.map(|ms| f64::from(ms) / 1e3).map_err(call("cuEventElapsedTime"))
        };
        let mut times = Times::default();
        if let [first, .., last] = stretches.as_slice() {
            times.seconds = between(first.start, last.end)?;
        }
        for s in &stretches {
            let seconds = between(s.start, s.end)?;
            match times.by_name.iter_mut().find(|t| t.name == s.name) {
                Some(time) => (time.calls, time.seconds) = (time.calls + 1, time.seconds + seconds),
                None => times.by_name.push(Time { name: s.name.clone(), calls: 1, seconds }),
            }
        }
        for event in stretches.iter().flat_map(|s| [s.start, s.end]) {
            // SAFETY: it is destroyed once, and nothing is left to be recorded.
            unsafe { result::event::destroy(event) }.map_err(call("cuEventDestroy"))?;
        }
        Ok(times)
    }

    /// Queues work for the stream, and takes its time where that was asked for.
    fn queue(
        &self,
        name: impl FnOnce() -> String,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.worked.store(true, Ordering::Relaxed);
        self.enter()?;
        let mut stretches = self.stretches.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stretches) = stretches.as_mut() else { return work() };
        let event = || {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
            // SAFETY: the event was just made.
            unsafe { result::event::record(event, self.stream) }.map(|()| event)
        };
        let start = event().map_err(device_error)?;
        work()?;
        stretches.push(Stretch { name: name(), start, end: event().map_err(device_error)? });
        Ok(())
    }

    /// Sets bytes.
    pub(crate) fn set(&self, at: u64, value: u8, bytes: usize) -> Result<()> {
        self.room().clear();
        self.queue(
            || "set".into(),
            || {
                // SAFETY: callers pass places inside their allocations.
                unsafe { result::memset_d8_async(at, value, bytes, self.stream) }
                    .map_err(device_error)
            },
        )
    }

    /// Queues a copy to the device. The values go through page-locked memory, so that nothing waits
    /// for the copy; only what does not fit waits for the work before it.
    pub(crate) fn write<T: Copy>(&mut self, at: u64, src: &[T]) -> Result<()> {
        self.room().clear();
        let mut at = at;
        for piece in src.chunks((STAGING / size_of::<T>()).max(1)) {
            let bytes = size_of_val(piece);
            if self.staged.load(Ordering::Relaxed) + bytes > STAGING {
                self.wait()?;
            }
            let from = self.staged.fetch_add(bytes.next_multiple_of(64), Ordering::Relaxed);
            // SAFETY: the place lies within the staging memory, which no copy under way reads
            // there.
            let staged = unsafe {
                let place = self.staging.add(from);
                core::ptr::copy_nonoverlapping(piece.as_ptr().cast(), place, bytes);
                core::slice::from_raw_parts(place.cast_const(), bytes)
            };
            let copy = || {
                // SAFETY: callers pass places inside their allocations.
                unsafe { result::memcpy_htod_async(at, staged, self.stream) }.map_err(device_error)
            };
            self.queue(|| "upload".into(), copy)?;
            at += bytes as u64;
        }
        Ok(())
    }

    /// Waits for all work before it.
    fn wait(&self) -> Result<()> {
        // SAFETY: the stream is there.
        unsafe { result::stream::synchronize(self.stream) }.map_err(device_error)?;
        self.staged.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Waits for all work before it and copies to the host.
    pub(crate) fn read<T: Copy>(&self, at: u64, dst: &mut [T]) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: callers pass places inside their allocations; `dst` is not used before the wait
        // is over.
        unsafe { result::memcpy_dtoh_async(dst, at, self.stream) }.map_err(device_error)?;
        self.wait()
    }

    /// Copies within the device.
    pub(crate) fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.room().clear();
        self.queue(
            || "copy".into(),
            || {
                // SAFETY: callers pass places inside their allocations.
                unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) }
                    .map_err(device_error)
            },
        )
    }

    /// Starts a kernel with blocks of `threads` threads; the room for factors is empty then, but
    /// for kernels that [leave](Kernel::leaves_factors) them. `args` are the addresses of its
    /// parameters, in order and of the types that the source has.
    pub(crate) fn launch(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        threads: u32,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        let Some(function) = self.functions[kernel as usize] else {
            return Err(Error::Device("this image of the kernels has none for tensor cores"));
        };
        if !kernel.leaves_factors() && !grid.contains(&0) {
            self.room().clear();
        }
        let name = || kernel.name().to_string_lossy().into_owned();
        self.start(name, function, grid, threads, args)
    }

    /// Starts a function of a loaded module; there is nothing to do for an empty grid.
    fn start(
        &self,
        name: impl FnOnce() -> String,
        function: sys::CUfunction,
        grid: [usize; 3],
        threads: u32,
        args: &mut [*mut c_void],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let most = [i32::MAX as usize, 65_535, 65_535];
        if grid.iter().zip(most).any(|(&g, most)| g > most) {
            return Err(Error::TooLarge("blocks of a kernel"));
        }
        let [x, y, z] = grid.map(|g| g as u32);
        // SAFETY: the function is one of a loaded module; the parameters are those of its source,
        // and their spans lie within allocations.
        let mut work = || unsafe {
            result::launch_kernel(function, (x, y, z), (threads, 1, 1), 0, self.stream, args)
        };
        self.queue(name, || work().map_err(device_error))
    }

    /// Starts a matrix product.
    pub(crate) fn gemm(&self, g: &Gemm) -> Result<()> {
        let mut lt = self.lt.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(lt) = lt.as_mut() else { return Err(Error::Device("cuBLASLt is not there")) };
        // Rows, columns and inner size as bdia-core has them, by rows.
        self.queue(|| format!("product {}×{}×{}", g.n, g.m, g.k), || lt.gemm(g, self.stream.cast()))
    }
}

impl Drop for Device {
    /// Frees everything; there is nothing to do about failures here.
    fn drop(&mut self) {
        let _ = self.enter();
        // SAFETY: each of these was made by `open` or `alloc` and is given back once; the stream is
        // waited for first.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            drop(self.lt.get_mut().unwrap_or_else(PoisonError::into_inner).take());
            if self.block.at != 0 {
                let _ = result::free_sync(self.block.at);
            }
            if !self.staging.is_null() {
                let _ = result::free_host(self.staging.cast());
            }
            let mut modules: Vec<_> = self.custom.iter().map(|c| c.module).collect();
            modules.extend(self.module);
            modules.sort_unstable();
            modules.dedup();
            for module in modules {
                let _ = result::module::unload(module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.ordinal);
        }
    }
}

/// The address of a parameter, as [`Device::launch`] takes it.
pub(crate) fn arg<T: crate::span::Parameter>(x: &T) -> *mut c_void {
    (&raw const *x).cast_mut().cast()
}

const _: () = assert!(size_of::<Span>() == 16);

#[cfg(test)]
mod tests {
    use super::*;

    /// The emulated device compiles the files by itself, so it would not miss one that NVRTC is not
    /// given.
    #[test]
    fn the_source_has_every_kernel() {
        let mut names: Vec<_> = compile::listed().into_iter().map(|k| (k.name, k.tensor)).collect();
        let name = |k: &Kernel| (k.name().to_string_lossy().into_owned(), k.optional());
        let mut wanted: Vec<_> = Kernel::ALL.iter().map(name).collect();
        names.sort();
        wanted.sort();
        assert_eq!(names, wanted);
    }
}
