//! State files and small models for the tests.
#![allow(dead_code, clippy::unwrap_used)]

pub mod transformers;

use std::collections::HashMap;
use std::path::PathBuf;

use bdia_core::backend::Gelu;
use bdia_core::plan::Choice;
use bdia_core::stack::Mode;
use bdia_core::{Gamma, Grid, Layout, Real, Reference, Sign};
use bdia_models::gpt2::model::{Dims, Gpt2, Setup};
use safetensors::{Dtype, SafeTensors};

/// A state file in memory: f64 and i32 tensors and the metadata.
pub struct State {
    pub reals: HashMap<String, Vec<f64>>,
    pub ints: HashMap<String, Vec<i32>>,
    pub meta: HashMap<String, String>,
}

pub fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/gpt2").join(name)
}

pub fn state(name: &str) -> State {
    let bytes = std::fs::read(data(name)).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let meta = header.metadata().clone().unwrap_or_default();
    let (mut reals, mut ints) = (HashMap::new(), HashMap::new());
    for (name, t) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let d = t.data();
        match t.dtype() {
            Dtype::F64 => {
                reals.insert(
                    name,
                    d.chunks(8).map(|c| f64::from_le_bytes(c.try_into().unwrap())).collect(),
                );
            }
            Dtype::F32 => {
                reals.insert(
                    name,
                    d.chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap()).into()).collect(),
                );
            }
            Dtype::I32 => {
                ints.insert(
                    name,
                    d.chunks(4).map(|c| i32::from_le_bytes(c.try_into().unwrap())).collect(),
                );
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
            tied: self.meta["tie_word_embeddings"] == "true",
            dropout: [0.0; 3],
        }
    }

    pub fn setup(&self) -> Setup {
        Setup {
            dims: self.dims(),
            batch: self.size("batch"),
            accumulate: 1,
            context: self.size("seq_len"),
            mode: Mode::Standard,
            grid: None,
            gamma: Gamma::new(0.5, Sign::Random).unwrap(),
            rule: None,
            adapters: None,
            fused: true,
            verify: false,
            threads: 1,
            library: 0,
        }
    }
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

pub fn grid() -> Option<Grid> {
    Some(Grid::new(14).unwrap())
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
    Gpt2::layout::<Reference<'_, R>>(setup, Choice { chunk, head_rows }).unwrap()
}
