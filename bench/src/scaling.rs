//! How long a step takes on several machines: a model of `bdia-ranks`, to be filled with measured
//! numbers.
//!
//! A group of `n` gradients (a block, or what is outside of blocks) takes, on each of `N` ranks,
//!
//! ```text
//! T(n) = 3·(α + (N-1)·o)          header, scatter, gather: a latency each, and o for every message
//!      + 2·(N-1)/N·4n / β         bytes out, and as many in, over a link of β bytes a second
//!                                 and direction
//!      + 4·4n / m                 taken away, added up, brought back: passes over memory
//! ```
//!
//! and a step `C + (K-1)·max(0, T(block) - c) + T(block) + T(rest) + 3·(α + (N-1)·o)`: `C` is what
//! one rank computes, `c` the backward pass of a block, behind which the exchange of the block
//! above hides; nothing hides that of block 0 and of the embedding, which is complete last. `c` is
//! `C`'s part by the number of operations: a block of `P` parameters takes `2P` a token forward and
//! `6P` backward (`2P` of them to rebuild), a head of `P` parameters `6P`; attention's own
//! products, which would make `c` larger, are left out.
//!
//! What is not in it: ranks of different speed, switches that cannot carry what all links can, and,
//! where the thread that adds up has no core of its own, what it takes from those that compute.

use bdia_models::gpt2::config::{Gpt2Config, Size};
use bdia_train::cli::Preset;
use bdia_train::report::bytes;
use clap::{Args, ValueEnum};

use crate::Failure;

/// The machines, and what one of them computes.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ScalingArgs {
    /// Size of the model: one of GPT-2's
    #[arg(long, value_name = "SIZE", default_value = "gpt2", value_parser = size)]
    pub config: Size,
    /// Tokens of a rank's part of a step
    #[arg(long, value_name = "N", default_value_t = 8192)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: u64,
    /// Tokens a second of one machine, as `bdia-bench run` or a training measured it
    #[arg(long, value_name = "TOKENS", default_value_t = 1000.0)]
    pub speed: f64,
    /// Bandwidths of a machine's link, in gigabits a second and direction
    #[arg(long, value_name = "GBIT", value_delimiter = ',', default_values_t = [1.0, 10.0, 100.0])]
    pub gbit: Vec<f64>,
    /// Latency of a message, in microseconds
    #[arg(long, value_name = "US", default_value_t = 50.0)]
    pub latency: f64,
    /// Processor time of a message, in microseconds
    #[arg(long, value_name = "US", default_value_t = 2.0)]
    pub overhead: f64,
    /// Memory bandwidth of the thread that adds up, in gigabytes a second
    #[arg(long, value_name = "GB", default_value_t = 8.0)]
    pub memory: f64,
    /// Numbers of ranks
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 2, 8, 64, 512])]
    pub ranks: Vec<u32>,
}

/// One of GPT-2's sizes.
fn size(name: &str) -> Result<Size, String> {
    let of = |preset: &Preset| Some(preset.to_possible_value()?.get_name().to_string());
    let known = Preset::value_variants().iter().filter(|preset| preset.gpt2().is_some());
    let found = known.clone().find(|preset| of(preset).as_deref() == Some(name));
    let names: Vec<_> = known.filter_map(of).collect();
    let size = found.and_then(|preset| preset.gpt2());
    size.ok_or_else(|| format!("expected {}, found {name}", names.join(", ")))
}

/// What the model says of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Bytes that a rank sends, and as many that it receives.
    pub bytes: f64,
    /// Seconds of exchange, hidden or not.
    pub exchange: f64,
    /// Seconds that computing waits for it.
    pub waits: f64,
    /// Seconds of the step.
    pub seconds: f64,
}

/// A step of `ranks` ranks over links of `gbit` gigabits a second.
pub fn step(args: &ScalingArgs, gbit: f64, ranks: u32) -> Step {
    let c = Gpt2Config::preset(args.config);
    let (d, inner, blocks, n) =
        (c.n_embd as f64, c.inner() as f64, c.n_layer as f64, f64::from(ranks));
    let block = 4.0 * d * d + 2.0 * d * inner + 9.0 * d + inner;
    let head = c.vocab_size as f64 * d;
    let rest = head + c.n_positions as f64 * d + 2.0 * d;
    let compute = args.tokens as f64 / args.speed;
    let operations = blocks * 8.0 * block + 6.0 * head;
    let backward = compute * 6.0 * block / operations;
    let messages = (args.latency + (n - 1.0) * args.overhead) * 1e-6;
    let sent = |values: f64| 2.0 * (n - 1.0) / n * 4.0 * values;
    let time = |values: f64| {
        if ranks == 1 {
            return 0.0;
        }
        3.0 * messages + sent(values) / (gbit * 1e9 / 8.0) + 16.0 * values / (args.memory * 1e9)
    };
    let gathers = if ranks == 1 { 0.0 } else { 3.0 * messages };
    let waits =
        (blocks - 1.0) * (time(block) - backward).max(0.0) + time(block) + time(rest) + gathers;
    Step {
        bytes: sent(blocks * block + rest),
        exchange: blocks * time(block) + time(rest) + gathers,
        waits,
        seconds: compute + waits,
    }
}

/// Prints the table.
///
/// # Errors
/// Numbers that are not above 0.
pub fn scaling(args: &ScalingArgs) -> Result<(), Failure> {
    let numbers = [args.speed, args.memory].into_iter().chain(args.gbit.iter().copied());
    let positive =
        numbers.chain(args.ranks.iter().map(|&n| f64::from(n))).all(|x| x.is_finite() && x > 0.0);
    let times = [args.latency, args.overhead].iter().all(|&x| x.is_finite() && x >= 0.0);
    if !(positive && times) {
        return Err(Failure::Other(
            "speeds, bandwidths and numbers of ranks are above 0, latencies 0 or more".into(),
        ));
    }
    println!(
        "{} tokens a rank and step, {} tokens a second on one rank; message: {} us and {} us of \
         processor; memory {} GB/s",
        args.tokens, args.speed, args.latency, args.overhead, args.memory
    );
    println!(
        "  Gbit/s   ranks   sent a step    exchange       waits        step  hidden  efficiency"
    );
    for &gbit in &args.gbit {
        let one = step(args, gbit, 1).seconds;
        for &ranks in &args.ranks {
            let s = step(args, gbit, ranks);
            let hidden = if s.exchange > 0.0 {
                format!("{:.0} %", 100.0 * (1.0 - s.waits / s.exchange))
            } else {
                "-".into()
            };
            println!(
                "{gbit:>8} {ranks:>7} {:>13} {:>9.3} s {:>9.3} s {:>9.3} s {hidden:>7} {:>9.1} %",
                bytes(s.bytes as u64),
                s.exchange,
                s.waits,
                s.seconds,
                100.0 * one / s.seconds
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ScalingArgs {
        ScalingArgs {
            config: Size::Gpt2,
            tokens: 8192,
            speed: 1000.0,
            gbit: vec![10.0],
            latency: 50.0,
            overhead: 2.0,
            memory: 8.0,
            ranks: vec![2],
        }
    }

    #[test]
    fn the_model_is_what_its_page_says() {
        let (one, two) = (step(&args(), 10.0, 1), step(&args(), 10.0, 2));
        assert_eq!((one.bytes, one.waits, one.seconds), (0.0, 0.0, 8.192));
        // Two ranks send half of their gradients and half of the sums: 124,439,808 parameters of 4
        // bytes.
        assert_eq!(two.bytes, 4.0 * 124_439_808.0);
        // A block's exchange hides behind more than a quarter of a second of backward pass: block 0
        // and the rest remain.
        let rest = (50_257.0 + 1024.0 + 2.0) * 768.0 + 7_087_872.0;
        let expected = 9.0 * 52e-6 + 4.0 * rest / 1.25e9 + 16.0 * rest / 8e9;
        assert!(
            (two.waits - expected).abs() < 1e-9 && (two.seconds - 8.192 - expected).abs() < 1e-9,
            "{two:?}"
        );
        // Over a slow link nothing can hide.
        let slow = step(&args(), 1e-3, 2);
        assert!(slow.waits > 0.9 * (slow.exchange - 8.192) && slow.seconds > slow.exchange);
    }

    #[test]
    fn nonsense_is_refused() {
        for a in [
            ScalingArgs { speed: 0.0, ..args() },
            ScalingArgs { gbit: vec![f64::NAN], ..args() },
            ScalingArgs { ranks: vec![0], ..args() },
            ScalingArgs { latency: -1.0, ..args() },
        ] {
            assert!(scaling(&a).is_err());
        }
    }
}
