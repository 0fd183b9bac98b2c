//! A picture of peak memory over depth.

use std::path::Path;

use plotters::prelude::*;

/// Colours of lines.
pub const RED: RGBColor = RGBColor(200, 60, 50);
/// A second one.
#[allow(dead_code)] // burn has two ways of its own, candle one
pub const ORANGE: RGBColor = RGBColor(220, 140, 30);
/// The reversible stack's.
pub const BLUE: RGBColor = RGBColor(30, 90, 170);
/// What every way of training needs.
pub const GREY: RGBColor = RGBColor(130, 130, 130);

/// Draws a line for each name and colour through points of depth and MB.
///
/// # Errors
/// Those of the file system.
pub fn draw<const N: usize>(
    path: &Path,
    title: &str,
    lines: [(&str, RGBColor); N],
    points: &[(f64, [f64; N])],
) -> Result<(), Box<dyn core::error::Error>> {
    let depth = points.iter().fold(0.0_f64, |m, (k, _)| m.max(*k));
    let most = points.iter().flat_map(|(_, p)| p).fold(0.0_f64, |m, p| m.max(*p));
    let area = SVGBackend::new(path, (720, 440)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .caption(title, ("sans-serif", 20))
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..depth * 1.05, 0.0..most * 1.08)?;
    chart.configure_mesh().x_desc("blocks").y_desc("MB").light_line_style(WHITE).draw()?;
    for (i, (name, colour)) in lines.into_iter().enumerate() {
        let line = points.iter().map(|(k, p)| (*k, p[i]));
        chart
            .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        chart.draw_series(line.map(|p| Circle::new(p, 3, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(RGBColor(180, 180, 180))
        .draw()?;
    area.present()?;
    Ok(())
}
