//! Vision transformers.

pub mod config;
pub mod files;
pub mod model;
pub mod revvit;

pub use config::VitConfig;
pub use model::Vit;
