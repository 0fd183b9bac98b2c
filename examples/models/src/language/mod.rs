//! Language models: what GPT-2 and Llama's family have in common is written here once; what tells
//! them apart is a [`Family`].

pub mod adapter;
pub mod decode;
pub mod files;
pub mod frozen;
pub mod model;

use core::fmt::Debug;
use std::path::Path;

use bdia_core::arena::{Ints, Layout};
use bdia_core::backend::{Attention, Backend, Columns};
use bdia_core::error::Result;
use bdia_core::layers::{
    Branches, Gradients, LoraShape, Norm, Parameter, Residual, RotaryAngles, Tensor,
};
use bdia_core::stack::Call;

use crate::config::{ConfigError, FILE, Training};
use crate::files::write_bytes;
use crate::named::Adapters;

/// What a `config.json` says of a language model.
pub trait Config: Debug + Clone {
    /// The architecture.
    type Dims: Family;

    /// What the network is laid out from.
    fn dims(&self) -> Self::Dims;

    /// The tokens that end a text.
    fn ends(&self) -> Vec<u32>;

    /// How it was trained, if by these programs.
    fn training(&self) -> Option<Training>;

    /// Notes how it was trained.
    fn set_training(&mut self, training: Training);

    /// The same dropout wherever the architecture has one.
    fn set_dropout(&mut self, p: f64);

    /// The text of a `config.json` that transformers reads.
    fn to_json(&self) -> String;

    /// Writes `config.json` into a directory, atomically.
    ///
    /// # Errors
    /// [`ConfigError`]
    fn write_dir(&self, dir: &Path) -> core::result::Result<(), ConfigError> {
        Ok(write_bytes(&dir.join(FILE), self.to_json().as_bytes())?)
    }
}

/// Tensors outside the blocks: embedding, learned positions, weight and bias of the last norm, the
/// matrix of the logits.
pub const ENDS: usize = 5;

/// An architecture of language models: the dimensions of one, and the parts that it consists of.
pub trait Family: Debug + Clone + Copy + PartialEq {
    /// The branches of a block.
    type Branches: Branches + Debug + Clone + Copy + PartialEq;

    /// Size of the vocabulary.
    fn vocab(&self) -> usize;

    /// The longest sample.
    fn positions(&self) -> usize;

    /// Width `d`.
    fn width(&self) -> usize;

    /// Blocks `K`.
    fn layers(&self) -> usize;

    /// Width of a token's keys, and of its values.
    fn kv_width(&self) -> usize;

    /// The head's matrix is the embedding.
    fn tied(&self) -> bool;

    /// Dropout of the embedding.
    fn embedding_dropout(&self) -> f64 {
        0.0
    }

    /// The same without dropout.
    #[must_use]
    fn undropped(self) -> Self;

    /// Factor of the embedding.
    fn embedding_scale(&self) -> f64 {
        1.0
    }

    /// How many tokens a query sees in blocks with a sliding window.
    fn window(&self) -> Option<usize> {
        None
    }

    /// Checks what the parts do not.
    ///
    /// # Errors
    /// A typed error for dimensions that do not fit together.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The blocks of samples of `tokens` tokens, with adapters where those are trained.
    ///
    /// # Errors
    /// A typed error for dimensions that do not fit together.
    fn blocks(
        &self,
        tokens: usize,
        adapters: Option<Adapters>,
        gradients: Gradients,
        layout: &mut Layout,
    ) -> Result<Residual<Self::Branches>>;

    /// The tensors outside the blocks; those that a model does not have are empty.
    fn ends(&self) -> [Tensor; ENDS];

    /// The norm before the logits, of its weight and bias.
    fn norm(&self, parameters: [Parameter; 2]) -> Norm;

    /// The angles of the positions ([`Family::set_tables`]).
    fn angles(&self) -> [Option<RotaryAngles>; 2] {
        [None; 2]
    }

    /// Tells the blocks where the tables of the angles are.
    fn set_tables(blocks: &mut Residual<Self::Branches>, tables: [bdia_core::Reals; 2]) {
        let _ = (blocks, tables);
    }

    /// Whether samples may have several texts.
    const PACKS: bool = false;

    /// Tells the blocks where positions and starts of texts are; empty: samples are one text.
    fn set_places(blocks: &mut Residual<Self::Branches>, places: [Ints; 2]) {
        let _ = (blocks, places);
    }

    /// The same blocks for samples of another length.
    #[must_use]
    fn with_tokens(blocks: &Residual<Self::Branches>, tokens: usize) -> Residual<Self::Branches>;

    /// Where a call's residual has left keys and values, a row for each token.
    fn keys_values<B: Backend>(blocks: &Residual<Self::Branches>, call: &Call) -> [Columns; 2];

    /// Attention of one query over a cache of `keys` positions.
    fn cached_attention(blocks: &Residual<Self::Branches>, keys: usize, lens: Ints) -> Attention;

    /// The name in a file of a tensor of block `k`, or outside the blocks.
    fn name(&self, block: Option<usize>, tensor: &Tensor) -> String;

    /// The name that files have for one of [`name`](Self::name), whose common prefix is left out
    /// there.
    fn full_name(name: &str) -> String {
        name.into()
    }

    /// Whether files have the transposes of matrices.
    const TRANSPOSED: bool;

    /// The linear layers with adapters, as PEFT names them.
    const TARGETS: &'static [&'static str];

    /// `B` of an adapter, `[out, rank]`, as PEFT has it, of ours.
    fn peft_up(shape: &LoraShape, outputs: usize, ours: &[f32]) -> Vec<f32> {
        let r = shape.rank;
        (0..outputs * r).map(|at| ours[at % r * outputs + at / r]).collect()
    }

    /// Rank and α of the adapters in PEFT's terms.
    fn peft_shape(shape: &LoraShape) -> LoraShape {
        *shape
    }
}
