//! `bdia-candle`: trains on digits, and measures memory over depth.

mod chart;

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use bdia_candle::alloc::Counting;
use bdia_candle::model::Config;
use bdia_candle::run::{Outcome, Run, train};
use bdia_candle::{Error, Options};
use clap::{Args, Parser, Subcommand};

use chart::{BLUE, GREY, RED};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Exact reversible training of a candle transformer on the digits of smartcore
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Train on 1438 images and test on 359
    Train(Train),
    /// Peak memory over depth, beside candle alone; one process for each figure
    Memory(Memory),
}

#[derive(Args)]
struct Train {
    /// Blocks K
    #[arg(long, default_value_t = 6)]
    blocks: usize,
    /// Width
    #[arg(long, default_value_t = 32)]
    width: usize,
    /// Images of a step
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Steps
    #[arg(long, default_value_t = 460)]
    steps: usize,
    /// Learning rate at the start; it falls to 0
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Probability of dropout on both branches of a block
    #[arg(long, default_value_t = 0.0)]
    dropout: f32,
    /// Images that a block sees at a time
    #[arg(long, default_value_t = 16)]
    chunk: usize,
    /// Seed of parameters, order of images, signs and dropout
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Train with candle alone instead
    #[arg(long)]
    standard: bool,
    /// Name accuracy on every fifth training image, not trained on, instead of the test images: to
    /// choose settings
    #[arg(long)]
    validate: bool,
    /// Keep all activations besides and count values that differ after rebuilding
    #[arg(long)]
    verify: bool,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Memory {
    /// Depths
    #[arg(long, value_delimiter = ',', default_values_t = [6, 12, 24, 48])]
    blocks: Vec<usize>,
    /// Where the picture goes
    #[arg(long, default_value = "memory.svg")]
    out: PathBuf,
}

fn main() -> ExitCode {
    let done = match Cli::parse().task {
        Task::Train(args) => run(&args).map_err(|e| e.to_string()),
        Task::Memory(args) => memory(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Train) -> Result<(), Error> {
    let &Train {
        blocks,
        width,
        batch,
        steps,
        lr,
        dropout,
        chunk,
        seed,
        standard,
        validate,
        verify,
        json,
    } = args;
    let options = Options { chunk, seed, verify, ..Options::default() };
    let model = Config { blocks, width, heads: 4, hidden: 2 * width, dropout };
    let run =
        Run { model, batch, steps, lr, reversible: (!standard).then_some(options), seed, validate };
    let o = train(&run, |step, loss| {
        if !json && (step % 50 == 0 || step == steps) {
            println!("step {step:>5}  loss {loss:.4}");
        }
    })?;
    let Outcome { loss, accuracy, parameters, mismatches, rebuilt, peak } = o;
    let kept = if validate { "validation" } else { "test" };
    if json {
        let mode = if standard { "standard" } else { "bdia" };
        println!(
            "{{\"mode\":\"{mode}\",\"blocks\":{blocks},\"parameters\":{parameters},\
             \"steps\":{steps},\"loss\":{loss},\
             \"{kept}_accuracy\":{accuracy},\"verify\":{verify},\
             \"verify_mismatches\":{mismatches},\"rebuilt\":{rebuilt},\
             \"peak_bytes\":{peak}}}"
        );
    } else {
        println!(
            "{parameters} parameters; {kept} accuracy {:.2} %; peak {} kB",
            100.0 * accuracy,
            peak / 1000
        );
        if verify && !standard {
            println!("{rebuilt} values rebuilt, {mismatches} of them differ from the originals");
        }
    }
    Ok(())
}

/// Width and batch of the measurement: activations are what matters, as in real models.
const WIDTH: usize = 64;
const BATCH: usize = 128;

fn memory(args: &Memory) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let peak = |blocks: usize, standard: bool| -> Result<(usize, usize), String> {
        let mut command = Command::new(&program);
        command.args(["train", "--json", "--steps", "2"]);
        command.args([
            "--blocks",
            &blocks.to_string(),
            "--width",
            &WIDTH.to_string(),
            "--batch",
            &BATCH.to_string(),
        ]);
        command.args(standard.then_some("--standard"));
        let out = command.output().map_err(|e| e.to_string())?;
        let line = String::from_utf8_lossy(&out.stdout);
        let value = |key: &str| {
            let rest = line.split(&format!("\"{key}\":")).nth(1)?;
            rest.split([',', '}']).next()?.parse().ok()
        };
        match (value("peak_bytes"), value("parameters")) {
            (Some(peak), Some(parameters)) => Ok((peak, parameters)),
            _ => Err(format!("{blocks} blocks: {}", String::from_utf8_lossy(&out.stderr))),
        }
    };
    println!("width {WIDTH}, 16 tokens, batch {BATCH}, f32; MB are 10^6 bytes");
    println!("blocks  candle alone  reversible  of it parameters, gradients, moments");
    let mut points = Vec::new();
    for &blocks in &args.blocks {
        let ((alone, parameters), (ours, _)) = (peak(blocks, true)?, peak(blocks, false)?);
        let point = [alone, ours, 16 * parameters].map(|bytes| bytes as f64 / 1e6);
        println!("{blocks:>6}  {:>9.1} MB  {:>7.1} MB  {:>7.1} MB", point[0], point[1], point[2]);
        points.push((blocks as f64, point));
    }
    let lines = [
        ("candle alone", RED),
        ("bdia-candle, reversible", BLUE),
        ("parameters, gradients, moments", GREY),
    ];
    chart::draw(&args.out, "Peak memory of a training step in candle", lines, &points)
        .map_err(|e| format!("{}: {e}", args.out.display()))
}
