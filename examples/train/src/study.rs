//! Many runs of a program, and what they show: the machinery of its `experiment`.
//!
//! ```text
//! DIR/runs/CELL/seed-N/     one run; result.json when it is finished, so that it is not repeated
//! DIR/NAME-runs.csv            every run of an experiment
//! DIR/NAME.csv, DIR/NAME.svg   mean and standard deviation over seeds; the picture
//! ```
//! A cell is the flags of the command line with some of them replaced; experiments share cells.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bdia_models::files::{FileError, read_limited, write_bytes};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::cli::{Flags, Mode};
use crate::error::Failure;
use crate::report::{self, Chart, Metrics, Record, Series};

/// A finished run: its flags and what it ended with.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Finished<A, S> {
    args: A,
    summary: S,
}

/// A cell: its name, its place on the picture's axis, and its flags.
#[derive(Debug, Clone)]
pub struct Cell<A> {
    /// The name.
    pub name: String,
    /// The place.
    pub x: f64,
    /// The flags.
    pub args: A,
}

/// Where the experiments are, the flags that all runs share, and how a run is made.
#[derive(Debug)]
pub struct Study<'a, A, S> {
    /// The directory.
    pub dir: &'a Path,
    /// Seeds: 1 to this.
    pub seeds: u64,
    /// The flags.
    pub base: &'a A,
    /// Trains.
    pub train: fn(&A) -> Result<S, Failure>,
}

/// Mean and standard deviation (of a sample; 0 for one value).
pub fn mean_std(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// Makes the directory of an experiment, after refusing flags of its runs that were given though it
/// chooses them itself.
///
/// # Errors
/// [`Failure`] names the flag.
pub fn begin<A: Flags>(dir: &Path, base: &A, chosen: &[&str]) -> Result<(), Failure> {
    crate::ranks::alone("experiments")?;
    let mut base = base.clone();
    let given = base.run().given;
    let every = ["mode", "quantize", "seed", "out", "resume", "json"];
    if let Some(flag) = every.iter().chain(chosen).find(|&&flag| given.contains(flag)) {
        let flag = flag.replace('_', "-");
        return Err(Failure::Other(format!(
            "experiments choose --{flag} of their runs themselves; leave it out"
        )));
    }
    Ok(std::fs::create_dir_all(dir).map_err(|e| FileError::io(dir, "create the directory", e))?)
}

impl<A: Flags, S: Clone + Serialize + DeserializeOwned> Study<'_, A, S> {
    /// A cell: the shared flags, changed.
    pub fn cell(&self, name: impl Into<String>, x: f64, change: impl FnOnce(&mut A)) -> Cell<A> {
        let mut args = self.base.clone();
        change(&mut args);
        Cell { name: name.into(), x, args }
    }

    /// The directory of a run.
    pub fn run_dir(&self, cell: &str, seed: u64) -> PathBuf {
        self.dir.join("runs").join(cell).join(format!("seed-{seed}"))
    }

    /// The result of a run: the saved one, or that of the run, begun or gone on with.
    ///
    /// # Errors
    /// [`Failure`], also where the directory has a run with other flags.
    pub fn result(&self, cell: &Cell<A>, seed: u64) -> Result<S, Failure> {
        let out = self.run_dir(&cell.name, seed);
        let mut args = cell.args.clone();
        let run = args.run();
        (*run.seed, *run.out, *run.json, *run.resume) = (seed, out.clone(), false, None);
        // The others rebuild nothing.
        *run.verify &= matches!(run.mode.mode, Mode::Bdia | Mode::BdiaFloat);
        // What changes no number may change.
        let same = |saved: &A| saved.asked() == args.asked();
        let other = |path: PathBuf| Failure::Run {
            path,
            what: "it was made with other flags; use the same ones, or another --dir".into(),
        };
        let path = out.join("result.json");
        if path.exists() {
            let finished: Finished<A, S> = serde_json::from_slice(&read_limited(&path, 1 << 22)?)
                .map_err(|e| Failure::Run {
                path: path.clone(),
                what: format!("not the result of a run: {e}"),
            })?;
            return if same(&finished.args) { Ok(finished.summary) } else { Err(other(path)) };
        }
        report::note!("\n{} with seed {seed}", cell.name);
        let begun = out.join("run.json").exists();
        if begun {
            let path = out.join("run.json");
            if !same(&crate::run::saved::<A>(&out)?) {
                return Err(other(path));
            }
        }
        let mut go = args.clone();
        *go.run().resume = begun.then_some(out);
        go.run().given.insert("out".into());
        let summary = (self.train)(&go).map_err(|error| match error {
            Failure::Stopped { .. } => Failure::StudyStopped,
            other => other,
        })?;
        let finished = Finished { args, summary: summary.clone() };
        let json =
            serde_json::to_vec_pretty(&finished).map_err(|e| Failure::Other(e.to_string()))?;
        write_bytes(&path, &json)?;
        Ok(summary)
    }

    /// The results of all cells and seeds.
    ///
    /// # Errors
    /// As [`result`](Self::result); what is finished stays.
    pub fn results(&self, cells: &[Cell<A>]) -> Result<Vec<Vec<S>>, Failure> {
        cells.iter().map(|c| (1..=self.seeds).map(|seed| self.result(c, seed)).collect()).collect()
    }

    /// What `of` takes from short runs of every cell and seed, made after all others and in turn: a
    /// machine whose speed changes, or that did something else during the long runs, treats all
    /// cells alike. `short` makes a cell's run one of a few steps.
    ///
    /// # Errors
    /// As [`result`](Self::result).
    pub fn speeds(
        &self,
        cells: &[Cell<A>],
        short: impl Fn(&mut A),
        of: impl Fn(&S) -> f64,
    ) -> Result<Vec<Vec<f64>>, Failure> {
        let mut speeds = vec![Vec::new(); cells.len()];
        for seed in 1..=self.seeds {
            for (cell, speeds) in cells.iter().zip(&mut speeds) {
                let mut args = cell.args.clone();
                short(&mut args);
                let run = Cell { name: format!("time-{}", cell.name), x: cell.x, args };
                speeds.push(of(&self.result(&run, seed)?));
            }
        }
        Ok(speeds)
    }

    /// Draws `NAME.svg`.
    ///
    /// # Errors
    /// [`Failure`]
    pub fn draw(
        &self,
        name: &str,
        title: &str,
        x: &str,
        y: &str,
        series: &[Series<'_>],
    ) -> Result<(), Failure> {
        Ok(report::svg(&self.dir.join(format!("{name}.svg")), &Chart { title, x, y, series })?)
    }

    /// What `of` takes from the metrics, over steps, by cell: mean and deviation over seeds.
    ///
    /// # Errors
    /// [`Failure`]
    pub fn curves<'s, M: Record>(
        &self,
        cells: &'s [Cell<A>],
        of: impl Fn(&M) -> Option<f64>,
    ) -> Result<Vec<Series<'s>>, Failure> {
        let mut all = Vec::new();
        for cell in cells {
            let mut by_step: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
            for seed in 1..=self.seeds {
                let log = self.run_dir(&cell.name, seed).join("metrics.jsonl");
                for m in Metrics::<M>::read(&log)? {
                    if let Some(value) = of(&m) {
                        by_step.entry(m.step()).or_default().push(value);
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
}

/// Columns of numbers by cell: one row a run, and one a cell.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Their names.
    pub columns: Vec<&'static str>,
    /// Cell, place on the axis, a row of values a seed.
    pub rows: Vec<(String, f64, Vec<Vec<f64>>)>,
}

impl Table {
    /// What every run tells.
    pub fn of_runs<A, S>(
        columns: &[&'static str],
        cells: &[Cell<A>],
        results: &[Vec<S>],
        row: impl Fn(&S) -> Vec<f64>,
    ) -> Self {
        let rows = cells
            .iter()
            .zip(results)
            .map(|(c, r)| (c.name.clone(), c.x, r.iter().map(&row).collect()))
            .collect();
        Self { columns: columns.to_vec(), rows }
    }

    /// One more column, by cell and seed.
    pub fn push(&mut self, column: &'static str, values: Vec<Vec<f64>>) {
        for ((_, _, rows), values) in self.rows.iter_mut().zip(values) {
            for (row, value) in rows.iter_mut().zip(values) {
                row.push(value);
            }
        }
        self.columns.push(column);
    }

    /// Writes `NAME-runs.csv` and `NAME.csv` and tells the means.
    ///
    /// # Errors
    /// [`Failure`]
    pub fn csv(&self, dir: &Path, name: &str) -> Result<(), Failure> {
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
                let (mean, std) = Self::column(values, c);
                means += &format!(",{mean},{std}");
            }
            means.push('\n');
        }
        write_bytes(&dir.join(format!("{name}-runs.csv")), runs.as_bytes())?;
        write_bytes(&dir.join(format!("{name}.csv")), means.as_bytes())?;
        for (cell, x, values) in &self.rows {
            let cells: Vec<_> = (self.columns.iter().enumerate())
                .map(|(c, name)| {
                    let (mean, std) = Self::column(values, c);
                    format!("{name} {mean:.6} ± {std:.6}")
                })
                .collect();
            report::tell!("{cell} ({x}): {}", cells.join(", "));
        }
        Ok(())
    }

    fn column(values: &[Vec<f64>], c: usize) -> (f64, f64) {
        mean_std(&values.iter().map(|row| row[c]).collect::<Vec<_>>())
    }

    /// One column over the axis, for the cells that `of` names.
    pub fn series<'s>(
        &self,
        name: &'s str,
        column: usize,
        factor: f64,
        of: impl Fn(&str) -> bool,
    ) -> Series<'s> {
        let mut series = Series { name, marks: true, ..Series::default() };
        let mut points: Vec<_> = (self.rows.iter().filter(|r| of(&r.0)))
            .map(|(_, x, values)| {
                let (mean, std) = Self::column(values, column);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_deviation() {
        assert_eq!(mean_std(&[2.0, 4.0, 6.0]), (4.0, 2.0));
        assert_eq!(mean_std(&[3.0]), (3.0, 0.0));
    }
}
