//! GPT-2.

pub mod adapter;
pub mod config;
pub mod files;
pub mod model;
