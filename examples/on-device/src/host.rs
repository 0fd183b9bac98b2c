//! The host: the same program as on the device, and the tool that makes the pretrained networks.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::process::ExitCode;

use bdia_core::optim::Rule;
use bdia_mcu::data::Samples;
use bdia_mcu::jobs::{ADAM, Arena, FULL, arena};
use bdia_mcu::model::{Job, Model};
use bdia_mcu::report::{Platform, Request, Stop, Used, program};
use bdia_mcu::train::Session;
use half::f16;

/// Standard output.
struct Host;

impl fmt::Write for Host {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        std::io::stdout().write_all(s.as_bytes()).map_err(|_| fmt::Error)
    }
}

impl Platform for Host {
    fn instructions(&mut self) -> Option<u64> {
        None
    }

    fn memory(&mut self) -> Option<Used> {
        None
    }
}

const PRETRAIN: Samples = Samples(include_bytes!(concat!(env!("OUT_DIR"), "/pretrain")));
const PRETRAINING: Job = Job {
    rule: Rule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 },
    lr: 4e-3,
    epochs: 12,
    weights: None,
    ..FULL
};
/// The two networks that are pretrained, and their files.
const NETWORKS: [(Job, &str); 2] = [
    (PRETRAINING, "weights/width-24.f16"),
    (Job { width: ADAM.width, inner: ADAM.inner, ..PRETRAINING }, "weights/width-16.f16"),
];
const LARGE: usize = arena(&[NETWORKS[0].0, NETWORKS[1].0]);

/// Pretrains a network from random values; its weights as they lie in flash.
fn pretrain(job: &Job, memory: &mut Arena<LARGE>) -> Result<Vec<u8>, Stop> {
    let mut model = Model::plan(job)?;
    let mut be = memory.backend(&model.layout)?;
    let mut session = Session::new(job, &mut model, &mut be, PRETRAIN)?;
    for epoch in 1..=job.epochs {
        let mut loss = 0.0;
        for _ in 0..session.steps() {
            loss += session.step(&mut be)? / f64::from(session.steps());
        }
        writeln!(Host, "epoch {epoch:>2}: training loss {loss:.4}")?;
    }
    let score = session.evaluate(&mut be, PRETRAIN)?;
    writeln!(Host, "on the samples it was pretrained with: {score}")?;
    let mut bytes = Vec::new();
    session.model().load(|_, values, _| {
        bytes.extend(be.reals(values)?.iter().flat_map(|&p| f16::from_f32(p).to_le_bytes()));
        Ok(())
    })?;
    Ok(bytes)
}

fn pretrain_all(check: bool) -> Result<(), String> {
    let mut memory = Box::new(Arena::new());
    for (job, path) in &NETWORKS {
        println!("{path}: width {}, {} epochs", job.width, job.epochs);
        let bytes = pretrain(job, &mut memory).map_err(|stop| stop.to_string())?;
        let at = format!("{}/{path}", env!("CARGO_MANIFEST_DIR"));
        if check {
            let found = std::fs::read(&at).map_err(|e| format!("{at}: {e}"))?;
            if found != bytes {
                return Err(format!("{at} is not what `pretrain` makes: run it without --check"));
            }
        } else {
            std::fs::write(&at, bytes).map_err(|e| format!("{at}: {e}"))?;
        }
    }
    Ok(())
}

/// Runs all jobs and draws their curves into a file.
fn plot(path: &str) -> Result<(), String> {
    let (mut memory, mut curves) = (Box::new(Arena::new()), Vec::new());
    program(Request::default(), &mut memory, &mut Host, |name, outcome| {
        curves.push((name, outcome))
    })
    .map_err(|stop| stop.to_string())?;
    let svg = crate::plot::svg(&curves).map_err(|e| e.to_string())?;
    std::fs::write(path, svg).map_err(|e| format!("{path}: {e}"))
}

/// `pretrain [--check]`, `plot FILE`, or the device's program with its words.
pub fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["pretrain"] => pretrain_all(false),
        ["pretrain", "--check"] => pretrain_all(true),
        ["plot", path] => plot(path),
        _ => {
            let mut memory = Box::new(Arena::new());
            Request::parse(words.into_iter())
                .and_then(|request| program(request, &mut memory, &mut Host, |_, _| ()))
                .map_err(|stop| stop.to_string())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}
