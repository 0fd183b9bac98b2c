//! What the example training programs share. A program brings its model, its data and its loop; the
//! rest is here.
//!
//! In the order in which data flows: [`cli`] (flags that every program has, and their checks) →
//! [`machine`] (threads, plan, backend), [`ranks`] (several machines) → [`run`] (directory of a
//! run, resuming, stopping, progress) → [`checkpoint`], [`weights`], [`report`] (what a run leaves
//! behind), over [`files`] and [`alloc`]; [`study`] makes many runs of one program. For models that
//! write text: [`search`] chooses their tokens, [`scores`] compares what they wrote.

pub mod alloc;
pub mod checkpoint;
pub mod cli;
pub mod error;
pub mod files;
pub mod machine;
#[cfg(feature = "testing")]
pub mod mutations;
pub mod ranks;
pub mod report;
pub mod run;
pub mod scores;
pub mod search;
pub mod study;
#[cfg(feature = "testing")]
pub mod testing;
pub mod weights;

pub use error::Failure;
