//! What a run leaves behind: `metrics.jsonl`, `loss.svg`, and the memory table.

use core::fmt;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use crate::files::{FileError, write_atomic, write_bytes};

/// `println!` that goes on where the reader is gone: a run does not end with its terminal.
macro_rules! tell {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}
/// `eprintln!` that goes on where the reader is gone.
macro_rules! note {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}
pub(crate) use {note, tell};

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The drawing failed.
    #[error("{}: cannot draw the losses: {what}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What the library says.
        what: String,
    },
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// Steps done, from 1.
    pub step: u64,
    /// Training loss of the step.
    pub loss: f64,
    /// Its learning rate.
    pub lr: f64,
    /// Norm of its gradient, where known.
    pub grad_norm: Option<f64>,
    /// Speed.
    pub tokens_per_s: f64,
    /// Validation loss, where measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
}

/// `metrics.jsonl`, one object a line and a step.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    out: File,
}

impl Metrics {
    /// Starts an empty file.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn create(path: &Path) -> Result<Self, FileError> {
        Self::resume(path, 0)
    }

    /// Goes on after step `last`: what a killed run wrote beyond it, and a line that it did not finish, go; every step is
    /// there once.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn resume(path: &Path, last: u64) -> Result<Self, FileError> {
        let mut kept = if last == 0 { Vec::new() } else { Self::read(path)? };
        kept.retain(|m| m.step <= last);
        write_atomic(path, |out: &mut BufWriter<File>| {
            for metric in &kept {
                out.write_all(line(metric).as_bytes()).map_err(|e| FileError::io(path, "write it", e))?;
            }
            Ok::<(), FileError>(())
        })?;
        let out = OpenOptions::new().append(true).open(path).map_err(|e| FileError::io(path, "open it", e))?;
        Ok(Self { path: path.into(), out })
    }

    /// Appends a line. It is with the operating system when this returns.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn push(&mut self, metric: &Metric) -> Result<(), FileError> {
        self.out.write_all(line(metric).as_bytes()).map_err(|e| FileError::io(&self.path, "append to it", e))
    }

    /// Puts what was pushed on disk.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn sync(&self) -> Result<(), FileError> {
        self.out.sync_data().map_err(|e| FileError::io(&self.path, "write it to disk", e))
    }

    /// The complete lines of a file, of steps that only rise; none if there is no file.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn read(path: &Path) -> Result<Vec<Metric>, FileError> {
        let failed = |e| FileError::io(path, "read it", e);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut all: Vec<Metric> = Vec::new();
        for bytes in BufReader::new(file).split(b'\n') {
            // A line that a kill cut off is not JSON, and its step was not saved.
            if let Ok(metric) = serde_json::from_slice::<Metric>(&bytes.map_err(failed)?)
                && all.last().is_none_or(|l| l.step < metric.step)
            {
                all.push(metric);
            }
        }
        Ok(all)
    }
}

fn line(metric: &Metric) -> String {
    // Numbers and options of numbers always serialize.
    serde_json::to_string(metric).map(|s| s + "\n").unwrap_or_default()
}

/// Draws training and validation loss over steps as an SVG.
///
/// # Errors
/// [`ReportError`]
pub fn loss_svg(path: &Path, train: &[(u64, f64)], validation: &[(u64, f64)]) -> Result<(), ReportError> {
    let svg = draw(train, validation).map_err(|what| ReportError::Plot { path: path.into(), what })?;
    Ok(write_bytes(path, svg.as_bytes())?)
}

fn draw(train: &[(u64, f64)], validation: &[(u64, f64)]) -> Result<String, String> {
    let finite = |points: &[(u64, f64)]| points.iter().copied().filter(|p| p.1.is_finite()).collect::<Vec<_>>();
    let (train, validation) = (finite(train), finite(validation));
    let both = || train.iter().chain(&validation);
    let last = both().map(|p| p.0).max().unwrap_or(1).max(1);
    let low = both().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = both().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let margin = ((high - low) * 0.05).max(0.05);
    let (blue, orange, grey) = (RGBColor(31, 119, 180), RGBColor(214, 96, 18), RGBColor(225, 225, 225));
    let text = |size: u32| ("sans-serif", size).into_font().color(&RGBColor(40, 40, 40));

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (900, 540)).into_drawing_area();
        let error = |e: &dyn fmt::Display| e.to_string();
        root.fill(&WHITE).map_err(|e| error(&e))?;
        let mut chart = ChartBuilder::on(&root)
            .caption("Training and validation loss", text(24))
            .margin(18)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..last as f64, (low - margin).max(0.0)..high + margin)
            .map_err(|e| error(&e))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(grey)
            .x_labels(10)
            .y_labels(8)
            .x_desc("optimizer step")
            .y_desc("loss (nats per token)")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .label_style(text(15))
            .axis_desc_style(text(17))
            .draw()
            .map_err(|e| error(&e))?;
        let points = |p: &[(u64, f64)]| p.iter().map(|&(x, y)| (x as f64, y)).collect::<Vec<_>>();
        let key = |color: RGBColor| {
            move |(x, y): (i32, i32)| PathElement::new(vec![(x, y), (x + 24, y)], color.stroke_width(3))
        };
        chart
            .draw_series(LineSeries::new(points(&train), blue.stroke_width(2)))
            .map_err(|e| error(&e))?
            .label("training")
            .legend(key(blue));
        if !validation.is_empty() {
            chart
                .draw_series(LineSeries::new(points(&validation), orange.stroke_width(2)))
                .map_err(|e| error(&e))?
                .label("validation")
                .legend(key(orange));
            chart
                .draw_series(points(&validation).into_iter().map(|p| Circle::new(p, 4, orange.filled())))
                .map_err(|e| error(&e))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .margin(12)
            .legend_area_size(32)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(180, 180, 180))
            .label_font(text(17))
            .draw()
            .map_err(|e| error(&e))?;
        root.present().map_err(|e| error(&e))?;
    }
    Ok(svg)
}

/// A number of bytes for people, in units of 1000: `1.23 GB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let (mut value, mut unit) = (n as f64, 0);
    // 999.5 would round to 1000.
    while value >= if unit == 0 { 1000.0 } else { 999.5 } && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Memory by category: rows of byte counts, one column for each plan or measurement.
#[derive(Debug, Clone, Default)]
pub struct MemoryTable {
    /// Heads of the columns after the first, which has the names.
    pub columns: Vec<String>,
    /// Name, and a number of bytes or nothing for each column.
    pub rows: Vec<(String, Vec<Option<u64>>)>,
}

impl MemoryTable {
    /// A table with these columns.
    pub fn new(columns: &[&str]) -> Self {
        Self { columns: columns.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, name: &str, cells: &[Option<u64>]) -> &mut Self {
        self.rows.push((name.to_string(), cells.to_vec()));
        self
    }

    /// Adds a row with the sums of the columns so far; nothing where a column has nothing.
    pub fn total(&mut self, name: &str) -> &mut Self {
        let sum = |i: usize| {
            let mut cells = self.rows.iter().filter_map(|(_, cells)| *cells.get(i)?).peekable();
            cells.peek()?;
            Some(cells.fold(0, u64::saturating_add))
        };
        let cells: Vec<_> = (0..self.columns.len()).map(sum).collect();
        self.row(name, &cells)
    }
}

impl fmt::Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cell =
            |cells: &[Option<u64>], i: usize| cells.get(i).copied().flatten().map_or_else(|| "-".to_string(), bytes);
        let first = self.rows.iter().map(|r| r.0.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (self.columns.iter().enumerate())
            .map(|(i, head)| {
                let cells = self.rows.iter().map(|r| cell(&r.1, i).chars().count());
                cells.chain([head.chars().count()]).max().unwrap_or(0)
            })
            .collect();
        write!(f, "{:first$}", "")?;
        for (head, width) in self.columns.iter().zip(&widths) {
            write!(f, "  {head:>width$}")?;
        }
        writeln!(f)?;
        for (name, cells) in &self.rows {
            write!(f, "{name:first$}")?;
            for (i, width) in widths.iter().enumerate() {
                write!(f, "  {:>width$}", cell(cells, i))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::testing::TempDir;

    fn metric(step: u64) -> Metric {
        let val_loss = step.is_multiple_of(2).then_some(3.5);
        Metric { step, loss: 4.0 - step as f64 * 0.1, lr: 1e-3, grad_norm: None, tokens_per_s: 1234.5, val_loss }
    }

    #[test]
    fn metrics_have_each_step_once_after_a_resume() {
        let dir = TempDir::new();
        let path = dir.path().join("metrics.jsonl");
        let mut m = Metrics::create(&path).unwrap();
        for step in 1..=5 {
            m.push(&metric(step)).unwrap();
        }
        drop(m);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"step":1,"loss":3.9,"lr":0.001,"grad_norm":null,"tokens_per_s":1234.5}"#
        );
        assert!(text.lines().nth(1).unwrap().ends_with(r#""val_loss":3.5}"#));
        // Killed in the middle of a line.
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let mut m = Metrics::resume(&path, 3).unwrap();
        for step in 4..=6 {
            m.push(&metric(step)).unwrap();
        }
        assert_eq!(Metrics::read(&path).unwrap(), (1..=6).map(metric).collect::<Vec<_>>());
        assert_eq!(Metrics::read(&dir.path().join("none")).unwrap(), []);
        dir.file("metrics.jsonl", b"\xff\n[]\n{\"step\":1}\n");
        assert_eq!(Metrics::read(&path).unwrap(), []);
        Metrics::create(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert!(Metrics::create(&dir.path().join("a/b")).is_err());
    }

    #[test]
    fn losses_are_drawn() {
        let dir = TempDir::new();
        let path = dir.path().join("loss.svg");
        let noise = bdia_core::rng::Stream::new(1, 0, 0, 0, 0, bdia_core::rng::Draw::Data);
        let curve = |s: f64| 3.0 + 7.8 * (-s / 60.0).exp();
        let train: Vec<_> = (1..=300).map(|s| (s, curve(s as f64) + 0.1 * noise.normal(s as u32))).collect();
        let val: Vec<_> = (1..=6).map(|s| (s * 50, curve(s as f64 * 50.0) + 0.2)).collect();
        loss_svg(&path, &train, &val).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for part in ["<svg", "Training and validation loss", "optimizer step", "validation", "</svg>"] {
            assert!(svg.contains(part), "{part}");
        }
        if let Some(copy) = std::env::var_os("BDIA_KEEP_SVG") {
            std::fs::write(copy, &svg).unwrap();
        }
        // Whatever the losses are, there is a picture.
        for (t, v) in [(&[][..], &[][..]), (&[(1, 2.0)], &[]), (&[(1, f64::NAN), (2, f64::INFINITY)], &[(2, 1.0)])] {
            loss_svg(&path, t, v).unwrap();
        }
        assert!(loss_svg(&dir.path().join("a/b.svg"), &train, &val).is_err());
    }

    #[test]
    fn byte_counts() {
        for (n, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (1_570_600_000, "1.57 GB"),
            (9_996, "10.0 kB"),
            (99_960, "100 kB"),
            (999_600, "1.00 MB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(bytes(n), text);
        }
    }

    #[test]
    fn the_table_is_aligned() {
        let mut table = MemoryTable::new(&["plan", "standard"]);
        table
            .row("parameters", &[Some(497_759_232), Some(497_759_232)])
            .row("side bits", &[Some(4096), None])
            .total("total");
        let expected = [
            "               plan  standard\n",
            "parameters   498 MB    498 MB\n",
            "side bits   4.10 kB         -\n",
            "total        498 MB    498 MB\n",
        ]
        .concat();
        assert_eq!(table.to_string(), expected);
    }
}
