//! `experiment`: the paper's comparison on translation, with BLEU. The files are those of
//! [`bdia_train::study`], and one picture more: `regularizers-bleu.svg` beside `regularizers.svg`,
//! which has the losses.

use bdia_train::Failure;
use bdia_train::cli::Mode;
use bdia_train::report;
use bdia_train::study::{self, Study, Table};
use bdia_train::trainer::{Metric, Summary};

use crate::cli::{ExperimentArgs, TrainArgs};
use crate::train::train;

/// The standard transformer, with more dropout, on the grid without γ, and BDIA: loss and BLEU over
/// epochs, for every seed.
///
/// # Errors
/// [`Failure`]; what is finished stays, and the same command goes on.
pub fn run(args: &ExperimentArgs) -> Result<(), Failure> {
    study::begin(&args.dir, &args.train, &["method"])?;
    let study: Study<'_, TrainArgs, Summary> =
        Study { dir: &args.dir, seeds: args.seeds, base: &args.train, train };
    let more = args.more_dropout;
    let mut cells = vec![
        study.cell("standard", 0.0, |a| a.run.mode.mode = Mode::Standard),
        study.cell(format!("standard-dropout-{more}"), 1.0, |a| {
            (a.run.mode.mode, a.dropout) = (Mode::Standard, more)
        }),
        study.cell("bdia", 2.0, |a| a.run.mode.mode = Mode::Bdia),
    ];
    if args.grid {
        cells.push(study.cell("standard-grid", 3.0, |a| {
            (a.run.mode.mode, a.run.mode.quantize) = (Mode::Standard, true)
        }));
    }
    let results = study.results(&cells)?;
    let columns = [
        "val_loss",
        "best_val_loss",
        "train_loss",
        "bleu",
        "chrf",
        "exact",
        "activation_bytes",
        "plan_bytes",
        "peak_bytes",
    ];
    let mut table = Table::of_runs(&columns, &cells, &results, |s| {
        vec![
            s.val_loss.unwrap_or(f64::NAN),
            s.best_val_loss.unwrap_or(f64::NAN),
            s.loss.unwrap_or(f64::NAN),
            s.score("bleu"),
            s.score("chrf"),
            s.score("exact"),
            s.activation_bytes as f64,
            s.plan_bytes as f64,
            s.peak_bytes as f64,
        ]
    });
    let speeds = study.speeds(
        &cells,
        |a| {
            (a.run.steps, a.run.epochs, a.run.eval_interval) = (None, 1, 0);
            (a.translate, a.run.checkpoint_interval) = (0, 0);
            // The vocabulary of all pairs: logits take a good part of the time.
            a.weights = Some(study.run_dir("standard", 1));
            (a.pairs, a.held) = (Some(a.pairs.unwrap_or(u64::MAX).min(1000)), Some(20));
        },
        |s| 1e6 / s.items_per_s.unwrap_or(f64::NAN),
    )?;
    table.push("us_per_token", speeds);
    table.csv(study.dir, "regularizers")?;
    let loss = study.curves(&cells, |m: &Metric| m.val_loss)?;
    study.draw(
        "regularizers",
        "Held-out loss in training",
        "optimizer step",
        "loss (nats a token)",
        &loss,
    )?;
    let bleu = study.curves(&cells, |m: &Metric| m.scores.get("bleu").copied())?;
    study.draw("regularizers-bleu", "BLEU in training", "optimizer step", "BLEU, greedy", &bleu)?;
    report::tell!("tables and pictures: {}/regularizers*.csv, .svg", args.dir.display());
    Ok(())
}
