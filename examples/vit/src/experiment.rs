//! `experiment`: many runs, and what they show.
//!
//! ```text
//! DIR/runs/CELL/seed-N/        one run; result.json when it is finished, so that it is not repeated
//! DIR/NAME-runs.csv            every run of an experiment
//! DIR/NAME.csv, DIR/NAME.svg   mean and standard deviation over seeds; the picture
//! ```
//! A cell is the flags of the command line with some of them replaced; experiments share cells.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bdia_core::{Gamma, Sign};
use bdia_train::cli::{GammaSign, Mode};
use bdia_train::files::{FileError, read_limited, write_bytes};
use bdia_train::report::{self, Chart, Metrics, Series};
use bdia_train::{Failure, checkpoint};
use serde::{Deserialize, Serialize};

use crate::cli::{Experiment, ExperimentArgs, Network, TrainArgs, name_of};
use crate::model::Inference;
use crate::train::{self, Metric, Summary};

/// A finished run: its flags and what it ended with.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Finished {
    args: TrainArgs,
    summary: Summary,
}

/// A cell: its name, its place on the picture's axis, and its flags.
struct Cell {
    name: String,
    x: f64,
    args: TrainArgs,
}

/// Where the experiments are, and the flags that all runs share.
struct Study<'a> {
    dir: &'a Path,
    seeds: u64,
    base: &'a TrainArgs,
}

/// Mean and standard deviation (of a sample; 0 for one value).
pub fn mean_std(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

impl Study<'_> {
    fn cell(&self, name: impl Into<String>, x: f64, change: impl FnOnce(&mut TrainArgs)) -> Cell {
        let mut args = self.base.clone();
        change(&mut args);
        Cell { name: name.into(), x, args }
    }

    fn run_dir(&self, cell: &str, seed: u64) -> PathBuf {
        self.dir.join("runs").join(cell).join(format!("seed-{seed}"))
    }

    /// The result of a run: the saved one, or that of the run, begun or gone on with.
    fn result(&self, cell: &Cell, seed: u64) -> Result<Summary, Failure> {
        let out = self.run_dir(&cell.name, seed);
        let args = TrainArgs { seed, out: out.clone(), json: false, resume: None, ..cell.args.clone() };
        // What changes no number may change.
        let same = |saved: &TrainArgs| {
            let blank = |a: &TrainArgs| {
                let mut a = TrainArgs { given: Default::default(), out: PathBuf::new(), verify: false, ..a.clone() };
                (a.machine.threads, a.checkpoint_interval, a.resume) = (None, 0, None);
                if let Some(data) = &mut a.data {
                    *data = std::path::absolute(&*data).unwrap_or_else(|_| data.clone());
                }
                a
            };
            blank(saved) == blank(&args)
        };
        let other = |path: PathBuf| Failure::Run {
            path,
            what: "it was made with other flags; use the same ones, or another --dir".into(),
        };
        let path = out.join("result.json");
        if path.exists() {
            let finished: Finished = serde_json::from_slice(&read_limited(&path, 1 << 22)?)
                .map_err(|e| Failure::Run { path: path.clone(), what: format!("not the result of a run: {e}") })?;
            return if same(&finished.args) { Ok(finished.summary) } else { Err(other(path)) };
        }
        report::note!("\n{} with seed {seed}", cell.name);
        let begun = !checkpoint::list(&out).is_empty();
        if begun {
            let path = out.join("run.json");
            if !same(&bdia_train::run::saved::<TrainArgs>(&out)?) {
                return Err(other(path));
            }
        }
        let go = if begun { TrainArgs { resume: Some(out.clone()), ..args.clone() } } else { args.clone() };
        let Some(summary) = train::train(&go)? else {
            return Err(Failure::Other("stopped; the same command goes on from here".into()));
        };
        let finished = Finished { args, summary: summary.clone() };
        let json = serde_json::to_vec_pretty(&finished).map_err(|e| Failure::Other(e.to_string()))?;
        write_bytes(&path, &json)?;
        Ok(summary)
    }

    /// The results of all cells and seeds.
    fn results(&self, cells: &[Cell]) -> Result<Vec<Vec<Summary>>, Failure> {
        cells.iter().map(|c| (1..=self.seeds).map(|seed| self.result(c, seed)).collect()).collect()
    }

    /// Milliseconds an image of every cell and seed, from runs of a few steps each, made after all others and in turn:
    /// a machine whose speed changes, or that did something else during the long runs, treats all cells alike.
    fn speeds(&self, cells: &[Cell]) -> Result<Vec<Vec<f64>>, Failure> {
        let mut speeds = vec![Vec::new(); cells.len()];
        for seed in 1..=self.seeds {
            for (cell, speeds) in cells.iter().zip(&mut speeds) {
                let mut args = cell.args.clone();
                (args.epochs, args.eval_interval, args.checkpoint_interval) = (1, 0, 0);
                (args.train_subset, args.test_subset) = (Some(args.batch * 8), Some(args.batch));
                let run = Cell { name: format!("time-{}", cell.name), x: cell.x, args };
                speeds.push(1000.0 / self.result(&run, seed)?.images_per_s);
            }
        }
        Ok(speeds)
    }

    fn standard(&self) -> Cell {
        self.cell("vit", 0.0, |a| a.mode.mode = Mode::Standard)
    }

    fn bdia(&self) -> Cell {
        self.cell("bdia", 0.5, |a| a.mode.mode = Mode::Bdia)
    }
}

/// Columns of numbers by cell: one row a run, and one a cell.
struct Table {
    columns: Vec<&'static str>,
    /// Cell, place on the axis, a row of values a seed.
    rows: Vec<(String, f64, Vec<Vec<f64>>)>,
}

impl Table {
    /// What a run tells in every experiment.
    fn of_runs(cells: &[Cell], results: &[Vec<Summary>]) -> Self {
        let columns =
            vec!["accuracy", "best_accuracy", "val_loss", "train_loss", "activation_bytes", "plan_bytes", "peak_bytes"];
        let row = |s: &Summary| {
            vec![
                s.accuracy,
                s.best_accuracy,
                s.val_loss,
                s.loss,
                s.activation_bytes as f64,
                s.plan_bytes as f64,
                s.peak_bytes as f64,
            ]
        };
        let rows = cells.iter().zip(results).map(|(c, r)| (c.name.clone(), c.x, r.iter().map(row).collect())).collect();
        Self { columns, rows }
    }

    fn csv(&self, study: &Study<'_>, name: &str) -> Result<(), Failure> {
        let mut runs = format!("cell,x,seed,{}\n", self.columns.join(","));
        let mut means = String::from("cell,x,seeds");
        for c in &self.columns {
            means += &format!(",{c}_mean,{c}_std");
        }
        means.push('\n');
        for (cell, x, values) in &self.rows {
            for (seed, row) in values.iter().enumerate() {
                let row: Vec<_> = row.iter().map(ToString::to_string).collect();
                runs += &format!("{cell},{x},{},{}\n", seed + 1, row.join(","));
            }
            means += &format!("{cell},{x},{}", values.len());
            for c in 0..self.columns.len() {
                let (mean, std) = self.column(values, c);
                means += &format!(",{mean},{std}");
            }
            means.push('\n');
        }
        write_bytes(&study.dir.join(format!("{name}-runs.csv")), runs.as_bytes())?;
        write_bytes(&study.dir.join(format!("{name}.csv")), means.as_bytes())?;
        for (cell, x, values) in &self.rows {
            let cells: Vec<_> = (self.columns.iter().enumerate())
                .map(|(c, name)| {
                    let (mean, std) = self.column(values, c);
                    format!("{name} {mean:.6} ± {std:.6}")
                })
                .collect();
            report::tell!("{cell} ({x}): {}", cells.join(", "));
        }
        Ok(())
    }

    fn column(&self, values: &[Vec<f64>], c: usize) -> (f64, f64) {
        mean_std(&values.iter().map(|row| row[c]).collect::<Vec<_>>())
    }

    /// One column over the axis, for the cells that `of` names.
    fn series<'s>(&self, name: &'s str, column: usize, factor: f64, of: impl Fn(&str) -> bool) -> Series<'s> {
        let mut series = Series { name, marks: true, ..Series::default() };
        let mut points: Vec<_> = (self.rows.iter().filter(|r| of(&r.0)))
            .map(|(_, x, values)| {
                let (mean, std) = self.column(values, column);
                (*x, factor * mean, factor * std)
            })
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (x, y, spread) in points {
            series.points.push((x, y));
            series.spread.push(spread);
        }
        series
    }
}

/// Runs an experiment, as far as it has not been run.
///
/// # Errors
/// [`Failure`]; what is finished stays.
pub fn run(args: &ExperimentArgs) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.dir).map_err(|e| FileError::io(&args.dir, "create the directory", e))?;
    if args.train.resume.is_some() || args.train.network == Network::Revvit {
        return Err(Failure::Other(
            "experiments choose --network, --mode and --resume of their runs themselves".into(),
        ));
    }
    let study = Study { dir: &args.dir, seeds: args.seeds, base: &args.train };
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

fn draw(study: &Study<'_>, name: &str, title: &str, x: &str, y: &str, series: &[Series<'_>]) -> Result<(), Failure> {
    Ok(report::svg(&study.dir.join(format!("{name}.svg")), &Chart { title, x, y, series })?)
}

/// Held-out accuracy over steps, by cell: mean and deviation over seeds.
fn curves<'s>(study: &Study<'_>, cells: &'s [Cell]) -> Result<Vec<Series<'s>>, Failure> {
    let mut all = Vec::new();
    for cell in cells {
        let mut by_step: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for seed in 1..=study.seeds {
            let log = study.run_dir(&cell.name, seed).join("metrics.jsonl");
            for m in Metrics::<Metric>::read(&log)? {
                if let Some(a) = m.accuracy {
                    by_step.entry(m.step).or_default().push(100.0 * a);
                }
            }
        }
        let mut series = Series { name: &cell.name, ..Series::default() };
        for (step, values) in by_step {
            let (mean, std) = mean_std(&values);
            series.points.push((step as f64, mean));
            series.spread.push(std);
        }
        all.push(series);
    }
    Ok(all)
}

/// ViT, the same with the grid, RevViT, BDIA with one and with two bits.
fn accuracy(study: &Study<'_>) -> Result<(), Failure> {
    let cells = [
        study.standard(),
        study.cell("vit-grid", 1.0, |a| (a.mode.mode, a.mode.quantize) = (Mode::Standard, true)),
        study.cell("revvit", 2.0, |a| a.network = Network::Revvit),
        study.bdia(),
        study.cell("bdia-m2", 0.25, |a| a.mode.gamma = 0.25),
    ];
    let results = study.results(&cells)?;
    let mut table = Table::of_runs(&cells, &results);
    for ((_, _, rows), speeds) in table.rows.iter_mut().zip(study.speeds(&cells)?) {
        for (row, speed) in rows.iter_mut().zip(speeds) {
            row.push(speed);
        }
    }
    table.columns.push("ms_per_image");
    table.csv(study, "accuracy")?;
    let y = "held-out accuracy (%)";
    draw(study, "accuracy", "Accuracy in training", "optimizer step", y, &curves(study, &cells)?)
}

/// Magnitudes of γ: without a grid, and those that have an exact inverse.
fn gamma(study: &Study<'_>) -> Result<(), Failure> {
    let mut cells = Vec::new();
    for g in [0.0, 0.25, 0.5, 0.6] {
        cells.push(study.cell(format!("float-{g}"), g, |a| {
            (a.mode.mode, a.mode.gamma, a.mode.gamma_sign) = (Mode::BdiaFloat, g, GammaSign::Random);
        }));
    }
    cells.push(study.cell("vit-grid", 0.0, |a| (a.mode.mode, a.mode.quantize) = (Mode::Standard, true)));
    cells.push(study.cell("bdia-m2", 0.25, |a| a.mode.gamma = 0.25));
    cells.push(study.bdia());
    let results = study.results(&cells)?;
    let table = Table::of_runs(&cells, &results);
    table.csv(study, "gamma")?;
    let series = [
        table.series("without a grid", 0, 100.0, |n| n.starts_with("float")),
        table.series("on the grid", 0, 100.0, |n| !n.starts_with("float")),
    ];
    draw(study, "gamma", "Magnitude of gamma in training", "|gamma|", "held-out accuracy (%)", &series)
}

/// A constant γ at inference of networks trained without and with BDIA (the paper's figure on robustness).
fn robustness(study: &Study<'_>) -> Result<(), Failure> {
    let gammas: Vec<f64> = (-5..=5).map(|i| f64::from(i) / 10.0).collect();
    let inferences = gammas
        .iter()
        .map(|&g| Ok(Inference::Float(Gamma::new(g, Sign::Plus)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    let mut table = Table { columns: vec!["accuracy", "val_loss"], rows: Vec::new() };
    let cells = [study.standard(), study.bdia()];
    study.results(&cells)?;
    for cell in &cells {
        let mut rows = vec![Vec::new(); gammas.len()];
        for seed in 1..=study.seeds {
            let dir = study.run_dir(&cell.name, seed);
            let all = train::evaluation(&dir, None, false, &inferences, &study.base.machine, None)?;
            for (row, e) in rows.iter_mut().zip(all) {
                row.push(vec![e.accuracy, e.loss]);
            }
        }
        table.rows.extend(gammas.iter().zip(rows).map(|(&g, rows)| (cell.name.clone(), g, rows)));
    }
    table.csv(study, "robustness")?;
    let series = cells.each_ref().map(|c| table.series(&c.name, 0, 100.0, |n| n == c.name));
    draw(study, "robustness", "A constant gamma at inference", "gamma", "held-out accuracy (%)", &series)
}

/// What is lost by rebuilding, in the first steps of networks of every depth.
fn reconstruction(study: &Study<'_>) -> Result<(), Failure> {
    let mut table = Table { columns: vec!["largest_error", "log10_largest_error", "differing"], rows: Vec::new() };
    let images = study.base.batch * 4;
    for layers in [2_u64, 4, 8, 16, 24] {
        let change = |a: &mut TrainArgs| {
            (a.layers, a.verify, a.epochs, a.train_subset) = (Some(layers), true, 1, Some(images));
            (a.eval_interval, a.checkpoint_interval) = (0, 0);
        };
        let cells = [
            study.cell(format!("rebuild-float-{layers}"), layers as f64, |a| {
                change(a);
                a.mode.mode = Mode::BdiaFloat;
            }),
            study.cell(format!("rebuild-revvit-{layers}"), layers as f64, |a| {
                change(a);
                a.network = Network::Revvit;
            }),
            study.cell(format!("rebuild-bdia-{layers}"), layers as f64, change),
        ];
        for (cell, results) in cells.iter().zip(study.results(&cells)?) {
            let rows = results.iter().map(|s| {
                let (error, differing) = (s.rebuild_error.unwrap_or(0.0), s.verify_mismatches.unwrap_or(0) as f64);
                vec![error, error.max(1e-12).log10(), differing]
            });
            table.rows.push((cell.name.clone(), cell.x, rows.collect()));
        }
    }
    table.csv(study, "reconstruction")?;
    let kinds = [
        ("BDIA in float", "rebuild-float"),
        ("RevViT", "rebuild-revvit"),
        ("BDIA on the grid (exact)", "rebuild-bdia"),
    ];
    let series = kinds.map(|(name, prefix)| table.series(name, 1, 1.0, |n| n.starts_with(prefix)));
    let y = "log10 of the largest error (floor -12)";
    draw(study, "reconstruction", "Error of rebuilt activations", "blocks", y, &series)
}

/// How fine the grid has to be, and how much room it leaves.
fn precision(study: &Study<'_>) -> Result<(), Failure> {
    let all: Vec<u32> = (5..=18).collect();
    let cells: Vec<_> =
        all.iter().map(|&l| study.cell(format!("grid-{l}"), f64::from(l), |a| a.mode.frac_bits = l)).collect();
    let results = study.results(&cells)?;
    let mut table = Table::of_runs(&cells, &results);
    table.columns.extend(["largest_activation", "margin_bits"]);
    for ((_, l, rows), cell) in table.rows.iter_mut().zip(&cells) {
        for (row, seed) in rows.iter_mut().zip(1..) {
            let largest = train::largest_activation(&study.run_dir(&cell.name, seed), &study.base.machine)?;
            row.extend([largest, 30.0 - *l - largest.log2()]);
        }
    }
    table.csv(study, "precision")?;
    let series = [table.series("bdia", 0, 100.0, |_| true)];
    draw(study, "precision", "Fineness of the grid", "l (the grid is 2^-l)", "held-out accuracy (%)", &series)
}

/// The same weights in float and on grids.
fn inference(study: &Study<'_>) -> Result<(), Failure> {
    let zero = Gamma::new(0.0, Sign::Plus)?;
    let grids = [5, 6, 7, 8, 9, 10, 12, 14];
    let cells = [study.standard(), study.bdia()];
    study.results(&cells)?;
    let mut table = Table { columns: vec!["accuracy", "val_loss", "accuracy_change"], rows: Vec::new() };
    for cell in &cells {
        let mut rows = vec![Vec::new(); grids.len() + 1];
        for seed in 1..=study.seeds {
            let dir = study.run_dir(&cell.name, seed);
            let one = |inference, l| {
                let all = train::evaluation(&dir, None, false, &[inference], &study.base.machine, l)?;
                all.into_iter().next().ok_or_else(|| Failure::Other("no evaluation".into()))
            };
            let float = one(Inference::Float(zero), None)?;
            rows[grids.len()].push(vec![float.accuracy, float.loss, 0.0]);
            for (row, &l) in rows.iter_mut().zip(&grids) {
                let e = one(Inference::Quantized(zero), Some(l))?;
                row.push(vec![e.accuracy, e.loss, e.accuracy - float.accuracy]);
            }
        }
        let mut rows = rows.into_iter();
        table.rows.extend(grids.iter().zip(&mut rows).map(|(&l, r)| (format!("{}-grid", cell.name), f64::from(l), r)));
        table.rows.extend(rows.map(|r| (format!("{}-float", cell.name), 24.0, r)));
    }
    table.csv(study, "inference")?;
    let names = cells.each_ref().map(|c| format!("{}-grid", c.name));
    let series = names.each_ref().map(|name| table.series(name, 2, 100.0, |n| n == name));
    let y = "accuracy, grid less float (points)";
    draw(study, "inference", "Inference on the grid", "l (the grid is 2^-l)", y, &series)
}

/// BDIA beside the regularizers that everybody has.
fn regularizers(study: &Study<'_>) -> Result<(), Failure> {
    let standard = |name: &str, x: f64, change: &dyn Fn(&mut TrainArgs)| {
        study.cell(name, x, |a| {
            a.mode.mode = Mode::Standard;
            change(a);
        })
    };
    let cells = [
        standard("vit-plain", 0.0, &|a| a.dropout = 0.0),
        standard("vit-dropout-0.1", 1.0, &|a| a.dropout = 0.1),
        standard("vit-dropout-0.3", 2.0, &|a| a.dropout = 0.3),
        standard("vit-drop-path-0.2", 3.0, &|a| (a.dropout, a.drop_path) = (0.0, 0.2)),
        standard("vit-weight-decay-0.05", 4.0, &|a| (a.dropout, a.optim.weight_decay) = (0.0, 0.05)),
        study.cell("bdia-plain", 5.0, |a| a.dropout = 0.0),
        study.cell("bdia-dropout-0.1", 6.0, |a| a.dropout = 0.1),
    ];
    let results = study.results(&cells)?;
    Table::of_runs(&cells, &results).csv(study, "regularizers")?;
    let y = "held-out accuracy (%)";
    draw(study, "regularizers", "BDIA beside other regularizers", "optimizer step", y, &curves(study, &cells)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_deviation() {
        assert_eq!(mean_std(&[2.0, 4.0, 6.0]), (4.0, 2.0));
        assert_eq!(mean_std(&[3.0]), (3.0, 0.0));
    }
}
