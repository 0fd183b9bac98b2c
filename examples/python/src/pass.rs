//! One forward and backward pass: the stack of `bdia-core` over callbacks into Python.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Mutex;

use bdia_core::arena::Words;
use bdia_core::stack::{Blocks, Call, Config, Input, Needs, Pass as Place, Reversible, Tail};
use bdia_core::{
    Category, Chunk, Error, Fault, Gamma, Grid, Ints, Layout, Policy, Reals, Reference, Sign, Site,
    Storage, UpdateOps,
};
use bdia_cpu::{Cpu, CpuError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::region::Region;

/// An exception of `bdia.errors`.
fn raise(py: Python<'_>, class: &str, args: impl for<'py> pyo3::call::PyCallArgs<'py>) -> PyErr {
    let made = py.import("bdia.errors").and_then(|m| m.getattr(class)).and_then(|c| c.call1(args));
    made.map_or_else(|e| e, PyErr::from_value)
}

/// A request that cannot be carried out.
pub(crate) fn refused(py: Python<'_>, e: Error) -> PyErr {
    match e {
        Error::Fault(fault) => broken(py, fault),
        _ => raise(py, "SettingError", (e.to_string(),)),
    }
}

/// A machine that cannot carry a request out.
fn unable(py: Python<'_>, e: CpuError) -> PyErr {
    match e {
        CpuError::Memory { .. } => pyo3::exceptions::PyMemoryError::new_err(e.to_string()),
        _ => raise(py, "SettingError", (e.to_string(),)),
    }
}

/// Numbers that went wrong.
fn broken(py: Python<'_>, fault: Fault) -> PyErr {
    let block = |site| match site {
        Site::Block(k) => Some(k),
        _ => None,
    };
    match fault {
        Fault::Range { site, sample, value } => {
            raise(py, "RangeError", (fault.to_string(), block(site), sample, value))
        }
        Fault::ActivationGradient { site, sample, value } => {
            raise(py, "GradientError", (fault.to_string(), block(site), sample, value))
        }
        Fault::Checksum { block, .. } => raise(py, "ChecksumError", (fault.to_string(), block)),
        Fault::Input { site, .. } => raise(py, "ChecksumError", (fault.to_string(), block(site))),
        _ => raise(py, "Error", (fault.to_string(),)),
    }
}

/// `random`, `plus` or `minus`.
pub(crate) fn sign(py: Python<'_>, sign: &str) -> PyResult<Sign> {
    match sign {
        "random" => Ok(Sign::Random),
        "shared" => Ok(Sign::Shared),
        "plus" => Ok(Sign::Plus),
        "minus" => Ok(Sign::Minus),
        other => Err(raise(
            py,
            "SettingError",
            (format!("sign is {other:?}; possible: \"random\", \"shared\", \"plus\", \"minus\""),),
        )),
    }
}

/// A backend whose reals Python may see.
trait Exposed: UpdateOps {
    fn address(&mut self, r: Reals) -> bdia_core::Result<*mut u8>;
}

impl Exposed for Cpu {
    fn address(&mut self, r: Reals) -> bdia_core::Result<*mut u8> {
        Ok(self.reals_pointer(r)?.cast())
    }
}

impl Exposed for Reference<'_, f64> {
    fn address(&mut self, r: Reals) -> bdia_core::Result<*mut u8> {
        Ok(self.reals_mut(r)?.as_mut_ptr().cast())
    }
}

/// Memory and operations: `f32` on the CPU backend; `f64`, for checking, on the reference backend.
/// In `f64` an address is good until the next operation only, so Python copies what it keeps.
enum Engine {
    Single(Cpu),
    Double { layout: Layout, ints: Vec<i32>, reals: Vec<f64>, words: Vec<u32> },
}

/// Runs `$body` with `$be` as the backend.
macro_rules! with {
    ($engine:expr, $be:ident => $body:expr) => {
        match $engine {
            Engine::Single($be) => $body,
            Engine::Double { layout, ints, reals, words } => {
                Reference::new(layout, ints, reals, words).and_then(|mut reference| {
                    let $be = &mut reference;
                    $body
                })
            }
        }
    };
}

impl Engine {
    fn single(layout: &Layout, threads: usize) -> Result<Self, CpuError> {
        // Threads are started once for every number of them, and again in a process that was forked
        // off.
        static TEAMS: Mutex<Option<HashMap<(u32, usize), Cpu>>> = Mutex::new(None);
        let mut teams = TEAMS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let teams = teams.get_or_insert_default();
        let key = (std::process::id(), threads);
        let team = match teams.entry(key) {
            Entry::Occupied(team) => team.into_mut(),
            Entry::Vacant(place) => place.insert(Cpu::new(&Layout::new(4), threads)?),
        };
        Ok(Self::Single(team.sibling(layout)?))
    }

    fn double(layout: &Layout) -> Result<Self, CpuError> {
        let (i, r, w) = layout.arenas();
        let (mut ints, mut reals, mut words) = (Vec::new(), Vec::new(), Vec::new());
        let refused = |bytes| move |_| CpuError::Memory { bytes };
        ints.try_reserve_exact(i).map_err(refused(i * 4))?;
        reals.try_reserve_exact(r).map_err(refused(r * 8))?;
        words.try_reserve_exact(w).map_err(refused(w * 4))?;
        ints.resize(i, 0);
        reals.resize(r, 0.0);
        words.resize(w, 0);
        Ok(Self::Double { layout: layout.clone(), ints, reals, words })
    }

    const fn real_bytes(&self) -> usize {
        match self {
            Self::Single(_) => 4,
            Self::Double { .. } => 8,
        }
    }
}

/// What may come next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Fresh,
    Forward(u64),
    Rebuilt,
    Spent,
}

/// One pass through the stack: forward once, then backward once.
#[pyclass]
pub(crate) struct Pass {
    stack: Reversible,
    engine: Engine,
    layout: Layout,
    state: State,
}

/// The blocks: methods of a Python object.
struct Hooks<'a, 'py> {
    object: &'a Bound<'py, PyAny>,
    pass: &'a Bound<'py, Pass>,
    real_bytes: usize,
    /// The exception that stopped the pass.
    exception: Option<PyErr>,
}

impl<'py> Hooks<'_, 'py> {
    fn region(&self, be: &mut impl Exposed, r: Reals) -> bdia_core::Result<Region> {
        Ok(Region::new(self.pass.clone().unbind(), be.address(r)?, r.len() * self.real_bytes))
    }

    fn call(
        &mut self,
        name: &str,
        block: usize,
        args: impl pyo3::call::PyCallArgs<'py>,
    ) -> bdia_core::Result<()> {
        self.object.call_method1(name, args).map(|_| ()).map_err(|e| {
            self.exception.get_or_insert(e);
            Error::Foreign(Site::Block(block))
        })
    }
}

impl<B: Exposed> Input<B> for Hooks<'_, '_> {
    fn forward(
        &mut self,
        be: &mut B,
        c: &Chunk,
        _: bool,
        x: Reals,
        _: Reals,
    ) -> bdia_core::Result<()> {
        let x = self.region(be, x)?;
        self.call("input", 0, (c.first, c.samples, x))
    }

    fn vjp(&mut self, _: &mut B, _: &Chunk, _: Reals, _: Reals) -> bdia_core::Result<()> {
        Ok(())
    }
}

impl<B: Exposed> Blocks<B> for Hooks<'_, '_> {
    fn residual(&mut self, be: &mut B, call: &Call, h: Reals) -> bdia_core::Result<()> {
        let (x, h) = (self.region(be, call.x)?, self.region(be, h)?);
        self.call(
            "residual",
            call.block,
            (call.block, call.chunk.first, call.chunk.samples, x, h, call.keep),
        )
    }

    fn vjp(&mut self, be: &mut B, call: &Call, gh: Reals, gx: Reals) -> bdia_core::Result<()> {
        let (gh, gx) = (self.region(be, gh)?, self.region(be, gx)?);
        self.call("vjp", call.block, (call.block, call.chunk.first, call.chunk.samples, gh, gx))
    }

    fn done(&mut self, be: &mut B, block: usize) -> bdia_core::Result<()> {
        if let Some(fault) = be.peek_fault()? {
            return Err(fault.into());
        }
        self.call("done", block, (block,))
    }
}

/// Forward: `X_0` from the input, then all blocks.
fn forward<B: Exposed>(
    stack: &mut Reversible,
    be: &mut B,
    hooks: &mut Hooks<'_, '_>,
    place: &Place,
) -> bdia_core::Result<()> {
    stack.embed(be, hooks, place)?;
    stack.forward(be, hooks, place)?;
    be.take_fault()?.map_or(Ok(()), |fault| Err(fault.into()))
}

/// Backward: from `G_K`, which is in its place.
fn backward<B: Exposed>(
    stack: &mut Reversible,
    be: &mut B,
    hooks: &mut Hooks<'_, '_>,
    place: &Place,
) -> bdia_core::Result<()> {
    stack.backward(be, hooks, place)?;
    be.take_fault()?.map_or(Ok(()), |fault| Err(fault.into()))
}

impl Pass {
    /// Runs one way through the stack.
    fn run(
        slf: &Bound<'_, Self>,
        object: &Bound<'_, PyAny>,
        seed: u64,
        back: bool,
    ) -> PyResult<()> {
        let (py, mut this) = (slf.py(), slf.try_borrow_mut()?);
        let this = &mut *this;
        this.state = State::Spent;
        let mut hooks =
            Hooks { object, pass: slf, real_bytes: this.engine.real_bytes(), exception: None };
        let place = Place { seed, step: 0, global: 0 };
        let way = |stack: &mut Reversible, engine: &mut Engine, hooks: &mut Hooks<'_, '_>| {
            with!(engine, be => if back {
                backward(stack, be, hooks, &place)
            } else {
                forward(stack, be, hooks, &place)
            })
        };
        let result = way(&mut this.stack, &mut this.engine, &mut hooks);
        match (hooks.exception, result) {
            (Some(exception), _) => Err(exception),
            (None, Err(e)) => Err(refused(py, e)),
            (None, Ok(())) => {
                this.state = if back { State::Rebuilt } else { State::Forward(seed) };
                Ok(())
            }
        }
    }
}

#[pymethods]
impl Pass {
    /// Lays a pass out and allocates its memory. `double`: `f64` instead of `f32`.
    #[new]
    #[pyo3(signature = (
        *, batch, per_sample, blocks, chunk, frac_bits, gamma, sign, verify, threads, double
    ))]
    fn new(
        py: Python<'_>,
        batch: usize,
        per_sample: usize,
        blocks: usize,
        chunk: usize,
        frac_bits: u32,
        gamma: f64,
        sign: &str,
        verify: bool,
        threads: usize,
        double: bool,
    ) -> PyResult<Self> {
        let sign = self::sign(py, sign)?;
        let refuse = |e| refused(py, e);
        let grid = Grid::new(frac_bits).map_err(refuse)?;
        let gamma = Policy::fixed(Gamma::from_value(gamma, sign).map_err(refuse)?);
        let mut layout = Layout::new(if double { 8 } else { 4 });
        let config = Config {
            id: 0,
            batch,
            per_sample,
            blocks,
            chunk,
            tail: Tail::Output,
            needs: Needs::default(),
            ends_scratch: 0,
        };
        let stack =
            Reversible::layout(&config, grid, gamma, verify, &mut layout).map_err(refuse)?;
        let layout = layout.checked().map_err(refuse)?;
        let engine =
            if double { Engine::double(&layout) } else { Engine::single(&layout, threads) };
        Ok(Self { stack, engine: engine.map_err(|e| unable(py, e))?, layout, state: State::Fresh })
    }

    /// Calls `object.input(first, samples, x)` and `object.residual(block, first, samples, x, h,
    /// keep)`.
    fn forward(slf: &Bound<'_, Self>, object: &Bound<'_, PyAny>, seed: u64) -> PyResult<()> {
        let state = slf.try_borrow()?.state;
        if state != State::Fresh {
            return Err(raise(slf.py(), "Error", ("a pass goes forward once",)));
        }
        Self::run(slf, object, seed, false)
    }

    /// Calls `residual` with `keep`, `object.vjp(block, first, samples, gh, gx)` and
    /// `object.done(block)`.
    fn backward(slf: &Bound<'_, Self>, object: &Bound<'_, PyAny>) -> PyResult<()> {
        let state = slf.try_borrow()?.state;
        let State::Forward(seed) = state else {
            return Err(raise(
                slf.py(),
                "Error",
                ("a pass goes backward once, after it went forward",),
            ));
        };
        Self::run(slf, object, seed, true)
    }

    /// `X_k` of the whole batch, `i32`: `K` after the forward pass, 0 after the backward pass.
    fn activation(slf: &Bound<'_, Self>, k: usize) -> PyResult<Region> {
        let mut this = slf.try_borrow_mut()?;
        let place = this.stack.activation(k);
        let address = match &mut this.engine {
            Engine::Single(cpu) => cpu.ints_pointer(place),
            Engine::Double { ints, .. } => ints
                .get_mut(place.range())
                .map(<[i32]>::as_mut_ptr)
                .ok_or(Error::Handle("activation")),
        };
        let address = address.map_err(|e| refused(slf.py(), e))?;
        Ok(Region::new(slf.clone().unbind(), address.cast(), place.len() * 4))
    }

    /// `G_k` of the whole batch: `K` to be set before the backward pass, 0 after it.
    fn gradient(slf: &Bound<'_, Self>, k: usize) -> PyResult<Region> {
        let mut this = slf.try_borrow_mut()?;
        let (place, bytes) = (this.stack.gradient(k), this.engine.real_bytes());
        let address =
            with!(&mut this.engine, be => be.address(place)).map_err(|e| refused(slf.py(), e))?;
        Ok(Region::new(slf.clone().unbind(), address, place.len() * bytes))
    }

    /// All side bits: block by block, sample by sample, plane by plane.
    fn side_bits(&mut self, py: Python<'_>) -> PyResult<Vec<u32>> {
        let place: Words = self.stack.side_bits();
        let mut words = vec![0; place.len()];
        with!(&mut self.engine, be => be.read_words(place, &mut words))
            .map_err(|e| refused(py, e))?;
        Ok(words)
    }

    /// Values that the backward pass rebuilt differently (with `verify`).
    fn mismatches(&mut self, py: Python<'_>) -> PyResult<u64> {
        let stack = self.stack;
        with!(&mut self.engine, be => stack.mismatches(&*be)).map_err(|e| refused(py, e))
    }

    /// Turns the lowest bit of value `index` of `X_k`: what a memory fault does. For tests.
    fn flip(&mut self, py: Python<'_>, k: usize, index: usize) -> PyResult<()> {
        let place: Ints = self.stack.activation(k).sub(index, 1);
        let mut value = [0];
        with!(&mut self.engine, be => {
            be.read_ints(place, &mut value).and_then(|()| be.write_ints(place, &[value[0] ^ 1]))
        })
        .map_err(|e| refused(py, e))
    }

    /// Bytes by category.
    fn memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let table = PyDict::new(py);
        for (name, category) in [
            ("activations", Category::Activations),
            ("activation_gradients", Category::ActivationGradients),
            ("side_bits", Category::SideBits),
            ("workspace", Category::Workspace),
            ("verify", Category::Verify),
        ] {
            table.set_item(name, self.layout.bytes(category))?;
        }
        table.set_item("total", self.layout.total())?;
        Ok(table)
    }
}
