//! What a run leaves behind: `metrics.jsonl`, pictures, and the memory table.

use core::fmt;
use core::marker::PhantomData;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bdia_models::files::{FileError, disk, write_bytes};
use plotters::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::Xxh3;

/// `println!` that goes on where standard output cannot be written: what a run computes and saves
/// is whole, and its exit code tells ([`lost`]). Of several ranks the first speaks.
#[macro_export]
macro_rules! tell {
    ($($arg:tt)*) => {
        $crate::report::out(format_args!("{}\n", format_args!($($arg)*)))
    };
}
/// `eprintln!` that goes on where the reader is gone. Of several ranks the first speaks.
#[macro_export]
macro_rules! note {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        if $crate::launcher::rank() == 0 {
            let _ = writeln!(std::io::stderr(), $($arg)*);
        }
    }};
}
pub use {note, tell};

static LOST: OnceLock<io::Error> = OnceLock::new();

/// Writes to standard output, as [`tell!`] does.
pub fn out(text: fmt::Arguments<'_>) {
    if crate::launcher::rank() == 0 {
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_fmt(text).and_then(|()| out.flush()) {
            // The first one is told.
            let _ = LOST.set(error);
        }
    }
}

/// Why something that was told did not reach standard output, if that is so.
pub fn lost() -> Option<&'static io::Error> {
    LOST.get()
}

/// Why a report could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The drawing failed.
    #[error("{}: cannot draw it: {what}", path.display())]
    Plot {
        /// The file.
        path: PathBuf,
        /// What the library says.
        what: String,
    },
}

/// A line of `metrics.jsonl`: numbers, and options of numbers.
pub trait Record: Serialize + DeserializeOwned {
    /// Steps done, from 1; it rises from line to line.
    fn step(&self) -> u64;

    /// The same without what depends on the clock.
    #[must_use]
    fn timeless(&self) -> Self;
}

/// `metrics.jsonl`, one object a line and a step.
pub struct Metrics<M> {
    path: PathBuf,
    out: File,
    /// Of all lines, without what depends on the clock.
    hash: Xxh3,
    of: PhantomData<M>,
}

impl<M> fmt::Debug for Metrics<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("path", &self.path).finish_non_exhaustive()
    }
}

impl<M: Record> Metrics<M> {
    /// Goes on after step `last`: what a killed run wrote beyond it, and a line that it did not
    /// finish, go; every step is there once. Also gives what was kept.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn resume(path: &Path, last: u64) -> Result<(Self, Vec<M>), FileError> {
        let (kept, hash) = Self::up_to(path, last)?;
        write_bytes(path, kept.iter().map(line).collect::<String>().as_bytes())?;
        let out = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|e| FileError::io(path, "open it", e))?;
        Ok((Self { path: path.into(), out, hash, of: PhantomData }, kept))
    }

    /// What a file says of the steps up to `last`, and the hash of that.
    fn up_to(path: &Path, last: u64) -> Result<(Vec<M>, Xxh3), FileError> {
        let mut kept = if last == 0 { Vec::new() } else { Self::read(path)? };
        kept.retain(|m| m.step() <= last);
        let mut hash = Xxh3::new();
        kept.iter().for_each(|m| hash.update(line(&m.timeless()).as_bytes()));
        Ok((kept, hash))
    }

    /// The [`digest`](Self::digest) of the lines of a file up to step `last`.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn digest_of(path: &Path, last: u64) -> Result<u64, FileError> {
        Ok(Self::up_to(path, last)?.1.digest())
    }

    /// Appends a line. It is with the operating system when this returns.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn push(&mut self, metric: &M) -> Result<(), FileError> {
        self.hash.update(line(&metric.timeless()).as_bytes());
        disk::append(&mut self.out, line(metric).as_bytes())
            .map_err(|e| FileError::io(&self.path, "append to it", e))
    }

    /// xxh3-64 of all lines, without what depends on the clock.
    pub fn digest(&self) -> u64 {
        self.hash.digest()
    }

    /// Puts what was pushed on disk.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn sync(&self) -> Result<(), FileError> {
        self.out.sync_data().map_err(|e| FileError::io(&self.path, "write it to disk", e))
    }

    /// What the complete lines of a file say, of steps that only rise; none if there is no file.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn read(path: &Path) -> Result<Vec<M>, FileError> {
        let failed = |e| FileError::io(path, "read it", e);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut all: Vec<M> = Vec::new();
        for bytes in BufReader::new(file).split(b'\n') {
            // A line that a kill cut off is not JSON, and its step was not saved.
            if let Ok(metric) = serde_json::from_slice::<M>(&bytes.map_err(failed)?)
                && all.last().is_none_or(|l| l.step() < metric.step())
            {
                all.push(metric);
            }
        }
        Ok(all)
    }
}

fn line(metric: &impl Record) -> String {
    // Numbers and options of numbers always serialize.
    serde_json::to_string(metric).map(|s| s + "\n").unwrap_or_default()
}

/// A picture of some series over one axis.
#[derive(Debug, Clone, Copy)]
pub struct Chart<'a> {
    /// Above the picture.
    pub title: &'a str,
    /// Below the horizontal axis.
    pub x: &'a str,
    /// Beside the vertical axis.
    pub y: &'a str,
    /// The series, in the order of their colours.
    pub series: &'a [Series<'a>],
}

/// Points of one name. Points that are not finite are left out.
#[derive(Debug, Clone, Default)]
pub struct Series<'a> {
    /// What the legend says.
    pub name: &'a str,
    /// The points, from left to right.
    pub points: Vec<(f64, f64)>,
    /// Half the length of an error bar at each point; empty for none.
    pub spread: Vec<f64>,
    /// Whether each point has a mark.
    pub marks: bool,
}

const COLOURS: [RGBColor; 8] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 96, 18),
    RGBColor(44, 140, 44),
    RGBColor(170, 40, 50),
    RGBColor(120, 90, 170),
    RGBColor(120, 80, 60),
    RGBColor(60, 150, 160),
    RGBColor(110, 110, 110),
];

/// Draws a chart as an SVG.
///
/// # Errors
/// [`ReportError`]
pub fn svg(path: &Path, chart: &Chart<'_>) -> Result<(), ReportError> {
    let svg = draw(chart).map_err(|what| ReportError::Plot { path: path.into(), what })?;
    Ok(write_bytes(path, svg.as_bytes())?)
}

/// Steps of an axis: enough digits for its span.
fn label(span: f64) -> impl Fn(&f64) -> String {
    let digits = (1.0 - span.max(1e-12).log10().floor()).clamp(0.0, 9.0) as usize;
    move |x| format!("{x:.digits$}")
}

fn draw(picture: &Chart<'_>) -> Result<String, String> {
    // A point, and the half length of its error bar.
    let finite: Vec<Vec<(f64, f64, f64)>> = (picture.series.iter())
        .map(|s| {
            let spread =
                |i: usize| s.spread.get(i).copied().filter(|v| v.is_finite()).unwrap_or(0.0);
            let all = s.points.iter().enumerate().map(|(i, &(x, y))| (x, y, spread(i)));
            all.filter(|p| p.0.is_finite() && p.1.is_finite()).collect()
        })
        .collect();
    let all = || finite.iter().flatten();
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low <= high { (low, high) } else { (0.0, 1.0) }
    };
    let (left, right) = range(&mut all().map(|p| p.0));
    let (low, high) = range(&mut all().flat_map(|p| [p.1 - p.2, p.1 + p.2]));
    let right = if right > left { right } else { left + 1.0 };
    let margin = if high > low { (high - low) * 0.05 } else { low.abs().max(0.1) * 0.05 };
    // The legend goes where the fewest points are.
    let crowd = |on_right: bool, on_top: bool| {
        let far = |share: f64, end: bool| if end { share > 0.65 } else { share < 0.35 };
        let inside = |p: &&(f64, f64, f64)| {
            far((p.0 - left) / (right - left), on_right)
                && far((p.1 - low + margin) / (high - low + 2.0 * margin), on_top)
        };
        all().filter(inside).count()
    };
    use SeriesLabelPosition as Corner;
    let corner = [
        (crowd(true, true), Corner::UpperRight),
        (crowd(true, false), Corner::LowerRight),
        (crowd(false, true), Corner::UpperLeft),
        (crowd(false, false), Corner::LowerLeft),
    ];
    let corner = corner.into_iter().min_by_key(|c| c.0).map_or(Corner::UpperRight, |c| c.1);
    let grey = RGBColor(225, 225, 225);
    let text = |size: u32| ("sans-serif", size).into_font().color(&RGBColor(40, 40, 40));

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (900, 540)).into_drawing_area();
        let error = |e: &dyn fmt::Display| e.to_string();
        root.fill(&WHITE).map_err(|e| error(&e))?;
        let mut chart = ChartBuilder::on(&root)
            .caption(picture.title, text(24))
            .margin(18)
            .x_label_area_size(48)
            .y_label_area_size(70)
            .build_cartesian_2d(left..right, low - margin..high + margin)
            .map_err(|e| error(&e))?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(grey)
            .x_labels(10)
            .y_labels(8)
            .x_desc(picture.x)
            .y_desc(picture.y)
            .x_label_formatter(&label((right - left) / 10.0))
            .y_label_formatter(&label((high - low + 2.0 * margin) / 8.0))
            .label_style(text(15))
            .axis_desc_style(text(17))
            .draw()
            .map_err(|e| error(&e))?;
        for (i, (series, points)) in picture.series.iter().zip(&finite).enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let line = points.iter().map(|p| (p.0, p.1));
            chart
                .draw_series(LineSeries::new(line, colour.stroke_width(2)))
                .map_err(|e| error(&e))?
                .label(series.name)
                .legend(move |(x, y): (i32, i32)| {
                    PathElement::new(vec![(x, y), (x + 24, y)], colour.stroke_width(3))
                });
            if series.marks {
                let marks = points.iter().map(|p| Circle::new((p.0, p.1), 4, colour.filled()));
                chart.draw_series(marks).map_err(|e| error(&e))?;
            }
            let bars = points.iter().filter(|p| p.2 > 0.0);
            let bars = bars.map(|p| {
                PathElement::new(vec![(p.0, p.1 - p.2), (p.0, p.1 + p.2)], colour.stroke_width(1))
            });
            chart.draw_series(bars).map_err(|e| error(&e))?;
        }
        chart
            .configure_series_labels()
            .position(corner)
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
        let cell = |cells: &[Option<u64>], i: usize| {
            cells.get(i).copied().flatten().map_or_else(|| "-".to_string(), bytes)
        };
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
    use crate::trainer::Metric;
    use bdia_models::files::testing::TempDir;
    use std::collections::BTreeMap;

    #[test]
    fn every_chart_is_drawn() {
        let dir = TempDir::new();
        let path = dir.path().join("a.svg");
        let series = |points: &[(f64, f64)], spread: &[f64]| Series {
            name: "first",
            points: points.to_vec(),
            spread: spread.to_vec(),
            marks: true,
        };
        for one in [
            series(&[], &[]),
            series(&[(1.0, 2.0)], &[]),
            series(&[(1.0, f64::NAN), (2.0, f64::INFINITY)], &[1.0]),
            series(&[(-0.5, 0.0), (0.5, 0.0)], &[f64::NAN, 0.25]),
        ] {
            let chart = Chart { title: "Title", x: "across", y: "up", series: &[one.clone(), one] };
            svg(&path, &chart).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(
                ["<svg", "Title", "across", "up", "first", "</svg>"]
                    .iter()
                    .all(|part| text.contains(part))
            );
        }
        assert!(
            svg(&dir.path().join("a/b.svg"), &Chart { title: "", x: "", y: "", series: &[] })
                .is_err()
        );
    }

    #[test]
    fn metrics_have_each_step_once_after_a_resume() {
        let metric = |step: u64| Metric {
            step,
            loss: 4.0 - step as f64 / 10.0,
            lr: 1e-3,
            grad_norm: 0.5,
            items_per_s: 1234.5,
            val_loss: (step == 2).then_some(3.5),
            scores: BTreeMap::new(),
        };
        let dir = TempDir::new();
        let path = dir.path().join("metrics.jsonl");
        let (mut m, kept) = Metrics::<Metric>::resume(&path, 0).unwrap();
        assert_eq!(kept, []);
        for step in 1..=5 {
            m.push(&metric(step)).unwrap();
        }
        let whole = m.digest();
        drop(m);
        let text = std::fs::read_to_string(&path).unwrap();
        let timeless = text.replace("1234.5", "0.0");
        assert_eq!(whole, xxhash_rust::xxh3::xxh3_64(timeless.as_bytes()));
        assert_eq!(
            text.lines().next().unwrap(),
            r#"{"step":1,"loss":3.9,"lr":0.001,"grad_norm":0.5,"items_per_s":1234.5}"#
        );
        assert!(text.lines().nth(1).unwrap().ends_with(r#""val_loss":3.5}"#));
        // Killed in the middle of a line.
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let (mut m, kept) = Metrics::<Metric>::resume(&path, 3).unwrap();
        assert_eq!(kept, (1..=3).map(metric).collect::<Vec<_>>());
        for step in 4..=6 {
            m.push(&metric(step)).unwrap();
            if step == 5 {
                assert_eq!(m.digest(), whole);
            }
        }
        let read = |path: &Path| Metrics::<Metric>::read(path).unwrap();
        assert_eq!(read(&path), (1..=6).map(metric).collect::<Vec<_>>());
        assert_eq!(read(&dir.path().join("none")), []);
        dir.file("metrics.jsonl", b"\xff\n[]\n{\"step\":1}\n");
        assert_eq!(read(&path), []);
        Metrics::<Metric>::resume(&path, 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert!(Metrics::<Metric>::resume(&dir.path().join("a/b"), 0).is_err());
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
