//! GPT-2 trained with exact reversible backpropagation: the parts of the program `bdia-gpt2`.
//!
//! In the order in which data flows: [`cli`] → [`config`], [`tokenizer`], [`data`] → [`machine`]
//! (plan and backend) → [`model`] (one optimizer step) → [`train`] (the run), with [`checkpoint`],
//! [`weights`] and [`report`] for what it leaves behind; [`finetune`] begins with a pretrained
//! model ([`hub`]), learns [`pairs`] and may leave an [`adapter`]; [`inference`], [`decode`],
//! [`sample`] and [`score`] for trained models; [`experiment`] for many runs. What other training
//! programs need too is in [`bdia_train`].

pub mod adapter;
pub mod cli;
pub mod config;
pub mod data;
pub mod decode;
pub mod error;
pub mod experiment;
pub mod finetune;
pub mod hub;
pub mod inference;
pub mod machine;
pub mod model;
pub mod pairs;
pub mod report;
pub mod sample;
pub mod score;
pub mod tokenizer;
pub mod train;
pub mod weights;

pub use bdia_train::{alloc, checkpoint, files};
