//! Translation with encoder-decoder transformers, trained with exact reversible backpropagation:
//! the parts of the program `bdia-translate`.
//!
//! In the order in which data flows: [`cli`] → [`data`] and [`numbers`] (pairs of sentences) →
//! [`batch`] → [`translate`] (what a trained model does) → [`train`] (the run) → [`experiment`]
//! (many runs, and what they show).

pub mod batch;
pub mod cli;
pub mod data;
pub mod experiment;
pub mod numbers;
pub mod train;
pub mod translate;
