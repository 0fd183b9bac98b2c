//! Peak memory of a training step over depth: the reversible stack beside burn alone. One process
//! for each figure.

#[path = "../../train/src/alloc.rs"]
#[allow(dead_code)]
mod alloc;
#[path = "../../candle/src/chart.rs"]
mod chart;

use core::error::Error;
use std::process::Command;

use alloc::Counting;
use bdia_burn::model::Model;
use bdia_burn::{Options, Reversible};
use burn::backend::autodiff::checkpoint::strategy::BalancedCheckpointing;
use burn::backend::{Autodiff, NdArray};
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, Optimizer};
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::{Distribution, Tensor};
use chart::{BLUE, GREY, RED};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WIDTH: usize = 64;
const TOKENS: usize = 16;
const BATCH: usize = 128;

/// Prints the peak of two steps in bytes above what was there before the model, and the number of
/// parameters.
fn measure<B: AutodiffBackend>(blocks: usize, reversible: bool) -> Result<(), Box<dyn Error>> {
    let device = Default::default();
    let before = Counting::current();
    let mut model = Model::<B>::new(blocks, WIDTH, 0.0, &device);
    let mut optimizer = AdamWConfig::new().init();
    let mut stack = Reversible::new(Options::default());
    Counting::reset_peak();
    for _ in 0..2 {
        let images = Tensor::<B, 3>::random([BATCH, TOKENS, 4], Distribution::Default, &device);
        let target = Tensor::<B, 2>::random([BATCH, 10], Distribution::Default, &device);
        let x = model.embed.forward(images);
        let grads = if reversible {
            let (y, tape) = stack.forward(&model.blocks, x)?;
            let loss = model.loss(y, target);
            tape.backward(loss, &model)?
        } else {
            let loss = model.loss(model.standard(x), target);
            GradientsParams::from_grads(loss.backward(), &model)
        };
        model = optimizer.step(1e-3, model, grads);
    }
    println!("{} {}", Counting::peak().saturating_sub(before), model.num_params());
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [way, blocks] = &words[..] {
        let blocks = blocks.parse()?;
        return match way.as_str() {
            "alone" => measure::<Autodiff<NdArray>>(blocks, false),
            "balanced" => measure::<Autodiff<NdArray, BalancedCheckpointing>>(blocks, false),
            "reversible" => measure::<Autodiff<NdArray>>(blocks, true),
            _ => Err("expected no words, or alone, balanced or reversible, and a number of blocks"
                .into()),
        };
    }
    let run = |way: &str, blocks: usize| -> Result<(f64, f64), Box<dyn Error>> {
        let out =
            Command::new(std::env::current_exe()?).args([way, &blocks.to_string()]).output()?;
        let text = String::from_utf8(out.stdout)?;
        let failed = || String::from_utf8_lossy(&out.stderr).into_owned();
        let (peak, parameters) = text.trim().split_once(' ').ok_or_else(failed)?;
        Ok((peak.parse::<f64>()? / 1e6, parameters.parse::<f64>()? * 16.0 / 1e6))
    };
    println!("width {WIDTH}, {TOKENS} tokens, batch {BATCH}, f32; MB are 10^6 bytes");
    println!(
        "blocks  burn alone  balanced checkpointing  reversible  of it parameters, gradients, \
         moments"
    );
    let mut points = Vec::new();
    for blocks in [6, 12, 24, 48] {
        let ((alone, floor), (balanced, _)) = (run("alone", blocks)?, run("balanced", blocks)?);
        let (ours, _) = run("reversible", blocks)?;
        println!(
            "{blocks:>6}  {alone:>7.1} MB  {balanced:>19.1} MB  {ours:>7.1} MB  {floor:>7.1} MB"
        );
        points.push((blocks as f64, [alone, balanced, ours, floor]));
    }
    let lines = [
        ("burn alone", RED),
        ("burn, balanced checkpointing", chart::ORANGE),
        ("bdia-burn, reversible", BLUE),
        ("parameters, gradients, moments", GREY),
    ];
    chart::draw("memory.svg".as_ref(), "Peak memory of a training step in burn", lines, &points)
}
