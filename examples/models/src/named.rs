//! Parameter tensors under the names of their files: reading, writing, initial values.

use std::path::Path;
use std::sync::Mutex;
use std::thread::Builder;

use bdia_core::Real;
use bdia_core::arena::{Reals, Words};
use bdia_core::backend::{Backend, Half};
use bdia_core::error::Result;
use bdia_core::layers::{
    Branches, Freeze, Home, Init, LoraShape, Params, Residual, Tensor, Tensors,
};

use crate::weights::{self, Sink, Source, WeightsError};

/// Values that are copied at a time.
const PIECE: usize = 1 << 14;

/// What is trained in place of the blocks of a network, which stay as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapters {
    /// Rank and factor of the adapters: of queries and values, or of every linear layer.
    pub shape: LoraShape,
    /// Storage of the blocks' matrices, where it is 16 bits; norms, biases and what is outside the
    /// blocks always are reals.
    pub half: Option<Half>,
}

impl Adapters {
    /// The adapters of the blocks, and what is frozen there.
    pub fn of_blocks(adapters: Option<Self>) -> (Option<LoraShape>, Freeze) {
        let freeze = adapters.map_or(Freeze::Nothing, |a| Freeze::All(a.half));
        (adapters.map(|a| a.shape), freeze)
    }

    /// What is frozen outside the blocks.
    pub fn of_ends(adapters: Option<Self>) -> Freeze {
        adapters.map_or(Freeze::Nothing, |_| Freeze::All(None))
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
    /// The tensor as its part has it.
    pub tensor: Tensor,
    /// The values; empty where they are stored in 16 bits.
    pub values: Reals,
    /// The values that are stored in 16 bits.
    pub narrow: Option<(Half, Words)>,
    /// Their gradient; with fused updates the buffer that all blocks use.
    pub gradient: Reals,
    /// The optimizer's state.
    pub state: [Reals; 2],
}

impl Named {
    /// Tensor `t` of group `k`, with the shape that it has here.
    pub fn new(name: String, params: &Params, k: usize, t: &Tensor) -> Self {
        Self {
            name,
            shape: if t.matrix { vec![t.rows, t.cols] } else { vec![t.cols] },
            transposed: false,
            tensor: *t,
            values: params.value(k, t),
            narrow: params.words(k, t),
            gradient: params.gradient(k, t),
            state: params.state(k, t),
        }
    }

    /// The same where the file has the transpose of a matrix.
    #[must_use]
    pub fn transposed(mut self) -> Self {
        if self.tensor.matrix {
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
        self.narrow.is_none_or(|(half, _)| half.value(rounded(half, x)).is_finite())
    }

    /// Writes values from index `at` on, an even one, as the tensor is stored: rounded to nearest
    /// where that is in 16 bits (see [`holds`](Self::holds)).
    ///
    /// # Errors
    /// What the backend reports.
    pub fn put<B: Backend>(&self, be: &mut B, at: usize, values: &[B::Real]) -> Result<()> {
        let Some((half, words)) = self.narrow else {
            return be.write_reals(self.values.sub(at, values.len()), values);
        };
        let bits = |x: B::Real| rounded(half, x.wide() as f32);
        let mut piece = [0; 256];
        for (i, values) in values.chunks(2 * piece.len()).enumerate() {
            let piece = &mut piece[..values.len().div_ceil(2)];
            for (word, pair) in piece.iter_mut().zip(values.chunks(2)) {
                *word = bits(pair[0]) | pair.get(1).map_or(0, |&x| bits(x) << 16);
            }
            be.write_words(words.sub(at / 2 + i * 256, piece.len()), piece)?;
        }
        Ok(())
    }

    /// Reads values from index `at` on, an even one.
    ///
    /// # Errors
    /// What the backend reports.
    pub fn get<B: Backend<Real = f32>>(&self, be: &B, at: usize, out: &mut [f32]) -> Result<()> {
        let Some((half, words)) = self.narrow else {
            return be.read_reals(self.values.sub(at, out.len()), out);
        };
        let mut pairs = vec![0; out.len().div_ceil(2)];
        be.read_words(words.sub(at / 2, pairs.len()), &mut pairs)?;
        for (i, x) in out.iter_mut().enumerate() {
            *x = half.value(pairs[i / 2] >> (i % 2 * 16) & 0xFFFF);
        }
        Ok(())
    }
}

/// The nearest value of 16 bits.
fn rounded(half: Half, x: f32) -> u32 {
    u32::from(match half {
        Half::Bf16 => half::bf16::from_f32(x).to_bits(),
        Half::F16 => half::f16::from_f32(x).to_bits(),
    })
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

/// All tensors of a checkpoint, in order: the parameters, then the optimizer's state.
pub fn saved(trained: &[Named]) -> Vec<Reals> {
    let states = trained.iter().flat_map(|t| t.state).filter(|s| !s.is_empty());
    trained.iter().map(|t| t.values).chain(states).collect()
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
        for state in named.state {
            be.fill_reals(state, B::Real::of(0.0))?;
        }
        let t = &named.tensor;
        let draw = |first: usize, values: &mut [B::Real]| {
            for (row, line) in values.chunks_mut(t.cols.max(1)).enumerate() {
                t.draw(seed, i as u32, first + row, line);
            }
        };
        // Pieces begin at an even value.
        let share = PIECE.div_ceil(t.cols.max(1)).next_multiple_of(2);
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
        if let [t] = parts
            && !t.transposed
        {
            weights.stream(&name, &mut |at, values| {
                each(&name, values);
                if let Some(&value) = values.iter().find(|v| !t.holds(**v)) {
                    return Err(WeightsError::Narrow { name: name.clone(), value });
                }
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
