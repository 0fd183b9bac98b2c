//! Encoder-decoder transformers.

pub mod config;
pub mod decode;
pub mod files;
pub mod model;
pub mod vocab;
