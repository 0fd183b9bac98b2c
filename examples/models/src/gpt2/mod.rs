//! GPT-2.

pub mod adapter;
pub mod config;
pub mod decode;
pub mod files;
pub mod model;
