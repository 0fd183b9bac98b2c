//! Translation with encoder-decoder transformers, trained with exact reversible backpropagation:
//! the parts of the program `bdia-translate`.
//!
//! In the order in which data flows: [`cli`] → [`data`] and [`numbers`] (pairs of sentences) →
//! [`vocab`] (subwords) → [`batch`] → [`config`] (architecture) → [`model`] (one optimizer step
//! over both stacks) → [`train`] (the run) → [`decode`] (search) → [`translate`] (what a trained
//! model does); [`experiment`] (many runs, and what they show).

pub mod batch;
pub mod cli;
pub mod config;
pub mod data;
pub mod decode;
pub mod experiment;
pub mod model;
pub mod numbers;
pub mod train;
pub mod translate;
pub mod vocab;
