//! Language models trained with exact reversible backpropagation: the parts of the program
//! `bdia-lm`.
//!
//! In the order in which data flows: [`data`] (text), [`pairs`] (prompts, completions,
//! conversations) → [`cli`] (flags, or a [`recipe`] of them) → [`train`] (the run) → [`finetune`],
//! which begins with a pretrained model ([`hub`]) and the γ that it bears ([`calibrate`]) →
//! [`inference`], [`chat`], [`score`] and [`export`] for trained models → [`experiment`] for many
//! runs; [`plan`] for the memory that they take, [`prepare`] for data that takes none.

pub mod calibrate;
pub mod chat;
pub mod cli;
pub mod data;
pub mod experiment;
pub mod export;
pub mod finetune;
pub mod hub;
pub mod inference;
pub mod pairs;
pub mod plan;
pub mod prepare;
pub mod recipe;
pub mod score;
pub mod train;
