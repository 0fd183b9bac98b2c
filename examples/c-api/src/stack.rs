//! The stack over callbacks: `bdia_stack_*`.

use core::cell::UnsafeCell;
use core::ffi::{c_int, c_void};
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use bdia_core::stack::{Blocks, Config as CoreConfig, Input, Needs, Pass, Reversible, Tail};
use bdia_core::{
    Category, Chunk, Error, Fault, Gamma, Grid, Layout, Policy, Reals, Sign, Site, Storage,
};
use bdia_cpu::Cpu;

use crate::pointer::{input, one, one_mut, output, values};
use crate::{Failure, Outcome, Status, border};

/// Sizes and settings of a stack. bdia_config_default fills in all but the first three.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Samples of a batch.
    pub batch: usize,
    /// Values of one sample (tokens times width).
    pub per_sample: usize,
    /// Residual blocks K, 1 to 65536.
    pub blocks: usize,
    /// Samples that go through a block together; 0: the whole batch. Fewer need a smaller
    /// workspace.
    pub chunk: usize,
    /// Floats per sample that a block keeps from residual to vjp (bdia_call.frame).
    pub frame: usize,
    /// Floats per sample that are free for use within one callback (bdia_call.scratch).
    pub scratch: usize,
    /// Threads of the update, up to 1024; 0: as many as there are cores. They change no bit of any
    /// result.
    pub threads: usize,
    /// Magnitude of gamma: 0.5 (one bit is kept per value and block), 0.25 (two), ... 2^-8 (eight).
    pub gamma: f64,
    /// Other magnitudes from later steps on, in their order. Memory is that of the smallest gamma.
    pub gamma_changes: [GammaChange; 7],
    /// Number of gamma_changes that count, 0 to 7.
    pub gamma_change_count: usize,
    /// Fractional bits l of the grid 2^-l, 0 to 24. Values may be up to 2^(30-l).
    pub frac_bits: u32,
    /// Sign of gamma: 0 drawn per sample and block; 2 drawn per sample, the same for all blocks
    /// (which leaves a pretrained network nearest to what it was); 1 always plus, -1 always minus.
    pub sign: i32,
    /// 1: keep all activations besides and count values that are rebuilt wrongly
    /// (bdia_stack_mismatches). 0: do not.
    pub verify: i32,
}

/// Another magnitude of gamma.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct GammaChange {
    /// The first step, of those given to bdia_stack_forward, that has it; 1 or more.
    pub step: u32,
    /// As bdia_config.gamma.
    pub gamma: f64,
}

/// One call of a block: samples first ... first + samples - 1 of the batch.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Index k of the block.
    pub block: usize,
    /// First sample.
    pub first: usize,
    /// Number of samples.
    pub samples: usize,
    /// As given to bdia_stack_forward. Random numbers of a block must be a function of seed, step,
    /// global, block and element, so that the recomputation draws the same.
    pub seed: u64,
    /// As given to bdia_stack_forward.
    pub step: u32,
    /// Index in the global batch of the first sample.
    pub global: u32,
    /// In residual: whether vjp of the same frame follows. The result must be the same bits either
    /// way.
    pub keep: i32,
    /// bdia_config.frame times samples floats, which stay from residual to vjp.
    pub frame: *mut f32,
    /// bdia_config.scratch times samples floats, arbitrary on entry, for this call only.
    pub scratch: *mut f32,
}

/// The residual blocks, all behind one table. Every callback returns 0, or another number to stop
/// the pass, which then ends with BDIA_STATUS_CALLBACK. Arrays hold samples times per_sample
/// floats, sample by sample, and are only good during the callback. A callback runs in the thread
/// that called, and calls no function on the same stack.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct BlockTable {
    /// Given to every callback; may be NULL.
    pub user: *mut c_void,
    /// h = h_k(x). The same bits for the same call, whenever it is called: no uninitialized memory,
    /// no order of sums that changes between calls. x may not be changed; a block that does ends
    /// the pass with BDIA_STATUS_CHECKSUM.
    pub residual: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            call: *const Call,
            x: *const f32,
            h: *mut f32,
        ) -> c_int,
    >,
    /// gx += J(x)^T gh, where J is the Jacobian of h_k; adds the gradients of the block's
    /// parameters to wherever they are kept. gh may be overwritten.
    pub vjp: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            call: *const Call,
            x: *const f32,
            gh: *mut f32,
            gx: *mut f32,
        ) -> c_int,
    >,
    /// Block k is finished: its gradient is complete, its activations have been compared, the
    /// gradients that went through it are finite (its parameters' are not looked at), nothing
    /// reads its parameters again in this step. An optimizer may update them here and use the
    /// gradient's memory again for block k - 1. May be NULL.
    pub done: Option<unsafe extern "C" fn(user: *mut c_void, block: usize) -> c_int>,
}

/// Bytes of a stack, by what they are for. Depth adds to side_bits (and verify) only.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// The two activation tensors X.
    pub activations: usize,
    /// The two gradient tensors G.
    pub activation_gradients: usize,
    /// Side bits and checksums.
    pub side_bits: usize,
    /// What one chunk needs inside a block: input, residual, frame, scratch.
    pub workspace: usize,
    /// The original activations, with bdia_config.verify.
    pub verify: usize,
    /// The sum.
    pub total: usize,
}

/// Where a pass went wrong, after BDIA_STATUS_RANGE, BDIA_STATUS_GRADIENT, BDIA_STATUS_CHECKSUM or
/// BDIA_STATUS_CALLBACK.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct FaultInfo {
    /// The block; -1 for the input of the stack, bdia_config.blocks for gk.
    pub block: i64,
    /// The sample of a value (BDIA_STATUS_RANGE, BDIA_STATUS_GRADIENT) or of an input that a block
    /// wrote into. Otherwise 0.
    pub sample: usize,
    /// The value (BDIA_STATUS_RANGE, BDIA_STATUS_GRADIENT). Otherwise 0.
    pub value: f64,
}

/// What may be called next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A forward pass; the activations are those of a pass that failed, or none.
    Fresh,
    /// A forward pass; X_0 and X_1 are rebuilt.
    Rebuilt,
    /// A backward pass, or another forward pass.
    Forward(Pass),
    /// Nothing but freeing.
    Broken,
}

struct Inner {
    stack: Reversible,
    cpu: Cpu,
    verify: bool,
    blocks: BlockTable,
    memory: Memory,
    state: State,
    fault: FaultInfo,
}

/// A stack.
#[derive(Debug)]
pub struct Handle {
    busy: AtomicBool,
    inner: UnsafeCell<Inner>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("state", &self.state).finish_non_exhaustive()
    }
}

/// The pass is over, whichever way it ends.
struct Release<'a>(&'a AtomicBool);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Handle {
    fn claim(&self) -> Result<Release<'_>, Failure> {
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(Failure::new(
                Status::State,
                "the stack is in use: a callback may not call functions on its own stack, nor two \
                 threads one stack",
            ));
        }
        Ok(Release(&self.busy))
    }

    /// Runs `f` with the stack's state to itself.
    fn with(&self, f: impl FnOnce(&mut Inner) -> Outcome) -> Outcome {
        let _release = self.claim()?;
        // SAFETY: `busy` was not set, so this is the only reference until `_release` is dropped.
        let inner = unsafe { &mut *self.inner.get() };
        if inner.state == State::Broken {
            return Err(Failure::new(
                Status::State,
                "this stack broke in an earlier call; only free it",
            ));
        }
        f(inner)
    }
}

/// What a number of a sign means.
pub(crate) fn sign(number: i32) -> Result<Sign, Failure> {
    match number {
        0 => Ok(Sign::Random),
        2 => Ok(Sign::Shared),
        1 => Ok(Sign::Plus),
        -1 => Ok(Sign::Minus),
        other => {
            let possible = "0 (drawn), 2 (drawn, the same for all blocks), 1 or -1";
            Err(Error::setting("sign", other.into(), possible).into())
        }
    }
}

/// The layout of a configuration.
fn lay_out(c: &Config) -> Result<(Reversible, Layout), Failure> {
    let (grid, sign) = (Grid::new(c.frac_bits)?, sign(c.sign)?);
    let changes = c.gamma_changes.get(..c.gamma_change_count).ok_or_else(|| {
        Error::setting("gamma_change_count", c.gamma_change_count as f64, "0 to 7")
    })?;
    let mut stages = vec![(0, Gamma::from_value(c.gamma, sign)?.planes())];
    for change in changes {
        stages.push((change.step, Gamma::from_value(change.gamma, sign)?.planes()));
    }
    let gamma = Policy::scheduled(&stages, sign)?;
    let mut layout = Layout::new(size_of::<f32>());
    let config = CoreConfig {
        id: 0,
        batch: c.batch,
        per_sample: c.per_sample,
        blocks: c.blocks,
        chunk: if c.chunk == 0 { c.batch } else { c.chunk },
        tail: Tail::Output,
        needs: Needs { frame: c.frame, scratch: c.scratch, fixed: 0 },
        ends_scratch: 0,
    };
    let stack = Reversible::layout(&config, grid, gamma, c.verify != 0, &mut layout)?;
    Ok((stack, layout.checked()?))
}

impl From<&Layout> for Memory {
    fn from(l: &Layout) -> Self {
        Self {
            activations: l.bytes(Category::Activations),
            activation_gradients: l.bytes(Category::ActivationGradients),
            side_bits: l.bytes(Category::SideBits),
            workspace: l.bytes(Category::Workspace),
            verify: l.bytes(Category::Verify),
            total: l.total(),
        }
    }
}

/// The blocks, as the stack sees them.
struct Callbacks<'a> {
    table: &'a BlockTable,
    frame: usize,
    scratch: usize,
    fault: &'a mut FaultInfo,
}

impl Callbacks<'_> {
    fn call(&self, cpu: &mut Cpu, call: &bdia_core::stack::Call) -> bdia_core::Result<Call> {
        let n = call.chunk.samples;
        Ok(Call {
            block: call.block,
            first: call.chunk.first,
            samples: n,
            seed: call.chunk.seed,
            step: call.chunk.step,
            global: call.chunk.global,
            keep: call.keep.into(),
            frame: cpu.reals_pointer(call.frame.sub(0, n * self.frame))?,
            scratch: cpu.reals_pointer(call.scratch.sub(0, n * self.scratch))?,
        })
    }

    fn answer(&mut self, code: c_int, block: usize) -> bdia_core::Result<()> {
        if code == 0 {
            return Ok(());
        }
        *self.fault = FaultInfo { block: block as i64, ..FaultInfo::default() };
        Err(Error::Foreign(Site::Block(block)))
    }
}

impl Blocks<Cpu> for Callbacks<'_> {
    fn residual(
        &mut self,
        cpu: &mut Cpu,
        call: &bdia_core::stack::Call,
        h: Reals,
    ) -> bdia_core::Result<()> {
        let c = self.call(cpu, call)?;
        let (x, h) = (cpu.reals_pointer(call.x)?, cpu.reals_pointer(h)?);
        let Some(residual) = self.table.residual else {
            return Err(Error::Foreign(Site::Block(call.block)));
        };
        // SAFETY: `bdia_stack_new` was promised a function of this type; the buffers are as long as
        // the header says, and the backend is not used meanwhile.
        let code = unsafe { residual(self.table.user, &raw const c, x, h) };
        self.answer(code, call.block)
    }

    fn vjp(
        &mut self,
        cpu: &mut Cpu,
        call: &bdia_core::stack::Call,
        gh: Reals,
        gx: Reals,
    ) -> bdia_core::Result<()> {
        let c = self.call(cpu, call)?;
        let (x, gh, gx) =
            (cpu.reals_pointer(call.x)?, cpu.reals_pointer(gh)?, cpu.reals_pointer(gx)?);
        let Some(vjp) = self.table.vjp else { return Err(Error::Foreign(Site::Block(call.block))) };
        // SAFETY: as in `residual`.
        let code = unsafe { vjp(self.table.user, &raw const c, x, gh, gx) };
        self.answer(code, call.block)
    }

    fn done(&mut self, cpu: &mut Cpu, block: usize) -> bdia_core::Result<()> {
        if let Some(fault) = cpu.peek_fault()? {
            return Err(fault.into());
        }
        let Some(done) = self.table.done else { return Ok(()) };
        // SAFETY: as in `residual`.
        let code = unsafe { done(self.table.user, block) };
        self.answer(code, block)
    }
}

/// The caller's array as the input of block 0.
struct Given<'a> {
    x: &'a [f32],
    per_sample: usize,
}

impl Input<Cpu> for Given<'_> {
    fn forward(
        &mut self,
        cpu: &mut Cpu,
        c: &Chunk,
        _: bool,
        x: Reals,
        _: Reals,
    ) -> bdia_core::Result<()> {
        let part = c.first * self.per_sample..(c.first + c.samples) * self.per_sample;
        cpu.write_reals(x, self.x.get(part).unwrap_or(&[]))
    }

    fn vjp(&mut self, _: &mut Cpu, _: &Chunk, _: Reals, _: Reals) -> bdia_core::Result<()> {
        Ok(())
    }
}

impl Inner {
    fn callbacks(&mut self) -> (&mut Reversible, &mut Cpu, Callbacks<'_>) {
        let needs = self.stack.config().needs;
        self.fault = FaultInfo::default();
        let callbacks = Callbacks {
            table: &self.blocks,
            frame: needs.frame,
            scratch: needs.scratch,
            fault: &mut self.fault,
        };
        (&mut self.stack, &mut self.cpu, callbacks)
    }

    /// The result of a pass, with the deferred status, and where it went wrong.
    fn settle(&mut self, pass: bdia_core::Result<()>) -> Outcome {
        let deferred = self.cpu.take_fault()?;
        let fault = match (pass, deferred) {
            (Err(Error::Fault(fault)), _) | (Ok(()), Some(fault)) => fault,
            (Err(other), _) => return Err(other.into()),
            (Ok(()), None) => return Ok(()),
        };
        let above = self.stack.config().blocks as i64;
        let place = |site: Site| match site {
            Site::Embedding => -1,
            Site::Block(k) => k as i64,
            Site::Head => above,
        };
        self.fault = match fault {
            Fault::Range { site, sample, value }
            | Fault::ActivationGradient { site, sample, value } => {
                FaultInfo { block: place(site), sample, value }
            }
            Fault::Input { site, sample } => {
                FaultInfo { block: place(site), sample, ..FaultInfo::default() }
            }
            Fault::Checksum { block, .. } => {
                FaultInfo { block: block as i64, ..FaultInfo::default() }
            }
            _ => FaultInfo::default(),
        };
        Err(Error::Fault(fault).into())
    }

    fn forward(&mut self, pass: Pass, x: &[f32]) -> Outcome {
        self.state = State::Broken;
        let per_sample = self.stack.config().per_sample;
        let (stack, cpu, mut callbacks) = self.callbacks();
        let result = (|| {
            stack.embed(cpu, &mut Given { x, per_sample }, &pass)?;
            stack.forward(cpu, &mut callbacks, &pass)?;
            stack.output(cpu).map(|_| ())
        })();
        self.state = State::Fresh;
        self.settle(result)?;
        self.state = State::Forward(pass);
        Ok(())
    }

    fn backward(&mut self, g: &[f32]) -> Outcome {
        let State::Forward(pass) = self.state else {
            return Err(Failure::new(
                Status::State,
                "a backward pass needs a forward pass before it, one for each",
            ));
        };
        self.state = State::Broken;
        let (stack, cpu, mut callbacks) = self.callbacks();
        let result = (|| {
            cpu.write_reals(stack.gradient(stack.config().blocks), g)?;
            stack.backward(cpu, &mut callbacks, &pass)
        })();
        self.state = State::Fresh;
        self.settle(result)?;
        self.state = State::Rebuilt;
        Ok(())
    }
}

/// Fills in: 14 fractional bits, gamma 0.5 in all steps with drawn signs, whole batches as chunks,
/// threads as cores; sizes 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_config_default(config: *mut Config) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let config =
            unsafe { output("config", config.cast::<core::mem::MaybeUninit<Config>>(), 1) }?;
        config[0].write(Config {
            batch: 0,
            per_sample: 0,
            blocks: 0,
            chunk: 0,
            frame: 0,
            scratch: 0,
            threads: 0,
            gamma: 0.5,
            gamma_changes: [GammaChange { step: 0, gamma: 0.0 }; 7],
            gamma_change_count: 0,
            frac_bits: 14,
            sign: 0,
            verify: 0,
        });
        Ok(())
    })
}

/// The bytes that a stack will have, before anything is allocated. As the output leaves the stack,
/// the last step has gamma and side bits like the others, and backward inverts it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_plan(config: *const Config, memory: *mut Memory) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (config, memory) = unsafe { (one("config", config)?, one_mut("memory", memory)?) };
        let (_, layout) = lay_out(config)?;
        *memory = (&layout).into();
        Ok(())
    })
}

/// A new stack in *stack (NULL there after a failure). The table is copied; what user points to is
/// not. All memory is allocated here and none in a pass.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_new(
    config: *const Config,
    blocks: *const BlockTable,
    stack: *mut *mut Handle,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let out = unsafe { one_mut("stack", stack) }?;
        *out = core::ptr::null_mut();
        // SAFETY: promised by the caller.
        let (config, blocks) = unsafe { (one("config", config)?, one("blocks", blocks)?) };
        if blocks.residual.is_none() || blocks.vjp.is_none() {
            return Err(Failure::new(
                Status::Pointer,
                "blocks.residual and blocks.vjp may not be NULL",
            ));
        }
        let (stack, layout) = lay_out(config)?;
        let inner = Inner {
            stack,
            cpu: Cpu::new(&layout, config.threads)?,
            verify: config.verify != 0,
            blocks: *blocks,
            memory: (&layout).into(),
            state: State::Fresh,
            fault: FaultInfo::default(),
        };
        *out = Box::into_raw(Box::new(Handle {
            busy: AtomicBool::new(false),
            inner: UnsafeCell::new(inner),
        }));
        Ok(())
    })
}

/// Frees a stack; NULL is fine. Not from within its own callbacks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_free(stack: *mut Handle) -> Status {
    border(|| {
        if stack.is_null() {
            return Ok(());
        }
        // SAFETY: promised by the caller.
        let release = unsafe { one("stack", stack.cast_const()) }?.claim()?;
        core::mem::forget(release);
        // SAFETY: it was made by `Box::into_raw`, and nothing else uses it.
        drop(unsafe { Box::from_raw(stack) });
        Ok(())
    })
}

/// The forward pass of training: from x_0 to x_K, both batch times per_sample floats (they may be
/// the same array). seed, step and global place the random signs: another step, other signs; the
/// same, the same. global is the index in the global batch of the first sample. Any number of
/// forward passes may come before a backward pass, which then belongs to the last one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_forward(
    stack: *mut Handle,
    seed: u64,
    step: u32,
    global: u32,
    x0: *const f32,
    xk: *mut f32,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        unsafe { one("stack", stack.cast_const()) }?.with(|s| {
            let len = s.stack.activation(0).len();
            // Checked before the pass, taken after it: it may be the same array as x0.
            // SAFETY: promised by the caller; not kept.
            let _ = unsafe { output("xk", xk, len) }?.len();
            // SAFETY: promised by the caller.
            s.forward(Pass { seed, step, global }, unsafe { input("x0", x0, len) }?)?;
            // SAFETY: promised by the caller; x0 is not used any more.
            let out = unsafe { output("xk", xk, len) }?;
            Ok(s.cpu.read_reals(s.stack.gradient(s.stack.config().blocks), out)?)
        })
    })
}

/// The backward pass: from gk, the gradient with respect to x_K, to g0, the one with respect to x_0
/// (they may be the same array; g0 may be NULL). On the way residual and vjp are called for every
/// block and chunk, then done. It ends with BDIA_STATUS_CHECKSUM where a rebuilt activation differs
/// from the original by any bit, and with BDIA_STATUS_GRADIENT where gk, or gx after the vjp of a
/// block, is not finite: the block that bdia_stack_fault names, and those below it, have not been
/// told that they are done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_backward(
    stack: *mut Handle,
    gk: *const f32,
    g0: *mut f32,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        unsafe { one("stack", stack.cast_const()) }?.with(|s| {
            let len = s.stack.activation(0).len();
            if !g0.is_null() {
                // SAFETY: promised by the caller; not kept.
                let _ = unsafe { output("g0", g0, len) }?.len();
            }
            // SAFETY: promised by the caller.
            s.backward(unsafe { input("gk", gk, len) }?)?;
            if !g0.is_null() {
                // SAFETY: promised by the caller; gk is not used any more.
                s.cpu.read_reals(s.stack.gradient(0), unsafe { output("g0", g0, len) }?)?;
            }
            Ok(())
        })
    })
}

/// Where the last pass went wrong.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_fault(stack: *mut Handle, fault: *mut FaultInfo) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (stack, fault) =
            unsafe { (one("stack", stack.cast_const())?, one_mut("fault", fault)?) };
        stack.with(|s| {
            *fault = s.fault;
            Ok(())
        })
    })
}

/// The bytes of a stack: what bdia_plan said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_memory(stack: *mut Handle, memory: *mut Memory) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (stack, memory) =
            unsafe { (one("stack", stack.cast_const())?, one_mut("memory", memory)?) };
        stack.with(|s| {
            *memory = s.memory;
            Ok(())
        })
    })
}

/// How many 32-bit words of side bits the stack keeps: (K - 1) * batch * m * ceil(per_sample / 32).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_side_words(stack: *mut Handle, words: *mut usize) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (stack, words) =
            unsafe { (one("stack", stack.cast_const())?, one_mut("words", words)?) };
        stack.with(|s| {
            *words = s.stack.side_bits().len();
            Ok(())
        })
    })
}

/// Copies the side bits: block by block, sample by sample, bit plane by bit plane (the lowest
/// first); value i of a sample in bit i mod 32 of word i / 32. len must be what
/// bdia_stack_side_words says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_side_bits(
    stack: *mut Handle,
    bits: *mut u32,
    len: usize,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let stack = unsafe { one("stack", stack.cast_const()) }?;
        stack.with(|s| {
            // SAFETY: promised by the caller.
            Ok(s.cpu.read_words(s.stack.side_bits(), unsafe { output("bits", bits, len) }?)?)
        })
    })
}

/// Copies one of the two integer activation tensors that are kept, x_k times 2^l: k = K and K - 1
/// after a forward pass, 0 and 1 after a backward pass. len must be batch times per_sample.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_activation(
    stack: *mut Handle,
    k: usize,
    x: *mut i32,
    len: usize,
) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let stack = unsafe { one("stack", stack.cast_const()) }?;
        stack.with(|s| {
            let blocks = s.stack.config().blocks;
            let kept = match s.state {
                State::Forward(_) => [blocks - 1, blocks],
                State::Rebuilt => [0, 1],
                State::Fresh | State::Broken => {
                    return Err(Failure::new(
                        Status::State,
                        "activations are there after a pass that went well",
                    ));
                }
            };
            if !kept.contains(&k) {
                return Err(Error::setting("k", k as f64, "K and K - 1, or 0 and 1").into());
            }
            // SAFETY: promised by the caller.
            Ok(s.cpu.read_ints(s.stack.activation(k), unsafe { output("x", x, len) }?)?)
        })
    })
}

/// Counts the values that the last backward pass rebuilt differently from the originals: 0. Needs
/// bdia_config.verify.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bdia_stack_mismatches(stack: *mut Handle, count: *mut u64) -> Status {
    border(|| {
        // SAFETY: promised by the caller.
        let (stack, count) =
            unsafe { (one("stack", stack.cast_const())?, one_mut("count", count)?) };
        stack.with(|s| {
            if !s.verify {
                return Err(Failure::new(
                    Status::Setting,
                    "mismatches are counted only with config.verify = 1",
                ));
            }
            *count = s.stack.mismatches(&s.cpu)?;
            Ok(())
        })
    })
}

/// Words of side bits of a batch and block, for bdia_step.
pub(crate) fn side_words(
    gamma: Gamma,
    samples: usize,
    per_sample: usize,
) -> Result<usize, Failure> {
    values(
        "side bits",
        samples,
        values("side bits", per_sample.div_ceil(32), gamma.planes() as usize)?,
    )
}
