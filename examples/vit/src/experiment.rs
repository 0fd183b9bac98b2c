//! `experiment`: many runs, and what they show. The files are those of [`bdia_train::study`].

use bdia_core::{FloatGamma, Sign};
use bdia_models::inference::Inference;
use bdia_train::Failure;
use bdia_train::cli::{GammaSign, Mode, name_of};
use bdia_train::report::{self, Series};
use bdia_train::study::{self, Table};
use bdia_train::trainer::{Metric, Summary};

use crate::cli::{Experiment, ExperimentArgs, Network, TrainArgs};
use crate::train;

type Study<'a> = study::Study<'a, TrainArgs, Summary>;
type Cell = study::Cell<TrainArgs>;

fn standard(study: &Study<'_>) -> Cell {
    study.cell("vit", 0.0, |a| a.run.mode.mode = Mode::Standard)
}

fn bdia(study: &Study<'_>) -> Cell {
    study.cell("bdia", 0.5, |a| a.run.mode.mode = Mode::Bdia)
}

/// What a run tells in every experiment.
fn of_runs(cells: &[Cell], results: &[Vec<Summary>]) -> Table {
    let columns = [
        "accuracy",
        "best_accuracy",
        "val_loss",
        "train_loss",
        "activation_bytes",
        "plan_bytes",
        "peak_bytes",
    ];
    Table::of_runs(&columns, cells, results, |s| {
        vec![
            s.score("accuracy"),
            s.score("best_accuracy"),
            s.val_loss.unwrap_or(f64::NAN),
            s.loss.unwrap_or(f64::NAN),
            s.activation_bytes as f64,
            s.plan_bytes as f64,
            s.peak_bytes as f64,
        ]
    })
}

/// Runs an experiment, as far as it has not been run.
///
/// # Errors
/// [`Failure`]; what is finished stays.
pub fn run(args: &ExperimentArgs) -> Result<(), Failure> {
    study::begin(&args.dir, &args.train, &["network", "method"])?;
    let study = Study { dir: &args.dir, seeds: args.seeds, base: &args.train, train: train::train };
    match args.name {
        Experiment::Accuracy => accuracy(&study),
        Experiment::Gamma => gamma(&study),
        Experiment::Robustness => robustness(&study),
        Experiment::Reconstruction => reconstruction(&study),
        Experiment::Precision => precision(&study),
        Experiment::Inference => inference(&study),
        Experiment::Regularizers => regularizers(&study),
    }?;
    report::tell!("tables and pictures: {}/{}.csv, .svg", args.dir.display(), name_of(&args.name));
    Ok(())
}

/// Held-out accuracy over steps, by cell: mean and deviation over seeds.
fn curves<'s>(study: &Study<'_>, cells: &'s [Cell]) -> Result<Vec<Series<'s>>, Failure> {
    study.curves(cells, |m: &Metric| m.scores.get("accuracy").map(|a| 100.0 * a))
}

/// ViT, the same with the grid, RevViT, BDIA with one and with two bits.
fn accuracy(study: &Study<'_>) -> Result<(), Failure> {
    let cells = [
        standard(study),
        study.cell("vit-grid", 1.0, |a| {
            (a.run.mode.mode, a.run.mode.quantize) = (Mode::Standard, true)
        }),
        study.cell("revvit", 2.0, |a| a.network = Network::Revvit),
        bdia(study),
        study.cell("bdia-m2", 0.25, |a| a.run.mode.gamma = 0.25.into()),
    ];
    let results = study.results(&cells)?;
    let mut table = of_runs(&cells, &results);
    let speeds = study.speeds(
        &cells,
        |a| {
            (a.run.steps, a.run.epochs, a.run.eval_interval, a.run.checkpoint_interval) =
                (None, 1, 0, 0);
            let images = a.batch * a.run.accumulate;
            (a.train_subset, a.test_subset) = (Some(images * 8), Some(images));
        },
        |s| 1000.0 / s.items_per_s.unwrap_or(f64::NAN),
    )?;
    table.push("ms_per_image", speeds);
    table.csv(study.dir, "accuracy")?;
    let y = "held-out accuracy (%)";
    study.draw("accuracy", "Accuracy in training", "optimizer step", y, &curves(study, &cells)?)
}

/// Magnitudes of γ: without a grid, and those that have an exact inverse.
fn gamma(study: &Study<'_>) -> Result<(), Failure> {
    let mut cells = Vec::new();
    for g in [0.0, 0.25, 0.5, 0.6] {
        cells.push(study.cell(format!("float-{g}"), g, |a| {
            (a.run.mode.mode, a.run.mode.gamma, a.run.mode.gamma_sign) =
                (Mode::BdiaFloat, g.into(), GammaSign::Random);
        }));
    }
    cells.push(study.cell("vit-grid", 0.0, |a| {
        (a.run.mode.mode, a.run.mode.quantize) = (Mode::Standard, true)
    }));
    cells.push(study.cell("bdia-m2", 0.25, |a| a.run.mode.gamma = 0.25.into()));
    cells.push(bdia(study));
    let results = study.results(&cells)?;
    let table = of_runs(&cells, &results);
    table.csv(study.dir, "gamma")?;
    let series = [
        table.series("without a grid", 0, 100.0, |n| n.starts_with("float")),
        table.series("on the grid", 0, 100.0, |n| !n.starts_with("float")),
    ];
    study.draw(
        "gamma",
        "Magnitude of gamma in training",
        "|gamma|",
        "held-out accuracy (%)",
        &series,
    )
}

/// A constant γ at inference of networks trained without and with BDIA (the paper's figure on
/// robustness).
fn robustness(study: &Study<'_>) -> Result<(), Failure> {
    let gammas: Vec<f64> = (-5..=5).map(|i| f64::from(i) / 10.0).collect();
    let inferences = gammas
        .iter()
        .map(|&g| Ok(Inference::Float(FloatGamma::new(g, Sign::Plus)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    let mut table = Table { columns: vec!["accuracy", "val_loss"], rows: Vec::new() };
    let cells = [standard(study), bdia(study)];
    study.results(&cells)?;
    for cell in &cells {
        let mut rows = vec![Vec::new(); gammas.len()];
        for seed in 1..=study.seeds {
            let dir = study.run_dir(&cell.name, seed);
            let all =
                train::evaluation(&dir, None, false, &inferences, &study.base.run.machine, None)?;
            for (row, e) in rows.iter_mut().zip(all) {
                row.push(vec![e.accuracy, e.loss]);
            }
        }
        table.rows.extend(gammas.iter().zip(rows).map(|(&g, rows)| (cell.name.clone(), g, rows)));
    }
    table.csv(study.dir, "robustness")?;
    let series = cells.each_ref().map(|c| table.series(&c.name, 0, 100.0, |n| n == c.name));
    study.draw(
        "robustness",
        "A constant gamma at inference",
        "gamma",
        "held-out accuracy (%)",
        &series,
    )
}

/// What is lost by rebuilding, in the first steps of networks of every depth.
fn reconstruction(study: &Study<'_>) -> Result<(), Failure> {
    let mut table = Table {
        columns: vec!["largest_error", "log10_largest_error", "differing"],
        rows: Vec::new(),
    };
    let images = study.base.batch * study.base.run.accumulate * 4;
    for layers in [2_u64, 4, 8, 16, 24] {
        let change = |a: &mut TrainArgs| {
            (a.layers, a.run.verify, a.train_subset) = (Some(layers), true, Some(images));
            (a.run.steps, a.run.epochs, a.run.eval_interval, a.run.checkpoint_interval) =
                (None, 1, 0, 0);
        };
        let cells = [
            study.cell(format!("rebuild-float-{layers}"), layers as f64, |a| {
                change(a);
                a.run.mode.mode = Mode::BdiaFloat;
            }),
            study.cell(format!("rebuild-revvit-{layers}"), layers as f64, |a| {
                change(a);
                a.network = Network::Revvit;
            }),
            study.cell(format!("rebuild-bdia-{layers}"), layers as f64, change),
        ];
        for (cell, results) in cells.iter().zip(study.results(&cells)?) {
            let rows = results.iter().map(|s| {
                let (error, differing) =
                    (s.rebuild_error.unwrap_or(0.0), s.verify_mismatches.unwrap_or(0) as f64);
                vec![error, error.max(1e-12).log10(), differing]
            });
            table.rows.push((cell.name.clone(), cell.x, rows.collect()));
        }
    }
    table.csv(study.dir, "reconstruction")?;
    let kinds = [
        ("BDIA in float", "rebuild-float"),
        ("RevViT", "rebuild-revvit"),
        ("BDIA on the grid (exact)", "rebuild-bdia"),
    ];
    let series = kinds.map(|(name, prefix)| table.series(name, 1, 1.0, |n| n.starts_with(prefix)));
    let y = "log10 of the largest error (floor -12)";
    study.draw("reconstruction", "Error of rebuilt activations", "blocks", y, &series)
}

/// How fine the grid has to be, and how much room it leaves.
fn precision(study: &Study<'_>) -> Result<(), Failure> {
    let all: Vec<u32> = (5..=18).collect();
    let cells: Vec<_> = all
        .iter()
        .map(|&l| study.cell(format!("grid-{l}"), f64::from(l), |a| a.run.mode.frac_bits = l))
        .collect();
    let results = study.results(&cells)?;
    let mut table = of_runs(&cells, &results);
    table.columns.extend(["largest_activation", "margin_bits"]);
    for ((_, l, rows), cell) in table.rows.iter_mut().zip(&cells) {
        for (row, seed) in rows.iter_mut().zip(1..) {
            let largest = train::largest_activation(
                &study.run_dir(&cell.name, seed),
                &study.base.run.machine,
            )?;
            row.extend([largest, 30.0 - *l - largest.log2()]);
        }
    }
    table.csv(study.dir, "precision")?;
    let series = [table.series("bdia", 0, 100.0, |_| true)];
    study.draw(
        "precision",
        "Fineness of the grid",
        "l (the grid is 2^-l)",
        "held-out accuracy (%)",
        &series,
    )
}

/// The same weights in float and on grids.
fn inference(study: &Study<'_>) -> Result<(), Failure> {
    let grids = [5, 6, 7, 8, 9, 10, 12, 14];
    let cells = [standard(study), bdia(study)];
    study.results(&cells)?;
    let mut table =
        Table { columns: vec!["accuracy", "val_loss", "accuracy_change"], rows: Vec::new() };
    for cell in &cells {
        let mut rows = vec![Vec::new(); grids.len() + 1];
        for seed in 1..=study.seeds {
            let dir = study.run_dir(&cell.name, seed);
            let one = |inference, l| {
                let all =
                    train::evaluation(&dir, None, false, &[inference], &study.base.run.machine, l)?;
                all.into_iter().next().ok_or_else(|| Failure::Other("no evaluation".into()))
            };
            let float = one(Inference::STANDARD, None)?;
            rows[grids.len()].push(vec![float.accuracy, float.loss, 0.0]);
            for (row, &l) in rows.iter_mut().zip(&grids) {
                let e = one(Inference::Quantized(None), Some(l))?;
                row.push(vec![e.accuracy, e.loss, e.accuracy - float.accuracy]);
            }
        }
        let mut rows = rows.into_iter();
        table.rows.extend(
            grids
                .iter()
                .zip(&mut rows)
                .map(|(&l, r)| (format!("{}-grid", cell.name), f64::from(l), r)),
        );
        table.rows.extend(rows.map(|r| (format!("{}-float", cell.name), 24.0, r)));
    }
    table.csv(study.dir, "inference")?;
    let names = cells.each_ref().map(|c| format!("{}-grid", c.name));
    let series = names.each_ref().map(|name| table.series(name, 2, 100.0, |n| n == name));
    let y = "accuracy, grid less float (points)";
    study.draw("inference", "Inference on the grid", "l (the grid is 2^-l)", y, &series)
}

/// BDIA beside the regularizers that everybody has.
fn regularizers(study: &Study<'_>) -> Result<(), Failure> {
    let with = |name: &str, x: f64, change: &dyn Fn(&mut TrainArgs)| {
        study.cell(name, x, |a| {
            a.run.mode.mode = Mode::Standard;
            change(a);
        })
    };
    let cells = [
        with("vit-plain", 0.0, &|a| a.dropout = 0.0),
        with("vit-dropout-0.1", 1.0, &|a| a.dropout = 0.1),
        with("vit-dropout-0.3", 2.0, &|a| a.dropout = 0.3),
        with("vit-drop-path-0.2", 3.0, &|a| (a.dropout, a.drop_path) = (0.0, 0.2)),
        with("vit-weight-decay-0.05", 4.0, &|a| {
            (a.dropout, a.run.optim.weight_decay) = (0.0, 0.05)
        }),
        study.cell("bdia-plain", 5.0, |a| a.dropout = 0.0),
        study.cell("bdia-dropout-0.1", 6.0, |a| a.dropout = 0.1),
    ];
    let results = study.results(&cells)?;
    of_runs(&cells, &results).csv(study.dir, "regularizers")?;
    let y = "held-out accuracy (%)";
    study.draw(
        "regularizers",
        "BDIA beside other regularizers",
        "optimizer step",
        y,
        &curves(study, &cells)?,
    )
}
