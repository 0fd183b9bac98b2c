//! State files, modes and small models for the tests.
#![allow(dead_code, clippy::unwrap_used)]

pub mod transformers;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bdia_core::backend::{Backend, Gelu};
use bdia_core::layers::{Gradients, LoraShape};
use bdia_core::network::{Outcome, Step};
use bdia_core::optim::Rule;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Error, FloatGamma, Gamma, Grid, Layout, Policy, Real, Reference, Sign, Storage};
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};
use bdia_models::inference::Inference;
use bdia_models::named::{self, Adapters, Frozen, Named};
use safetensors::{Dtype, SafeTensors};

/// A state file in memory: reals and integers and the metadata.
pub struct State {
    pub reals: HashMap<String, Vec<f64>>,
    pub ints: HashMap<String, Vec<i32>>,
    pub meta: HashMap<String, String>,
}

/// A file of GPT-2's among `tests/data`.
pub fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gpt2").join(name)
}

/// A state file among `tests/data`.
pub fn state(name: &str) -> State {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let meta = header.metadata().clone().unwrap_or_default();
    let (mut reals, mut ints) = (HashMap::new(), HashMap::new());
    for (name, t) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let words = t.data().as_chunks::<4>().0.iter();
        match t.dtype() {
            Dtype::F64 => {
                let values = t.data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b));
                reals.insert(name, values.collect());
            }
            Dtype::F32 => {
                reals.insert(name, words.map(|b| f32::from_le_bytes(*b).into()).collect());
            }
            Dtype::I32 => {
                ints.insert(name, words.map(|b| i32::from_le_bytes(*b)).collect());
            }
            other => panic!("unexpected dtype {other:?} in a state file"),
        }
    }
    State { reals, ints, meta }
}

impl State {
    pub fn number(&self, key: &str) -> f64 {
        self.meta[key].parse().unwrap()
    }

    pub fn size(&self, key: &str) -> usize {
        self.meta[key].parse().unwrap()
    }

    pub fn is(&self, key: &str) -> bool {
        self.meta[key] == "true"
    }

    /// The dimensions of a GPT-2.
    pub fn dims(&self) -> Dims {
        Dims {
            vocab: self.size("vocab_size"),
            positions: self.size("n_positions"),
            width: self.size("n_embd"),
            layers: self.size("n_layer"),
            heads: self.size("n_head"),
            inner: 4 * self.size("n_embd"),
            eps: self.number("layer_norm_epsilon"),
            gelu: Gelu::Tanh,
            tied: self.is("tie_word_embeddings"),
            dropout: [0.0; 3],
        }
    }

    /// Values of kind `param` or `grad` as a model holds them: the parts of a tensor of the file,
    /// transposed where the file has the transpose. The file has these tensors and no others.
    pub fn of(&self, kind: &str, tensors: &[Named]) -> Vec<Vec<f64>> {
        let shapes = named::shapes(tensors);
        let there = self.reals.keys().filter(|name| name.starts_with(&format!("{kind}."))).count();
        assert_eq!(shapes.len(), there, "the tensors");
        let file = |name: &str| &self.reals[&format!("{kind}.{name}")];
        for (name, shape) in &shapes {
            assert_eq!(shape.iter().product::<usize>(), file(name).len(), "{name}");
        }
        let (mut before, mut at) = ("", 0);
        let mut held = Vec::new();
        for t in tensors {
            if t.name != before {
                (before, at) = (&t.name, 0);
            }
            let part = &file(&t.name)[at..][..t.len()];
            at += t.len();
            let (rows, cols) = (t.tensor.rows, t.tensor.cols);
            held.push(if t.transposed {
                (0..rows * cols).map(|i| part[i % cols * rows + i / cols]).collect()
            } else {
                part.to_vec()
            });
        }
        held
    }

    /// Writes the parameters; the optimizer's state becomes 0.
    pub fn load<B: Backend>(&self, be: &mut B, tensors: &[Named]) {
        for (t, values) in tensors.iter().zip(self.of("param", tensors)) {
            let values: Vec<_> = values.into_iter().map(B::Real::of).collect();
            be.write_reals(t.values, &values).unwrap();
            t.state.clear(be).unwrap();
        }
    }
}

/// The largest difference in parts of the largest magnitude, or of `least` where that is larger.
pub fn difference(ours: &[f64], theirs: &[f64], least: f64) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let scale = theirs.iter().fold(least, |a, x| a.max(x.abs()));
    ours.iter().zip(theirs).fold(0.0_f64, |a, (x, y)| a.max((x - y).abs())) / scale
}

pub fn grid() -> Grid {
    Grid::new(14).unwrap()
}

/// γ = ±1/2 on a grid.
pub fn bdia(frac_bits: u32, sign: Sign) -> Mode {
    let (grid, gamma) = (Grid::new(frac_bits).unwrap(), Gamma::new(1, sign).unwrap());
    Mode::Bdia { grid, gamma: Policy::fixed(gamma), verify: false }
}

/// γ = ±1/2 without a grid.
pub fn bdia_float(sign: Sign) -> Mode {
    Mode::BdiaFloat { gamma: FloatGamma::new(0.5, sign).unwrap(), verify: false }
}

/// The mode whose originals are kept, where it rebuilds any.
pub fn verified(mut mode: Mode) -> Mode {
    if let Mode::Bdia { verify, .. } | Mode::BdiaFloat { verify, .. } = &mut mode {
        *verify = true;
    }
    mode
}

pub const STANDARD: Mode = Mode::Standard { grid: None };

pub const fn checkpoint(every: usize) -> Mode {
    Mode::Checkpoint { every, grid: None }
}

/// The network without a grid, with a constant γ.
pub fn float(gamma: f64) -> Inference {
    Inference::Float(FloatGamma::new(gamma, Sign::Plus).unwrap())
}

/// The network on the grid, with a constant γ where that is not 0.
pub fn quantized(gamma: f64) -> Inference {
    if gamma == 0.0 {
        return Inference::Quantized(None);
    }
    Inference::constant(Gamma::from_value(gamma, Sign::Plus).unwrap())
}

pub fn small() -> Dims {
    Dims {
        vocab: 19,
        positions: 10,
        width: 12,
        layers: 4,
        heads: 2,
        inner: 20,
        eps: 1e-5,
        gelu: Gelu::Tanh,
        tied: true,
        dropout: [0.0; 3],
    }
}

/// A GPT-2 that is only run, on one thread.
pub fn setup(dims: Dims, batch: usize, context: usize, mode: Mode) -> Setup {
    Setup {
        dims,
        batch,
        accumulate: 1,
        context,
        mode,
        gradients: Gradients::None,
        blocks_per_step: 1,
        adapters: None,
        packed: false,
        smoothing: 0.0,
        threads: 1,
        library: 0,
    }
}

pub const SGD: Rule = Rule::Sgd { momentum: 0.0 };
pub const ADAMW: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 };

/// The first step, with a learning rate that changes nothing.
pub const STILL: Step = Step { step: 0, seed: 0, lr: 0.0, weight_decay: 0.0, clip: 0.0 };

/// Sample `i` of the global batch: a sequence that can be learned by a model with [`small`]'s
/// vocabulary.
pub fn sample(i: usize, x: &mut [i32], y: &mut [i32]) {
    for (t, (x, y)) in x.iter_mut().zip(y).enumerate() {
        (*x, *y) = (((i * 5 + t * 3) % 19) as i32, ((i * 5 + (t + 1) * 3) % 19) as i32);
    }
}

/// Some steps of a model that begins anew, on the same samples: what came of them, and what is
/// trained after them.
pub fn run<B: Backend>(
    be: &mut B,
    model: &mut Gpt2,
    steps: u32,
    step: Step,
) -> Result<(Vec<Outcome>, Vec<B::Real>), Error> {
    let (context, batch) = (model.setup().context, model.setup().batch);
    model.initialize(be, 3)?;
    if model.setup().adapters.is_some() {
        model.initialize_adapters(be, 3)?;
    }
    let mut outcomes = Vec::new();
    for i in 0..steps {
        outcomes.push(model.train(be, &Step { step: i, ..step }, |micro, x, y| {
            for (j, (x, y)) in x.chunks_mut(context).zip(y.chunks_mut(context)).enumerate() {
                sample(micro * batch + j, x, y);
            }
            Ok::<(), Error>(())
        })?);
    }
    let mut all = Vec::new();
    for t in model.trained() {
        let mut values = vec![B::Real::of(0.0); t.len()];
        be.read_reals(t.values, &mut values)?;
        all.extend(values);
    }
    Ok((outcomes, all))
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Memory for a reference backend.
pub struct Memory<R>(Vec<i32>, Vec<R>, Vec<u32>);

impl<R: Real> Memory<R> {
    /// Memory full of garbage, as a caller's might be.
    pub fn new(layout: &Layout) -> Self {
        let (i, r, w) = layout.arenas();
        Self(vec![-7; i], vec![R::nan(); r], vec![0xDEAD_BEEF; w])
    }

    pub fn backend(&mut self, layout: &Layout) -> Reference<'_, R> {
        Reference::new(layout, &mut self.0, &mut self.1, &mut self.2).unwrap()
    }
}

pub fn lay_out<R: Real>(setup: &Setup, chunk: usize, head_rows: usize) -> (Gpt2, Layout) {
    Gpt2::layout::<Reference<'_, R>>(setup, Choice::new(chunk, head_rows)).unwrap()
}

/// Adapters of a small network.
pub const ADAPTERS: Adapters = Adapters {
    shape: LoraShape { rank: 2, alpha: 3.0 },
    frozen: Frozen { blocks: None, ends: None },
};

fn of_adapters(tensors: &[Named]) -> Vec<&Named> {
    tensors.iter().filter(|t| t.is_adapter()).collect()
}

/// Gives the adapters among what is trained some values; returns them: `A` and `B` of every block.
pub fn set_adapters(be: &mut Reference<'_, f64>, trained: &[Named]) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    for (n, t) in of_adapters(trained).into_iter().enumerate() {
        let values: Vec<f64> = (0..t.len()).map(|i| 0.3 * ((7 * i + n) as f64).sin()).collect();
        be.write_reals(t.values, &values).unwrap();
        all.push(values);
    }
    all
}

/// The matrices that have adapters, in the order of the blocks.
fn adapted(tensors: &[Named]) -> impl Iterator<Item = &Named> {
    tensors.iter().filter(|t| t.tensor.name == "attn.c_attn.weight")
}

/// Calls with the places in `W`, `A` and `B` of every product of the sum `W += s·(B·A)ᵀ`.
fn products(t: &Named, mut each: impl FnMut(usize, usize, usize)) {
    let (d, all, r) = (t.tensor.rows, t.tensor.cols, ADAPTERS.shape.rank);
    for (rows, at) in [(0..r, 0), (r..2 * r, 2 * d)] {
        for q in rows {
            for (i, j) in (0..d).flat_map(|i| (0..d).map(move |j| (i, j))) {
                each(i * all + at + j, q * d + i, q * d + j);
            }
        }
    }
}

/// Adds adapters to the matrices of a network without any.
pub fn add_adapters(be: &mut Reference<'_, f64>, tensors: &[Named], adapters: &[Vec<f64>]) {
    for (t, ab) in adapted(tensors).zip(adapters.chunks(2)) {
        let mut values = be.reals(t.values).unwrap().to_vec();
        products(t, |w, a, b| values[w] += ADAPTERS.shape.scale() * ab[0][a] * ab[1][b]);
        be.write_reals(t.values, &values).unwrap();
    }
}

/// The gradients of adapters by the chain rule, from those of the matrices that they were added
/// to: in the order of [`set_adapters`].
pub fn gradients_of_adapters(
    be: &Reference<'_, f64>,
    tensors: &[Named],
    adapters: &[Vec<f64>],
) -> Vec<Vec<f64>> {
    let mut all = Vec::new();
    for (t, ab) in adapted(tensors).zip(adapters.chunks(2)) {
        let (scale, slope) = (ADAPTERS.shape.scale(), be.reals(t.gradient).unwrap());
        let (mut da, mut db) = (vec![0.0; ab[0].len()], vec![0.0; ab[1].len()]);
        products(t, |w, a, b| {
            da[a] += scale * slope[w] * ab[1][b];
            db[b] += scale * slope[w] * ab[0][a];
        });
        all.extend([da, db]);
    }
    all
}
