//! A program and the directory of its run: flags, what resumes it, what stops it, and the bar that
//! shows it.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bdia_models::files::{FileError, read_limited, write_bytes};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checkpoint::{self, Header};
use crate::cli::{Flags, check_mode};
use crate::error::Failure;
use crate::{launcher, report};

/// The whole of a program: 0 where the work was done, otherwise 1 after a line that says why.
pub fn program<E: fmt::Display>(work: impl FnOnce() -> Result<(), E>) -> ExitCode {
    // Before anything that a wide register might be used for.
    let done = bdia_cpu::require_cpu()
        .map_err(|e| e.to_string())
        .and_then(|()| work().map_err(|e| e.to_string()));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody can read it, the exit code is still there.
            let _ = match launcher::rank() {
                0 => writeln!(std::io::stderr(), "error: {error}"),
                rank => writeln!(std::io::stderr(), "error (told by rank {rank}): {error}"),
            };
            ExitCode::FAILURE
        }
    }
}

/// Set by Ctrl-C: the step is finished, then the run is saved.
static STOP: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C only makes [`interrupted`] true.
pub fn catch_interrupt() {
    // It may have been claimed by a program around this one: then it ends at once, as before.
    let _ = ctrlc::set_handler(|| STOP.store(true, Ordering::SeqCst));
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// Writes the flags of a run, `run.json`.
///
/// # Errors
/// [`Failure`]
pub fn save<T: Serialize>(dir: &Path, args: &T) -> Result<(), Failure> {
    let json = serde_json::to_string_pretty(args).map_err(|e| Failure::Other(e.to_string()))?;
    Ok(write_bytes(&dir.join("run.json"), json.as_bytes())?)
}

/// Reads the flags of a run.
///
/// # Errors
/// [`Failure`], also for a directory that is not that of a run.
pub fn saved<T: DeserializeOwned>(dir: &Path) -> Result<T, Failure> {
    let path = dir.join("run.json");
    if dir.is_dir() && !path.exists() {
        let what = "there is no such file, so this is not the directory of a run, or it was \
                    stopped before it began; \
                    start it with --out in place of --resume";
        return Err(Failure::Run { path, what: what.into() });
    }
    serde_json::from_slice(&read_limited(&path, 1 << 20)?)
        .map_err(|e| Failure::Run { path, what: format!("not the flags of a run: {e}") })
}

/// The settings of a run that begins, or those with which it goes on, and then the checkpoint from
/// which.
///
/// # Errors
/// [`Failure`]: flags that contradict the saved ones, a directory that is not that of a run, no
/// usable checkpoint.
pub fn begin<A: Flags>(args: &A) -> Result<(A, Option<(PathBuf, Header)>), Failure> {
    let mut args = args.clone();
    let run = args.run();
    // The run may be resumed from another working directory.
    for path in run.inputs {
        *path = std::path::absolute(&*path).map_err(|e| FileError::io(path, "find it", e))?;
    }
    let Some(dir) = run.resume.clone() else { return Ok((args, None)) };
    let mut args = args.resumed(&saved(&dir)?)?;
    let run = args.run();
    check_mode(run.mode, *run.verify).map_err(Failure::Other)?;
    let (path, header, warnings) = checkpoint::newest(&dir)?;
    for warning in warnings {
        report::note!("warning: {warning}");
    }
    Ok((args, Some((path, header))))
}

/// A new run in an old directory, once nothing speaks against it: the old checkpoints must not be
/// taken for this one's.
///
/// # Errors
/// [`FileError`]
pub fn replace(dir: &Path) -> Result<(), FileError> {
    let old = checkpoint::list(dir);
    if !old.is_empty() {
        report::note!("the run that was in {} is replaced by this one", dir.display());
    }
    for (_, old) in old {
        std::fs::remove_file(&old).map_err(|e| FileError::io(&old, "remove it", e))?;
    }
    Ok(())
}

/// What is left after a step that failed.
pub fn kept(out: &Path) -> String {
    match checkpoint::list(out).first() {
        Some((step, path)) => format!(
            "; the checkpoint after step {step} is intact ({}). Resuming it repeats the same \
             numbers: start a new run with a \
             lower --lr, or with --clip",
            path.display()
        ),
        None => "; no checkpoint had been written yet".into(),
    }
}

/// A bar over the steps of a run that goes on after step `first`.
pub fn progress(steps: u32, first: u32) -> ProgressBar {
    bar("step", u64::from(steps), u64::from(first))
}

/// A bar over `len` of something, of which `first` are done.
pub fn bar(what: &str, len: u64, first: u64) -> ProgressBar {
    let target = if launcher::rank() == 0 {
        ProgressDrawTarget::stderr_with_hz(4)
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(len), target);
    // The template is known to be good; without it the bar is a plain one.
    if let Ok(style) = ProgressStyle::with_template(&format!(
        "{{bar:24}} {what} {{pos}}/{{len}} {{msg}} ETA {{eta}}"
    )) {
        bar.set_style(style);
    }
    bar.set_position(first);
    bar.reset_eta();
    bar
}
