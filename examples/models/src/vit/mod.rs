//! Vision transformers.

pub mod config;
pub mod files;
pub mod model;
pub mod revvit;
