//! The accuracy curves as SVG.

use std::fmt::Write as _;

use bdia_mcu::report::Outcome;

const COLORS: [&str; 4] = ["#1b6ca8", "#c0392b", "#2e8b57", "#8e6bb0"];
const LEFT: f64 = 60.0;
const TOP: f64 = 20.0;
const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 260.0;

/// Test accuracy after each epoch, one line a job.
pub fn svg(curves: &[(&str, Outcome)]) -> Result<String, std::fmt::Error> {
    let last = curves
        .iter()
        .map(|(_, outcome)| outcome.epochs.len().saturating_sub(1))
        .max()
        .unwrap_or(0)
        .max(1);
    let x = |epoch: usize| LEFT + WIDTH * epoch as f64 / last as f64;
    let y = |accuracy: f64| TOP + HEIGHT * (1.0 - accuracy);
    let mut s = String::new();
    write!(s, r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 330" "#)?;
    writeln!(s, r#"font-family="sans-serif" font-size="13">"#)?;
    writeln!(s, r#"<rect width="680" height="330" fill="white"/>"#)?;
    for percent in (0..=100).step_by(20) {
        let at = y(f64::from(percent) / 100.0);
        writeln!(s, r##"<path d="M{LEFT} {at:.1}h{WIDTH}" stroke="#ddd"/>"##)?;
        writeln!(s, r#"<text x="52" y="{:.1}" text-anchor="end">{percent} %</text>"#, at + 4.0)?;
    }
    for epoch in 0..=last {
        writeln!(s, r#"<text x="{:.1}" y="298" text-anchor="middle">{epoch}</text>"#, x(epoch))?;
    }
    writeln!(s, r#"<text x="{}" y="320" text-anchor="middle">epoch</text>"#, LEFT + WIDTH / 2.0)?;
    for (i, ((name, outcome), color)) in curves.iter().zip(COLORS).enumerate() {
        write!(s, r#"<polyline fill="none" stroke="{color}" stroke-width="2" points=""#)?;
        for (epoch, point) in outcome.epochs.iter().enumerate() {
            let accuracy = point.test.right as f64 / point.test.samples.max(1) as f64;
            write!(s, "{:.1},{:.1} ", x(epoch), y(accuracy))?;
        }
        writeln!(s, r#""/>"#)?;
        let at = TOP + 20.0 * (i + 1) as f64;
        writeln!(s, r#"<path d="M560 {at}h24" stroke="{color}" stroke-width="2"/>"#)?;
        writeln!(s, r#"<text x="592" y="{:.1}">{name}</text>"#, at + 4.0)?;
    }
    writeln!(s, "</svg>")?;
    Ok(s)
}
