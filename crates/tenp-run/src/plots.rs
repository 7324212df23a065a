//! Pictures of results: lines with error bars, and heat maps, as SVG and as PNG.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

const SIZE: (u32, u32) = (920, 540);
const FONT: &str = "sans-serif";

/// Colours that stay apart for colour-blind readers (Okabe and Ito), darkest first; more series begin again with other marks.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 0, 0),
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
];

/// A line of a [`Lines`] plot.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    /// (x, y, half length of the error bar).
    pub(crate) points: Vec<(f64, f64, f64)>,
}

/// Lines over one number.
#[derive(Clone, Debug)]
pub(crate) struct Lines {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    /// A logarithmic y axis; values that are not positive are left out.
    pub(crate) log_y: bool,
    pub(crate) series: Vec<Series>,
}

/// A table of shares in [0, 1], rows down.
#[derive(Clone, Debug)]
pub(crate) struct HeatMap {
    pub(crate) title: String,
    pub(crate) x: String,
    pub(crate) y: String,
    /// Name and shares of each row.
    pub(crate) rows: Vec<(String, Vec<f64>)>,
}

/// A picture.
#[derive(Clone, Debug)]
pub(crate) enum Plot {
    Lines(Lines),
    HeatMap(HeatMap),
}

impl Plot {
    /// The picture as SVG text.
    pub(crate) fn svg(&self) -> Result<String> {
        fonts()?;
        let mut text = String::new();
        self.draw(&SVGBackend::with_string(&mut text, SIZE).into_drawing_area())?;
        Ok(text)
    }

    /// Writes `STEM.svg` and `STEM.png` into `folder`, and returns the SVG.
    pub(crate) fn write(&self, folder: &Path, stem: &str) -> Result<String> {
        let svg = self.svg()?;
        let path = folder.join(format!("{stem}.svg"));
        std::fs::write(&path, &svg).with_context(|| format!("cannot write {}", path.display()))?;
        let path = folder.join(format!("{stem}.png"));
        self.draw(&BitMapBackend::new(&path, SIZE).into_drawing_area())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(svg)
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()> {
        let drawn = area
            .fill(&WHITE)
            .map_err(|e| anyhow!("{e}"))
            .and_then(|()| match self {
                Self::Lines(plot) => plot.draw(area),
                Self::HeatMap(plot) => plot.draw(area),
            });
        drawn?;
        area.present().map_err(|e| anyhow!("{e}"))
    }
}

/// Text needs a font on every machine, so one comes along.
fn fonts() -> Result<()> {
    let fonts = [
        (FontStyle::Normal, dejavu::sans::regular()),
        (FontStyle::Bold, dejavu::sans::bold()),
    ];
    for (style, bytes) in fonts {
        register_font(FONT, style, bytes).map_err(|_| anyhow!("the built-in font is damaged"))?;
    }
    Ok(())
}

impl Lines {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()> {
        let kept = |&&(_, y, _): &&(f64, f64, f64)| y.is_finite() && (!self.log_y || y > 0.0);
        let points = || {
            self.series
                .iter()
                .flat_map(|s| s.points.iter().filter(kept))
        };
        let (mut x, mut y) = ((f64::MAX, f64::MIN), (f64::MAX, f64::MIN));
        for &(px, py, bar) in points() {
            x = (x.0.min(px), x.1.max(px));
            let low = if self.log_y {
                (py - bar).max(py / 2.0)
            } else {
                py - bar
            };
            y = (y.0.min(low), y.1.max(py + bar));
        }
        if points().next().is_none() {
            (x, y) = ((0.0, 1.0), (0.1, 1.0));
        }
        let pad = ((x.1 - x.0) * 0.04).max(0.01);
        let x = x.0 - pad..x.1 + pad;
        if self.log_y {
            let y = (y.0 * 0.8..y.1 * 1.25).log_scale();
            return self.draw_over(area, x, y);
        }
        let pad = ((y.1 - y.0) * 0.06).max(1e-6);
        self.draw_over(area, x, y.0 - pad..y.1 + pad)
    }

    fn draw_over<B: DrawingBackend, Y>(
        &self,
        area: &DrawingArea<B, Shift>,
        x: std::ops::Range<f64>,
        y: Y,
    ) -> Result<()>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let fail = |e: &dyn std::fmt::Display| anyhow!("{e}");
        let (plot, legend) = area.split_horizontally(SIZE.0 - 210);
        let mut chart = ChartBuilder::on(&plot)
            .caption(&self.title, (FONT, 19).into_font().style(FontStyle::Bold))
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(66)
            .build_cartesian_2d(x, y)
            .map_err(|e| fail(&e))?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_label_formatter(&|x| format!("{}", (x * 100.0).round() / 100.0))
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(225, 225, 225))
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 15))
            .draw()
            .map_err(|e| fail(&e))?;
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let style = colour.stroke_width(2);
            let points = &series.points;
            let shown = |y: f64| y.is_finite() && (!self.log_y || y > 0.0);
            let line = points.iter().filter(|p| shown(p.1)).map(|p| (p.0, p.1));
            chart
                .draw_series(LineSeries::new(line.clone(), style))
                .map_err(|e| fail(&e))?;
            let bars = points.iter().filter(|p| shown(p.1 - p.2) && p.2 > 0.0);
            chart
                .draw_series(bars.map(|&(x, y, bar)| {
                    ErrorBar::new_vertical(x, y - bar, y, y + bar, colour.stroke_width(1), 6)
                }))
                .map_err(|e| fail(&e))?;
            let hollow = i >= COLOURS.len();
            let mark: ShapeStyle = if hollow { style } else { colour.filled() };
            chart
                .draw_series(line.map(|p| Circle::new(p, 4, mark)))
                .map_err(|e| fail(&e))?;
            let top = 44 + 21 * i as i32;
            legend
                .draw(&PathElement::new(vec![(4, top), (28, top)], style))
                .and_then(|()| legend.draw(&Circle::new((16, top), 4, mark)))
                .and_then(|()| {
                    let font = (FONT, 14).into_font();
                    legend.draw(&Text::new(series.name.clone(), (34, top - 8), font))
                })
                .map_err(|e| fail(&e))?;
        }
        Ok(())
    }
}

impl HeatMap {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()> {
        let fail = |e: &dyn std::fmt::Display| anyhow!("{e}");
        let columns = self.rows.iter().map(|(_, r)| r.len()).max().unwrap_or(0);
        let (plot, scale) = area.split_horizontally(SIZE.0 - 110);
        let mut chart = ChartBuilder::on(&plot)
            .caption(&self.title, (FONT, 19).into_font().style(FontStyle::Bold))
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(66)
            .build_cartesian_2d(0..columns.max(1), 0..self.rows.len().max(1))
            .map_err(|e| fail(&e))?;
        let (rows, count) = (&self.rows, self.rows.len());
        // Labels stand at the edges of cells; half a cell further they stand at their middle.
        let (width, height) = chart.plotting_area().dim_in_pixel();
        let half = |pixels: u32, cells: usize| (pixels as usize / cells.max(1) / 2) as i32;
        chart
            .configure_mesh()
            .disable_mesh()
            .x_label_offset(half(width, columns))
            .y_label_offset(-half(height, count))
            .x_label_formatter(&|at| {
                if *at < columns {
                    at.to_string()
                } else {
                    String::new()
                }
            })
            .x_desc(&self.x)
            .y_desc(&self.y)
            .x_labels(columns.clamp(1, 16))
            .y_labels(count.clamp(1, 30))
            .y_label_formatter(&|at| {
                let row = count.checked_sub(at + 1).and_then(|r| rows.get(r));
                row.map_or_else(String::new, |(name, _)| name.clone())
            })
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 15))
            .draw()
            .map_err(|e| fail(&e))?;
        let cells = self.rows.iter().enumerate().flat_map(|(r, (_, shares))| {
            let y = count - 1 - r;
            shares.iter().enumerate().map(move |(x, &share)| {
                Rectangle::new([(x, y), (x + 1, y + 1)], shade(share).filled())
            })
        });
        chart.draw_series(cells).map_err(|e| fail(&e))?;
        for step in 0..=10 {
            let (top, share) = (60 + 32 * step, 1.0 - f64::from(step) / 10.0);
            let corners = [(14, top), (38, top + 32)];
            scale
                .draw(&Rectangle::new(corners, shade(share).filled()))
                .and_then(|()| {
                    let text = format!("{:.0} %", share * 100.0);
                    scale.draw(&Text::new(text, (44, top + 8), (FONT, 13).into_font()))
                })
                .map_err(|e| fail(&e))?;
        }
        Ok(())
    }
}

/// From white (nothing kept) over blue to nearly black (everything kept): darker is more, without colour vision too.
fn shade(share: f64) -> RGBColor {
    let share = share.clamp(0.0, 1.0);
    let mix = |low: f64, middle: f64, high: f64| {
        let value = if share < 0.5 {
            low + (middle - low) * 2.0 * share
        } else {
            middle + (high - middle) * (2.0 * share - 1.0)
        };
        value.round() as u8
    };
    RGBColor(
        mix(255.0, 86.0, 8.0),
        mix(255.0, 150.0, 29.0),
        mix(255.0, 205.0, 88.0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(log_y: bool) -> Plot {
        let series = |name: &str, scale: f64| Series {
            name: name.to_owned(),
            points: (1..5)
                .map(|i| (f64::from(i) / 5.0, scale / f64::from(i), 0.01))
                .collect(),
        };
        Plot::Lines(Lines {
            title: "KL".to_owned(),
            x: "kept".to_owned(),
            y: "nats".to_owned(),
            log_y,
            series: vec![series("tenp", 1.0), series("a <b> & c", 0.0)],
        })
    }

    #[test]
    fn pictures_name_their_series_and_are_the_same_every_time() {
        for log_y in [false, true] {
            let svg = lines(log_y).svg().unwrap();
            assert!(svg.contains("tenp") && svg.contains("nats"), "{svg}");
            assert!(!svg.contains("<b>"), "text is escaped");
            assert_eq!(svg, lines(log_y).svg().unwrap());
        }
    }

    #[test]
    fn files_are_written_and_empty_plots_are_drawn() {
        let folder = tempfile::tempdir().unwrap();
        let plot = Plot::HeatMap(HeatMap {
            title: "kept width".to_owned(),
            x: "expert".to_owned(),
            y: "layer".to_owned(),
            rows: vec![
                ("1".to_owned(), vec![0.0, 0.5, 1.0]),
                ("2".to_owned(), vec![]),
            ],
        });
        let svg = plot.write(folder.path(), "widths").unwrap();
        assert_eq!(
            std::fs::read_to_string(folder.path().join("widths.svg")).unwrap(),
            svg
        );
        let png = std::fs::read(folder.path().join("widths.png")).unwrap();
        assert_eq!(&png[1..4], b"PNG");
        let empty = Plot::Lines(Lines {
            title: String::new(),
            x: String::new(),
            y: String::new(),
            log_y: true,
            series: Vec::new(),
        });
        empty.svg().unwrap();
    }

    #[test]
    fn darker_is_more() {
        let light = |share| {
            let RGBColor(r, g, b) = shade(share);
            u32::from(r) + u32::from(g) + u32::from(b)
        };
        for step in 0..10 {
            assert!(light(f64::from(step) / 10.0) > light(f64::from(step + 1) / 10.0));
        }
    }
}
