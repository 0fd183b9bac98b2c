//! Language models: what GPT-2 and Llama's family have in common is written here once; what tells
//! them apart is a [`Family`].

pub mod decode;
pub mod files;
pub mod model;

use core::fmt::Debug;

use bdia_core::arena::{Ints, Layout};
use bdia_core::backend::{Attention, Backend, Columns};
use bdia_core::error::Result;
use bdia_core::layers::{Branches, Gradients, Norm, Parameter, Residual, RotaryAngles, Tensor};
use bdia_core::stack::Call;

use crate::named::Adapters;

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

    /// The same blocks for samples of another length.
    #[must_use]
    fn with_tokens(blocks: &Residual<Self::Branches>, tokens: usize) -> Residual<Self::Branches>;

    /// Where a call's residual has left keys and values, a row for each token.
    fn keys_values<B: Backend>(blocks: &Residual<Self::Branches>, call: &Call) -> [Columns; 2];

    /// Attention of one query over a cache of `keys` positions.
    fn cached_attention(blocks: &Residual<Self::Branches>, keys: usize, lens: Ints) -> Attention;

    /// The name in a file of a tensor of block `k`, or outside the blocks.
    fn name(&self, block: Option<usize>, tensor: &Tensor) -> String;

    /// Whether files have the transposes of matrices.
    const TRANSPOSED: bool;
}
