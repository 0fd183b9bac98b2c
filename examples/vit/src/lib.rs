//! Vision transformers trained with exact reversible backpropagation: the parts of the program
//! `bdia-vit`.
//!
//! In the order in which data flows: [`cli`] → [`data`] and [`augment`] (images and how training
//! changes them) → [`train`] (the run) → [`experiment`] (many runs, and what they show).

pub mod augment;
pub mod cli;
pub mod data;
pub mod experiment;
pub mod train;
