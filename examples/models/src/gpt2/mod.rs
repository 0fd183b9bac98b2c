//! GPT-2.

pub mod adapter;
pub mod config;
pub mod decode;
pub mod files;
pub mod model;

pub use config::{Gpt2Config, Size};
pub use model::Gpt2;
