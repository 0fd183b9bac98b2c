#![doc = include_str!("../README.md")]

pub mod bpe;
mod cache;
pub mod chat;
pub mod config;
pub mod files;
pub mod gguf;
pub mod gpt2;
pub mod inference;
pub mod input;
pub mod language;
pub mod llama;
pub mod named;
pub mod packing;
pub mod plan;
pub mod pretrained;
pub mod sample;
pub mod search;
pub mod seq2seq;
pub mod tokenizer;
pub mod vit;
pub mod weights;
