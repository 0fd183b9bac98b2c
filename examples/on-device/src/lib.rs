//! Fine-tuning a vision transformer on a microcontroller, with `bdia-core` and nothing that
//! allocates.
//!
//! | module | |
//! |---|---|
//! | [`data`] | samples and pretrained weights in flash |
//! | [`model`] | the network and its constant plan |
//! | [`jobs`] | what is trained, and the static memory for it |
//! | [`train`] | a step, an evaluation |
//! | [`digest`] | what must be the same on device and host |
//! | [`report`] | the program |
#![no_std]
#![forbid(unsafe_code)]

pub mod data;
pub mod digest;
pub mod jobs;
pub mod model;
pub mod report;
pub mod train;
