//! What the training programs share. A program brings its data and its loop, `bdia-models` the
//! model; the rest is here.
//!
//! In the order in which data flows: [`cli`] (flags that every program has, and their checks) →
//! [`calibrate`] (what γ a pretrained network bears), [`machine`] (threads, plan, backend),
//! [`ranks`] (several machines) → [`run`] (resuming, stopping, progress) → [`directory`] (who owns
//! that of a run), [`checkpoint`], [`report`] (what a run leaves behind), over [`alloc`] and
//! [`launcher`]; [`study`] makes many runs of one program. For models that write text: [`scores`]
//! compares what they wrote.

pub mod alloc;
pub mod calibrate;
pub mod checkpoint;
pub mod cli;
pub mod directory;
pub mod error;
pub mod launcher;
pub mod licences;
pub mod machine;
#[cfg(feature = "testing")]
pub mod mutations;
pub mod ranks;
pub mod report;
pub mod run;
pub mod scores;
pub mod study;
#[cfg(feature = "testing")]
pub mod testing;
pub mod trainer;

pub use error::Failure;
