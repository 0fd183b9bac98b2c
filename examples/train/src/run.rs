//! A program and the directory of its run: flags, what resumes it, what stops it, and the bar that
//! shows it.

use core::sync::atomic::{AtomicBool, Ordering};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, OnceLock, mpsc};

use bdia_models::files::{FileError, read_limited, write_bytes};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use signal_hook::{consts, flag};

use crate::alloc::Counting;
use crate::checkpoint::{self, Header};
use crate::cli::{Flags, RunFlags, check_mode, shown};
use crate::directory::{Claim, Directory};
use crate::error::Failure;
use crate::{launcher, report};

/// The exit code of a run that was stopped and can go on.
pub const STOPPED: u8 = 3;

/// The whole of a program: 0 where the work was done, [`STOPPED`] where a run was stopped,
/// otherwise 1 after a line that says why.
pub fn program(work: impl FnOnce() -> Result<(), Failure>) -> ExitCode {
    tell_refusals();
    // Before anything that a wide register might be used for.
    let done = bdia_cpu::require_cpu().map_err(Failure::from);
    let done = done.and_then(|()| pool()).and_then(|()| work());
    let done = done.and_then(|()| match report::lost() {
        // Whoever closes a pipe has read enough.
        Some(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Output(e)),
        _ => Ok(()),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(stopped @ (Failure::Stopped { .. } | Failure::StudyStopped)) => {
            report::note!("{stopped}");
            ExitCode::from(STOPPED)
        }
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

/// From now on a process that ends because a library asked the system for memory in vain ends as
/// after any other error: with a line that says so and exit code 1. What this workspace itself
/// asks for is a typed error without this.
#[allow(unsafe_code)]
fn tell_refusals() {
    #[cfg(unix)]
    {
        // SAFETY: the handler reads atomics, formats into its own stack, and calls write(2),
        // pause(2) and _exit(2), which handlers may. One that cannot be registered leaves the
        // process as it was.
        let _ = unsafe { signal_hook::low_level::register(libc::SIGABRT, refused) };
    }
}

/// Where this thread was refused no memory, the process is aborted for what it is.
#[cfg(unix)]
#[allow(unsafe_code)]
fn refused() {
    static TOLD: AtomicBool = AtomicBool::new(false);
    let bytes = Counting::refused();
    if bytes == 0 {
        let _ = signal_hook::low_level::emulate_default_handler(libc::SIGABRT);
        return;
    }
    if TOLD.swap(true, Ordering::Relaxed) {
        // Another thread is telling, and ends this one too.
        loop {
            // SAFETY: handlers may call it.
            unsafe { libc::pause() };
        }
    }
    let mut line = [0; 160];
    let room = line.len();
    let mut rest = &mut line[..];
    // A slice takes as much as fits, and formatting a number allocates nothing.
    let _ = writeln!(
        rest,
        "error: the operating system refused {bytes} bytes of memory; what was saved before is \
         whole, and a run goes on from it with --resume"
    );
    let told = room - rest.len();
    // SAFETY: the slice is valid for reads of its length. Where nobody can read the line, the exit
    // code is still there. Ending the process is what handlers may do.
    unsafe {
        let _ = libc::write(2, line.as_ptr().cast(), told);
        libc::_exit(1)
    }
}

/// Makes the threads that read text. Made when they are needed, they would be a panic where the
/// system refuses them; so it is tried before how many there may be. Where these are fewer than
/// wanted, half of them are left to the run.
fn pool() -> Result<(), Failure> {
    let wanted = std::thread::available_parallelism().map_or(1, usize::from);
    let (hold, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let tried: Vec<_> = (0..wanted)
        .map_while(|_| {
            let held = held.clone();
            // It ends when `hold` does.
            let wait = move || drop(held.lock().map(|held| held.recv()));
            std::thread::Builder::new().spawn(wait).ok()
        })
        .collect();
    drop(hold);
    let found = tried.len();
    tried.into_iter().for_each(|thread| drop(thread.join()));
    let pool = rayon::ThreadPoolBuilder::new();
    let pool = match found / 2 {
        // As many as the environment says, or as there are processors.
        _ if found == wanted => pool,
        0 | 1 => pool.num_threads(1).use_current_thread(),
        threads => pool.num_threads(threads),
    };
    Ok(pool.build_global().map_err(|_| bdia_cpu::CpuError::Threads { threads: wanted })?)
}

/// Set by signals.
struct Signals {
    /// The step is finished, then the run is saved and ends.
    stop: Arc<AtomicBool>,
    /// The step is finished, then the run is saved and goes on.
    save: Arc<AtomicBool>,
}

static SIGNALS: OnceLock<Signals> = OnceLock::new();

/// From now on Ctrl-C, SIGTERM and SIGHUP only make [`interrupted`] true, and SIGUSR1 makes
/// [`asked_to_save`] true. A second Ctrl-C ends the process at once.
pub fn catch_signals() {
    SIGNALS.get_or_init(|| {
        let signals = Signals { stop: Arc::default(), save: Arc::default() };
        // One that cannot be caught ends the process, as before.
        // One that is ignored (nohup, the background of a script) stays so.
        let stop = |signal| {
            if !is_ignored(signal) {
                let _ = flag::register(signal, signals.stop.clone());
            }
        };
        if !is_ignored(consts::SIGINT) {
            let _ = flag::register_conditional_shutdown(consts::SIGINT, 130, signals.stop.clone());
        }
        stop(consts::SIGINT);
        stop(consts::SIGTERM);
        #[cfg(unix)]
        {
            stop(consts::SIGHUP);
            let _ = flag::register(consts::SIGUSR1, signals.save.clone());
        }
        signals
    });
}

/// Whether whoever started the process has let it ignore a signal.
#[allow(unsafe_code)]
fn is_ignored(signal: i32) -> bool {
    #[cfg(unix)]
    {
        // SAFETY: the structure is plain data, for which zeros are valid, and the call only fills
        // it.
        let (done, found) = unsafe {
            let mut found: libc::sigaction = core::mem::zeroed();
            (libc::sigaction(signal, core::ptr::null(), &mut found), found)
        };
        done == 0 && found.sa_sigaction == libc::SIG_IGN
    }
    #[cfg(not(unix))]
    {
        let _ = signal;
        false
    }
}

/// Whether the run is to be saved and to end.
pub fn interrupted() -> bool {
    SIGNALS.get().is_some_and(|s| s.stop.load(Ordering::SeqCst))
}

/// Whether the run is to be saved and to go on, since this was last asked.
pub fn asked_to_save() -> bool {
    SIGNALS.get().is_some_and(|s| s.save.swap(false, Ordering::SeqCst))
}

/// Ends a validation that nobody waits for any more.
///
/// # Errors
/// [`Failure::Interrupted`], which the trainer understands.
pub fn go_on() -> Result<(), Failure> {
    if interrupted() { Err(Failure::Interrupted) } else { Ok(()) }
}

/// Writes the flags of a run, `run.json`.
///
/// # Errors
/// [`Failure`]
pub fn save<A: Flags>(dir: &Path, args: &A) -> Result<(), Failure> {
    let mut args = args.clone();
    *args.run().resume = None;
    let json = serde_json::to_string_pretty(&args).map_err(|e| Failure::Other(e.to_string()))?;
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
/// which; none where the run was killed before its first.
///
/// # Errors
/// [`Failure`]: flags that contradict the saved ones, a directory that is not that of a run or has
/// something in it that a new run would overwrite, no usable checkpoint.
pub fn begin<A: Flags>(args: &A) -> Result<(A, Option<(PathBuf, Header)>), Failure> {
    let mut args = args.clone();
    let run = args.run();
    // The run may be resumed from another working directory.
    for path in run.inputs {
        *path = std::path::absolute(&*path).map_err(|e| FileError::io(path, "find it", e))?;
    }
    let Some(dir) = run.resume.clone() else {
        // Before anything that takes time. Files are the first rank's.
        if launcher::rank() == 0 {
            Directory::check(&claim(&args.clone().run()))?;
        }
        return Ok((args, None));
    };
    let mut args = args.resumed(&saved(&dir)?)?;
    let run = args.run();
    check_mode(run.mode, *run.verify).map_err(Failure::Other)?;
    let Some((path, header, warnings)) = checkpoint::newest(&dir)? else {
        let model = dir.join(bdia_models::weights::FILE);
        if model.exists() {
            let what = "the run has a model and no checkpoint, so it cannot go on, and from its \
                        start it would overwrite the model; start a new run with --out"
                .into();
            return Err(Failure::Run { path: model, what });
        }
        return Ok((args, None));
    };
    for warning in warnings {
        report::note!("warning: {warning}");
    }
    check_settings(&path, &dir, &args.settings(), &header)?;
    Ok((args, Some((path, header))))
}

/// What a new run asks for.
pub fn claim<'a>(run: &'a RunFlags<'_>) -> Claim<'a> {
    Claim { out: run.out, named: run.given.contains("out"), replace: run.saving.replace }
}

/// Refuses to go on with other settings or another configuration than those of the checkpoint.
fn check_settings(
    path: &Path,
    dir: &Path,
    settings: &Map<String, Value>,
    header: &Header,
) -> Result<(), Failure> {
    let mut wrong = Vec::new();
    let mut compare = |file: &str, now: &Map<String, Value>, then: &Map<String, Value>| {
        let keys: BTreeSet<_> = now.keys().chain(then.keys()).collect();
        for key in keys.into_iter().filter(|key| now.get(*key) != then.get(*key)) {
            let (now, then) = (shown(now.get(key)), shown(then.get(key)));
            wrong.push(format!("{key} is {now} in {file}, the checkpoint was made with {then}"));
        }
    };
    compare("run.json", settings, &header.settings);
    compare("config.json", &config(dir)?, &header.config);
    if wrong.is_empty() {
        return Ok(());
    }
    let what = format!("{}; put the files of the run back", wrong.join("; "));
    Err(Failure::Run { path: path.into(), what })
}

/// The `config.json` of a run; empty where it has none.
///
/// # Errors
/// [`Failure`]
pub fn config(dir: &Path) -> Result<Map<String, Value>, Failure> {
    let path = dir.join("config.json");
    if !path.exists() {
        return Ok(Map::new());
    }
    serde_json::from_slice(&read_limited(&path, 1 << 24)?)
        .map_err(|e| Failure::Run { path, what: format!("not a configuration: {e}") })
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

/// Bytes of the checkpoints and weights in a directory.
pub fn bytes_there(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let large = files.filter(|e| {
        let name = e.file_name();
        name.to_str().is_some_and(|n| n.ends_with(".ckpt") || n.ends_with(".safetensors"))
    });
    large.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
}

/// Bytes that are free where a directory is, where the system says so.
pub fn free_space(dir: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let found = rustix::fs::statvfs(dir).ok()?;
        found.f_bavail.checked_mul(found.f_frsize)
    }
    #[cfg(not(unix))]
    {
        let _ = dir;
        None
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
