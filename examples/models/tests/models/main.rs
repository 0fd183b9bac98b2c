//! The tests of the models as one program: what they are made of is compiled once. Tests that count
//! memory have a program of their own.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod gpt2_adapters;
mod gpt2_cuda;
mod gpt2_cuda_calls;
mod gpt2_decode;
mod gpt2_huggingface;
mod gpt2_parity;
mod gpt2_precision;
mod gpt2_ranks;
mod gpt2_training;
mod llama_gguf;
mod llama_gguf_write;
mod llama_packed;
mod llama_parity;
mod llama_weights;
mod optimizers;
mod peft;
mod seq2seq_parity;
mod tokenizers;
mod vit_parity;
