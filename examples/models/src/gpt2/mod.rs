//! GPT-2.

pub mod config;
pub mod files;
pub mod model;
