//! `experiment`: the paper's comparisons on language. The files are those of [`bdia_train::study`].

use std::path::PathBuf;

use bdia_models::files::{read_limited, write_bytes};
use bdia_train::Failure;
use bdia_train::cli::{FrozenKind, Inference, MethodKind, Mode};
use bdia_train::report;
use bdia_train::study::{self, Cell, Study, Table};
use bdia_train::trainer::{Metric, Summary};
use serde::{Deserialize, Serialize};

use crate::cli::{
    DecodingArgs, FinetuneArgs, FinetuneStudyArgs, ModelTextArgs, ScoreArgs, SmallDataArgs,
    TaskKind, TrainArgs,
};
use crate::finetune;
use crate::score::{self, Found};
use crate::train::train;

/// Columns of a run, with and without what is told of texts.
const COLUMNS: [&str; 6] =
    ["val_loss", "best_val_loss", "train_loss", "activation_bytes", "plan_bytes", "peak_bytes"];

fn row(s: &Summary) -> Vec<f64> {
    let or = |x: Option<f64>| x.unwrap_or(f64::NAN);
    let [activations, plan, peak] =
        [s.activation_bytes, s.plan_bytes, s.peak_bytes].map(|b| b as f64);
    vec![or(s.val_loss), or(s.best_val_loss), or(s.loss), activations, plan, peak]
}

/// Microseconds for a token.
fn us_per_token(s: &Summary) -> f64 {
    s.items_per_s.map_or(f64::NAN, |speed| 1e6 / speed)
}

/// Scores of a run with the flags that they were found with, so that they are not found twice.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Scored {
    decoding: DecodingArgs,
    data: Option<PathBuf>,
    found: Found,
}

/// All parameters and adapters, in mode standard and bdia, and adapters beside parameters in 16
/// bits: validation loss, scores of texts, memory and time, for every seed.
///
/// # Errors
/// [`Failure`]; what is finished stays, and the same command goes on.
pub fn finetune(args: &FinetuneStudyArgs) -> Result<(), Failure> {
    let chosen = ["method", "frozen_dtype"];
    study::begin(&args.dir, &args.finetune, &chosen)?;
    let base = &args.finetune;
    let study: Study<'_, FinetuneArgs, Summary> =
        Study { dir: &args.dir, seeds: args.seeds, base, train: finetune::finetune };
    let lora =
        |a: &mut FinetuneArgs| (a.method.method, a.run.optim.lr) = (MethodKind::Lora, args.lora_lr);
    let cells = [
        study.cell("full-standard", 0.0, |a| a.run.mode.mode = Mode::Standard),
        study.cell("full-bdia", 1.0, |a| a.run.mode.mode = Mode::Bdia),
        study.cell("lora-standard", 2.0, |a| {
            lora(a);
            a.run.mode.mode = Mode::Standard;
        }),
        study.cell("lora-bdia", 3.0, |a| {
            lora(a);
            a.run.mode.mode = Mode::Bdia;
        }),
        study.cell("lora-bdia-bf16", 4.0, |a| {
            lora(a);
            a.run.mode.mode = Mode::Bdia;
            a.method.frozen_dtype = Some(FrozenKind::Bf16);
        }),
    ];
    let results = study.results(&cells)?;
    let mut table = Table::of_runs(&COLUMNS, &cells, &results, row);
    if let Some(scores) = scores(args, &study, &cells)? {
        let mut push = |name, of: fn(&Found) -> f64| {
            table.push(name, scores.iter().map(|seeds| seeds.iter().map(of).collect()).collect());
        };
        push("bleu", |f| f.bleu);
        push("nist", |f| f.nist);
        push("meteor", |f| f.meteor);
        push("rouge_l", |f| f.rouge_l);
        push("cider", |f| f.cider);
    }
    let short = |a: &mut FinetuneArgs| {
        (a.run.steps, a.run.epochs, a.run.eval_interval, a.run.checkpoint_interval) =
            (6, None, 0, 0);
    };
    table.push("us_per_token", study.speeds(&cells, short, us_per_token)?);
    table.csv(study.dir, "finetune")?;
    let loss = study.curves(&cells, |m: &Metric| m.val_loss)?;
    study.draw(
        "finetune",
        "Validation loss in fine-tuning",
        "optimizer step",
        "loss (nats a token)",
        &loss,
    )?;
    report::tell!("tables and pictures: {}/finetune*.csv, .svg", args.dir.display());
    Ok(())
}

/// Scores of all runs' texts, where there are prompts to write them from: in text there are none.
fn scores(
    args: &FinetuneStudyArgs,
    study: &Study<'_, FinetuneArgs, Summary>,
    cells: &[Cell<FinetuneArgs>],
) -> Result<Option<Vec<Vec<Found>>>, Failure> {
    let base = &args.finetune;
    let has_prompts = matches!(base.task, TaskKind::E2e | TaskKind::Pairs);
    let Some(data) = base.validation.as_ref().filter(|_| has_prompts) else {
        return Ok(None);
    };
    let data = std::path::absolute(data).unwrap_or_else(|_| data.clone());
    let weights = base.weights.clone();
    let mut all = Vec::new();
    for cell in cells {
        let mut seeds = Vec::new();
        for seed in 1..=args.seeds {
            let dir = study.run_dir(&cell.name, seed);
            let path = dir.join("scores.json");
            let known = path.exists().then(|| read_limited(&path, 1 << 20)).transpose()?;
            let known = known.and_then(|bytes| serde_json::from_slice::<Scored>(&bytes).ok());
            let same = |s: &Scored| s.decoding == args.decoding && s.data.as_ref() == Some(&data);
            if let Some(scored) = known.filter(same) {
                seeds.push(scored.found);
                continue;
            }
            report::note!("\ntexts of {} with seed {seed}", cell.name);
            let (weights, adapter) = score::of_run(&dir, weights.as_ref());
            let wanted = ScoreArgs {
                weights,
                adapter,
                task: base.task,
                data: data.clone(),
                pairs: base.pairs.clone(),
                text: ModelTextArgs { special_tokens: Some(base.text.special_tokens) },
                decoding: args.decoding,
                output: Some(dir.join("texts.txt")),
                inference: Inference::Float,
                gamma: None,
                json: false,
                machine: base.run.machine.clone(),
            };
            let Some(found) = score::measure(&wanted)? else {
                return Err(Failure::Other("stopped; the same command goes on from here".into()));
            };
            let scored = Scored { decoding: args.decoding, data: Some(data.clone()), found };
            let json =
                serde_json::to_vec_pretty(&scored).map_err(|e| Failure::Other(e.to_string()))?;
            write_bytes(&path, &json)?;
            seeds.push(found);
        }
        all.push(seeds);
    }
    Ok(Some(all))
}

/// The standard transformer, with more dropout, and BDIA, from scratch on little text: training and
/// validation loss over steps, for every seed.
///
/// # Errors
/// [`Failure`]; what is finished stays, and the same command goes on.
pub fn small_data(args: &SmallDataArgs) -> Result<(), Failure> {
    study::begin(&args.dir, &args.train, &["weights"])?;
    let study: Study<'_, TrainArgs, Summary> =
        Study { dir: &args.dir, seeds: args.seeds, base: &args.train, train };
    let more = args.more_dropout;
    let cells = [
        study.cell("standard", 0.0, |a| a.run.mode.mode = Mode::Standard),
        study.cell(format!("standard-dropout-{more}"), 1.0, |a| {
            (a.run.mode.mode, a.run.dropout) = (Mode::Standard, more);
        }),
        study.cell("bdia", 2.0, |a| a.run.mode.mode = Mode::Bdia),
    ];
    let results = study.results(&cells)?;
    let mut table = Table::of_runs(&COLUMNS, &cells, &results, row);
    let short = |a: &mut TrainArgs| {
        (a.run.steps, a.run.eval_interval, a.run.checkpoint_interval) = (6, 0, 0)
    };
    table.push("us_per_token", study.speeds(&cells, short, us_per_token)?);
    table.csv(study.dir, "small-data")?;
    let loss = study.curves(&cells, |m: &Metric| m.val_loss)?;
    study.draw("small-data", "Validation loss", "optimizer step", "loss (nats a token)", &loss)?;
    let loss = study.curves(&cells, |m: &Metric| Some(m.loss))?;
    study.draw(
        "small-data-training",
        "Training loss",
        "optimizer step",
        "loss (nats a token)",
        &loss,
    )?;
    report::tell!("tables and pictures: {}/small-data*.csv, .svg", args.dir.display());
    Ok(())
}
