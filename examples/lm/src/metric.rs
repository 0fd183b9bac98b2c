//! What a run of this program writes of its steps: the line of `metrics.jsonl`, and `loss.svg`.

use std::path::Path;

use bdia_train::report::{Chart, Record, ReportError, Series, svg};
use serde::{Deserialize, Serialize};

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

impl Record for Metric {
    fn step(&self) -> u64 {
        self.step
    }
}

/// Draws training and validation loss over steps as an SVG.
///
/// # Errors
/// [`ReportError`]
pub fn loss_svg(
    path: &Path,
    train: &[(u64, f64)],
    validation: &[(u64, f64)],
) -> Result<(), ReportError> {
    let points = |p: &[(u64, f64)]| p.iter().map(|&(x, y)| (x as f64, y)).collect();
    let train = Series { name: "training", points: points(train), ..Series::default() };
    let validation =
        Series { name: "validation", points: points(validation), marks: true, ..Series::default() };
    let title = "Training and validation loss";
    svg(
        path,
        &Chart {
            title,
            x: "optimizer step",
            y: "loss (nats per token)",
            series: &[train, validation],
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use bdia_models::files::testing::TempDir;
    use bdia_train::report::Metrics;

    fn metric(step: u64) -> Metric {
        let val_loss = step.is_multiple_of(2).then_some(3.5);
        Metric {
            step,
            loss: 4.0 - step as f64 * 0.1,
            lr: 1e-3,
            grad_norm: None,
            tokens_per_s: 1234.5,
            val_loss,
        }
    }

    #[test]
    fn metrics_have_each_step_once_after_a_resume() {
        let dir = TempDir::new();
        let path = dir.path().join("metrics.jsonl");
        let mut m = Metrics::<Metric>::create(&path).unwrap();
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
        let mut m = Metrics::<Metric>::resume(&path, 3).unwrap();
        for step in 4..=6 {
            m.push(&metric(step)).unwrap();
        }
        assert_eq!(
            Metrics::<Metric>::read(&path).unwrap(),
            (1..=6).map(metric).collect::<Vec<_>>()
        );
        assert_eq!(Metrics::<Metric>::read(&dir.path().join("none")).unwrap(), []);
        dir.file("metrics.jsonl", b"\xff\n[]\n{\"step\":1}\n");
        assert_eq!(Metrics::<Metric>::read(&path).unwrap(), []);
        Metrics::<Metric>::create(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
        assert!(Metrics::<Metric>::create(&dir.path().join("a/b")).is_err());
    }

    #[test]
    fn losses_are_drawn() {
        let dir = TempDir::new();
        let path = dir.path().join("loss.svg");
        let noise = bdia_core::rng::Stream::new(1, 0, 0, 0, 0, bdia_core::rng::Draw::Data);
        let curve = |s: f64| 3.0 + 7.8 * (-s / 60.0).exp();
        let train: Vec<_> =
            (1..=300).map(|s| (s, curve(s as f64) + 0.1 * noise.normal(s as u32))).collect();
        let val: Vec<_> = (1..=6).map(|s| (s * 50, curve(s as f64 * 50.0) + 0.2)).collect();
        loss_svg(&path, &train, &val).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for part in
            ["<svg", "Training and validation loss", "optimizer step", "validation", "</svg>"]
        {
            assert!(svg.contains(part), "{part}");
        }
        if let Some(copy) = std::env::var_os("BDIA_KEEP_SVG") {
            std::fs::write(copy, &svg).unwrap();
        }
        // Whatever the losses are, there is a picture.
        for (t, v) in [
            (&[][..], &[][..]),
            (&[(1, 2.0)], &[]),
            (&[(1, f64::NAN), (2, f64::INFINITY)], &[(2, 1.0)]),
        ] {
            loss_svg(&path, t, v).unwrap();
        }
        assert!(loss_svg(&dir.path().join("a/b.svg"), &train, &val).is_err());
    }
}
