//! Parameter tensors under the names of their files: reading, writing, initial values.

use std::path::Path;
use std::sync::Mutex;
use std::thread::Builder;

use bdia_core::arena::{Reals, Words};
use bdia_core::backend::{Backend, Order, State};
use bdia_core::error::{Error, Result};
use bdia_core::layers::{
    Branches, Freeze, Home, Init, LoraShape, Params, Residual, Store, Tensor, Tensors,
};
use bdia_core::{Packed, Real};

use crate::packing;
use crate::weights::{self, Sink, Source, WeightsError};

/// Values that are copied at a time.
const PIECE: usize = 1 << 14;
/// Values whose bits are taken at a time.
const AT_ONCE: usize = 256;

/// What is trained in place of the blocks of a network, which stay as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapters {
    /// Rank and factor of the adapters: of queries and values, or of every linear layer.
    pub shape: LoraShape,
    /// How the rest is stored.
    pub frozen: Frozen,
}

/// How matrices that stay as they are are stored, where it is in few bits; norms and biases always
/// are reals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Frozen {
    /// Those of the blocks.
    pub blocks: Option<Store>,
    /// The embedding and the head of a language model.
    pub ends: Option<Store>,
}

impl Adapters {
    /// Adapters of a network that is stored in reals.
    pub fn new(shape: LoraShape) -> Self {
        Self { shape, frozen: Frozen::default() }
    }

    /// The adapters of the blocks, and what is frozen there.
    pub fn of_blocks(adapters: Option<Self>) -> (Option<LoraShape>, Freeze) {
        let freeze = adapters.map_or(Freeze::Nothing, |a| Freeze::All(a.frozen.blocks));
        (adapters.map(|a| a.shape), freeze)
    }

    /// What is frozen outside the blocks.
    pub fn of_ends(adapters: Option<Self>) -> Freeze {
        adapters.map_or(Freeze::Nothing, |a| Freeze::All(a.frozen.ends))
    }
}

/// A parameter tensor of a network. Tensors of one name that follow one another are parts of one
/// tensor of the file, along its first dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The shape in a file.
    pub shape: Vec<usize>,
    /// Whether the file has the transpose: linear layers that are `[out, in]` there.
    pub transposed: bool,
    /// `Transposed`: the values lie as files have them, which is the transpose.
    pub order: Order,
    /// The tensor as its part has it.
    pub tensor: Tensor,
    /// The values; empty where they are stored in few bits.
    pub values: Reals,
    /// The values that are stored in few bits, in the order of the shape.
    pub packed: Option<Packed>,
    /// Their gradient; with fused updates the buffer that all blocks use.
    pub gradient: Reals,
    /// The optimizer's state.
    pub state: State,
}

impl Named {
    /// Tensor `t` of group `k`, which has these `tensors`, with the shape that it has here.
    pub fn new(
        name: String,
        params: &Params,
        k: usize,
        t: &Tensor,
        tensors: &(impl Tensors + ?Sized),
    ) -> Self {
        let stored = params.stored(t);
        Self {
            name,
            order: stored.map_or(Order::Plain, |stored| stored.order),
            shape: match stored {
                Some(stored) => stored.shape(t.rows, t.cols).to_vec(),
                None if t.matrix => vec![t.rows, t.cols],
                None => vec![t.cols],
            },
            transposed: false,
            tensor: *t,
            values: params.value(k, t),
            packed: params.packed(k, t),
            gradient: params.gradient(k, t),
            state: params.state(k, t, tensors),
        }
    }

    /// The same where the file has the transpose of a matrix.
    #[must_use]
    pub fn transposed(mut self) -> Self {
        // What is stored as files have it needs no change.
        if self.tensor.matrix && self.order == Order::Plain {
            self.shape = vec![self.tensor.cols, self.tensor.rows];
            self.transposed = true;
        }
        self
    }

    /// Number of values.
    pub const fn len(&self) -> usize {
        self.tensor.len()
    }

    /// Whether there is no value.
    pub const fn is_empty(&self) -> bool {
        self.tensor.is_empty()
    }

    /// Whether it is trained.
    pub fn is_trained(&self) -> bool {
        self.tensor.home == Home::Trained
    }

    /// Whether it is an adapter's `A`, which files have as it is here.
    pub fn is_adapter_input(&self) -> bool {
        self.tensor.name.ends_with(".lora_A")
    }

    /// Whether it is a part of an adapter.
    pub fn is_adapter(&self) -> bool {
        self.tensor.name.contains(".lora_")
    }

    /// Whether a finite value stays finite as the tensor is stored.
    pub fn holds(&self, x: f32) -> bool {
        self.packed.is_none_or(|p| x.abs() <= packing::largest(p.packing))
    }

    /// Writes values from index `at` on, a multiple of 64, as the tensor is stored: rounded where
    /// that is in few bits (see [`holds`](Self::holds)).
    ///
    /// # Errors
    /// Few bits that cannot be written, or that a value does not fit; what the backend reports.
    pub fn put<B: Backend>(&self, be: &mut B, at: usize, values: &[B::Real]) -> Result<()> {
        let Some(Packed { packing, words, neighbours, .. }) = self.packed else {
            return be.write_reals(self.values.sub(at, values.len()), values);
        };
        let unit = packing.values();
        if !packing::WRITTEN.contains(&packing) || neighbours > 0 || !at.is_multiple_of(64) {
            let possible = "F32, F16, BF16, Q8_0 or Q4_0, in pieces of 64 values";
            return Err(Error::unfit("storage of a tensor that is written", "another", possible));
        }
        let (mut wide, mut bytes, mut whole) = (Vec::new(), Vec::new(), Vec::new());
        for (i, values) in values.chunks(64 * 64).enumerate() {
            wide.clear();
            wide.extend(values.iter().map(|x| x.wide() as f32));
            bytes.clear();
            if !wide.chunks(unit).all(|block| packing::pack(packing, block, &mut bytes)) {
                let possible = "finite ones, in the range of the packing";
                return Err(Error::unfit("values that are stored in few bits", "others", possible));
            }
            packing::to_words(&bytes, &mut whole);
            let first = (at + i * 64 * 64) / unit * packing.bytes() / 4;
            be.write_words(words.sub(first, whole.len()), &whole)?;
        }
        Ok(())
    }

    /// Reads values from index `at` on.
    ///
    /// # Errors
    /// Values that are mapped; what the backend reports.
    pub fn get<B: Backend<Real = f32>>(&self, be: &B, at: usize, out: &mut [f32]) -> Result<()> {
        let Some(p) = self.packed else {
            return be.read_reals(self.values.sub(at, out.len()), out);
        };
        let (row_bytes, cols) = (p.packing.row_bytes(p.cols)?, p.cols.max(1));
        let (mut words, mut wide) = (Vec::new(), vec![0.0; cols]);
        let mut done = 0;
        while done < out.len() {
            let (row, col) = ((at + done) / cols, (at + done) % cols);
            let from = p.stored(row) * row_bytes;
            words.resize((from % 4 + row_bytes).div_ceil(4), 0);
            be.read_words(p.words.sub(from / 4, words.len()), &mut words)?;
            let bytes: Vec<_> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            p.packing.unpack(&bytes[from % 4..][..row_bytes], &mut wide);
            let n = (cols - col).min(out.len() - done);
            out[done..done + n].copy_from_slice(&wide[col..col + n]);
            done += n;
        }
        Ok(())
    }
}

/// The tensors of block `k` that are there, in order.
pub fn of_block<P: Branches>(blocks: &Residual<P>, k: usize) -> Vec<(&Params, usize, Tensor)> {
    let mut list = Vec::new();
    // The closure does not fail.
    let _ = blocks.each(&mut |t| {
        if !t.is_empty() {
            list.push((&blocks.params, k, *t));
        }
        Ok(())
    });
    list
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Saved {
    /// Values, or moments.
    Reals(Reals),
    /// Moments in few bits.
    Words(Words),
}

impl Saved {
    /// Number of values or words, of four bytes each.
    pub const fn len(&self) -> usize {
        match self {
            Self::Reals(h) => h.len(),
            Self::Words(h) => h.len(),
        }
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the bits are those of real numbers.
    pub const fn is_real(&self) -> bool {
        matches!(self, Self::Reals(_))
    }

    /// Reads the bits from index `at` on.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn get<B: Backend<Real = f32>>(&self, be: &B, at: usize, bits: &mut [u32]) -> Result<()> {
        let h = match self {
            Self::Words(h) => return be.read_words(h.sub(at, bits.len()), bits),
            Self::Reals(h) => h,
        };
        let mut values = [0.0; AT_ONCE];
        for (i, bits) in bits.chunks_mut(AT_ONCE).enumerate() {
            let values = &mut values[..bits.len()];
            be.read_reals(h.sub(at + i * AT_ONCE, values.len()), values)?;
            bits.iter_mut().zip(values).for_each(|(bits, x)| *bits = x.to_bits());
        }
        Ok(())
    }

    /// Writes the bits from index `at` on.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn put<B: Backend<Real = f32>>(&self, be: &mut B, at: usize, bits: &[u32]) -> Result<()> {
        let h = match self {
            Self::Words(h) => return be.write_words(h.sub(at, bits.len()), bits),
            Self::Reals(h) => h,
        };
        let mut values = [0.0; AT_ONCE];
        for (i, bits) in bits.chunks(AT_ONCE).enumerate() {
            let values = &mut values[..bits.len()];
            values.iter_mut().zip(bits).for_each(|(x, bits)| *x = f32::from_bits(*bits));
            be.write_reals(h.sub(at + i * AT_ONCE, values.len()), values)?;
        }
        Ok(())
    }
}

/// All tensors of a checkpoint, in order: the parameters, then the optimizer's state.
pub fn saved(trained: &[Named]) -> Vec<Saved> {
    let states = trained.iter().flat_map(|t| {
        let State { reals: [a, b], codes: [c, d] } = t.state;
        [Saved::Reals(a), Saved::Reals(b), Saved::Words(c), Saved::Words(d)]
    });
    let values = trained.iter().map(|t| Saved::Reals(t.values));
    values.chain(states.filter(|s| !s.is_empty())).collect()
}

/// Initial values of tensors, which have their places in the random stream by their order; the
/// optimizer's state becomes 0. `threads` share the rows.
///
/// # Errors
/// Those of writing.
pub fn initialize<B: Backend>(
    be: &mut B,
    tensors: &[Named],
    seed: u64,
    threads: usize,
) -> Result<()> {
    let (mut piece, threads) = (Vec::new(), threads.max(1));
    for (i, named) in tensors.iter().enumerate() {
        named.state.clear(be)?;
        let t = &named.tensor;
        if named.order == Order::Transposed {
            let possible = "in the order of the layer";
            return Err(Error::unfit(
                "a matrix that is drawn",
                "stored as files have it",
                possible,
            ));
        }
        let draw = |first: usize, values: &mut [B::Real]| {
            for (row, line) in values.chunks_mut(t.cols.max(1)).enumerate() {
                t.draw(seed, i as u32, first + row, line);
            }
        };
        // Pieces of what is stored in few bits begin at a multiple of 64 values.
        let even = if named.packed.is_some() { 64 } else { 1 };
        let share = PIECE.div_ceil(t.cols.max(1)).next_multiple_of(even);
        let cheap = matches!(t.init, Init::Zeros | Init::Ones) || t.rows == 1;
        let together = if cheap { 1 } else { threads };
        for first in (0..t.rows).step_by(share * together) {
            piece.resize((share * together).min(t.rows - first) * t.cols, B::Real::of(0.0));
            if together == 1 {
                draw(first, &mut piece);
            } else {
                let parts = Mutex::new(piece.chunks_mut((share * t.cols).max(1)).enumerate());
                let next = || parts.lock().map_or(None, |mut parts| parts.next());
                let work = || {
                    while let Some((part, values)) = next() {
                        draw(first + part * share, values);
                    }
                };
                std::thread::scope(|scope| {
                    // A thread that the system refuses is not missed: its parts are done by others.
                    let workers: Vec<_> = (1..together)
                        .map_while(|_| Builder::new().spawn_scoped(scope, work).ok())
                        .collect();
                    work();
                    // Joined one by one: the end of the scope does not wait until the memory of a
                    // thread itself is free.
                    for worker in workers {
                        if let Err(panic) = worker.join() {
                            std::panic::resume_unwind(panic);
                        }
                    }
                });
            }
            named.put(be, first * t.cols, &piece)?;
        }
    }
    Ok(())
}

/// The tensors of a file: name, shape, and which of `tensors` they consist of.
fn of_file(tensors: &[Named]) -> Vec<(String, Vec<usize>, core::ops::Range<usize>)> {
    let mut list: Vec<(String, Vec<usize>, core::ops::Range<usize>)> = Vec::new();
    for (i, t) in tensors.iter().enumerate() {
        match list.last_mut().filter(|last| last.0 == t.name) {
            Some(last) => {
                last.1[0] += t.shape[0];
                last.2.end = i + 1;
            }
            None => list.push((t.name.clone(), t.shape.clone(), i..i + 1)),
        }
    }
    list
}

/// Names and shapes of a file with these tensors.
pub fn shapes(tensors: &[Named]) -> Vec<(String, Vec<usize>)> {
    of_file(tensors).into_iter().map(|(name, shape, _)| (name, shape)).collect()
}

/// Reads all tensors. `each` sees every value of the file once, in order, under its name.
///
/// # Errors
/// Every tensor that is missing, unexpected or of another shape; values that do not fit the 16
/// bits in which the network stores them.
pub fn read<B: Backend<Real = f32>>(
    weights: &dyn Source,
    tensors: &[Named],
    be: &mut B,
    mut each: impl FnMut(&str, &[f32]),
) -> core::result::Result<(), WeightsError> {
    weights.check(&shapes(tensors))?;
    for (name, shape, range) in of_file(tensors) {
        let parts = &tensors[range];
        let packed = parts.iter().find_map(|t| t.packed.as_ref());
        let extent = packed.and(weights.extent(&name));
        if let (Some(x), Some(extent)) = (packed, &extent)
            && extent.is_stored_as(x)
            && matches!(parts, [t] if !t.transposed)
        {
            weights.stream(&name, &mut |_, values| {
                each(&name, values);
                Ok(())
            })?;
            extent.store(be, x)?;
            continue;
        }
        if let Some(x) = packed.filter(|x| x.words.is_mapped() || x.neighbours > 0) {
            let expected = format!("{}, to be used where it lies", x.packing.name());
            let found = extent.map_or("values that have to be converted".into(), |b| {
                format!("{} in another order", b.packing.name())
            });
            return Err(WeightsError::Stored { name, expected, found });
        }
        if let [t] = parts
            && !t.transposed
            && t.packed.is_none()
        {
            weights.stream(&name, &mut |at, values| {
                each(&name, values);
                Ok(t.put(be, at, values)?)
            })?;
            continue;
        }
        let mut file = vec![0.0; shape.iter().product()];
        weights.read(&name, &mut file)?;
        each(&name, &file);
        if let Some(&value) = file.iter().find(|v| parts.iter().any(|t| !t.holds(**v))) {
            return Err(WeightsError::Narrow { name, value });
        }
        let mut rest = file.as_slice();
        for t in parts {
            let (part, after) = rest.split_at(t.len());
            rest = after;
            if t.transposed {
                t.put(be, 0, &transpose(part, t.tensor.cols))?;
            } else {
                t.put(be, 0, part)?;
            }
        }
    }
    Ok(())
}

/// Writes all tensors to a safetensors file; `full_name` is a tensor's name there.
///
/// # Errors
/// A file that cannot be written; an existing one is untouched then.
pub fn write<B: Backend<Real = f32>>(
    path: &Path,
    tensors: &[Named],
    be: &B,
    full_name: impl Fn(&str) -> String,
) -> core::result::Result<(), WeightsError> {
    let file = of_file(tensors);
    let named: Vec<_> =
        file.iter().map(|(name, shape, _)| (full_name(name), shape.clone())).collect();
    weights::write::<WeightsError>(path, &named, |i, sink| {
        for t in &tensors[file[i].2.clone()] {
            put(t, be, sink)?;
        }
        Ok(())
    })
}

/// Writes a network and its adapters as an ordinary network: `W += s·(B·A)ᵀ`, summed in `f64`.
/// `tensors` has the adapters of every block, in the order of the blocks.
///
/// # Errors
/// As [`write()`].
pub fn write_merged<B: Backend<Real = f32>>(
    path: &Path,
    tensors: Vec<Named>,
    adapters: Option<Adapters>,
    be: &B,
) -> core::result::Result<(), WeightsError> {
    let (parts, tensors): (Vec<_>, Vec<_>) = tensors.into_iter().partition(Named::is_adapter);
    let (file, mut pairs) = (of_file(&tensors), parts.chunks_exact(2));
    weights::write::<WeightsError>(path, &shapes(&tensors), |i, sink| {
        for t in &tensors[file[i].2.clone()] {
            let pair = if t.tensor.name == "attn.c_attn.weight" { pairs.next() } else { None };
            let (Some(adapters), Some([a, b])) = (adapters, pair) else {
                put(t, be, sink)?;
                continue;
            };
            let values = with_adapter(t, a, b, adapters.shape, be)?;
            sink.put(&if t.transposed { transpose(&values, t.tensor.rows) } else { values })?;
        }
        Ok(())
    })
}

/// A value of a matrix with what an adapter adds: `x + s·Σ a·b`, summed in `f64`.
pub(crate) fn with_products(x: f32, s: f64, factors: impl Iterator<Item = (f32, f32)>) -> f32 {
    let sum = factors.map(|(a, b)| f64::from(a) * f64::from(b)).sum::<f64>();
    (f64::from(x) + s * sum) as f32
}

/// The values of `c_attn` with its adapter.
fn with_adapter<B: Backend<Real = f32>>(
    t: &Named,
    a: &Named,
    b: &Named,
    shape: LoraShape,
    be: &B,
) -> Result<Vec<f32>> {
    let (d, r, all) = (t.tensor.rows, shape.rank, t.tensor.cols);
    let (mut values, mut down, mut up) =
        (vec![0.0; t.len()], vec![0.0; a.len()], vec![0.0; b.len()]);
    t.get(be, 0, &mut values)?;
    a.get(be, 0, &mut down)?;
    b.get(be, 0, &mut up)?;
    for (i, row) in values.chunks_exact_mut(all).enumerate() {
        // Queries have the first r rows of both, values the others; keys have none.
        for (rows, at) in [(0..r, 0), (r..2 * r, 2 * d)] {
            for (j, x) in row[at..at + d].iter_mut().enumerate() {
                let factors = rows.clone().map(|q| (down[q * d + i], up[q * d + j]));
                *x = with_products(*x, shape.scale(), factors);
            }
        }
    }
    Ok(values)
}

fn put<B: Backend<Real = f32>>(
    t: &Named,
    be: &B,
    sink: &mut Sink<'_>,
) -> core::result::Result<(), WeightsError> {
    if t.transposed {
        let mut ours = vec![0.0; t.len()];
        t.get(be, 0, &mut ours)?;
        return sink.put(&transpose(&ours, t.tensor.rows));
    }
    let mut piece = vec![0.0; PIECE.min(t.len())];
    for at in (0..t.len()).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(t.len() - at)];
        t.get(be, at, piece)?;
        sink.put(piece)?;
    }
    Ok(())
}

/// The transpose of a matrix whose transpose has `cols` columns.
fn transpose(values: &[f32], cols: usize) -> Vec<f32> {
    let rows = values.len() / cols.max(1);
    (0..values.len()).map(|at| values[at % cols * rows + at / cols]).collect()
}
