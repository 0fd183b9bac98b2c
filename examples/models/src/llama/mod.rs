//! Llama and its relatives: Mistral, Qwen 2 and 3, SmolLM 2 and 3, Gemma 3.

pub mod config;
pub mod gguf;
pub mod gguf_tokenizer;
pub mod model;
