//! Pictures: medians with their spread, and lines that grow. Pure.

use std::fmt::Write;

use testbed::Spread;

const WIDTH: f64 = 960.0;
const FONT: &str = r#""Inter", "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif"#;
const COLOURS: [&str; 6] = ["#0f766e", "#b45309", "#1d4ed8", "#7c3aed", "#be123c", "#4b5563"];

/// One line of [`dots`]: a name, and a spread for each series.
pub struct Row {
    /// At the left.
    pub name: String,
    /// In the order of the series.
    pub spreads: Vec<Spread>,
}

/// A point of each series per row on a logarithmic scale, with a line from the least to the largest value. What never
/// came stands at the right edge. `mark`: a vertical line with a name.
pub fn dots(title: &str, note: &str, series: &[&str], rows: &[Row], mark: Option<(&str, f64)>) -> String {
    const LEFT: f64 = 190.0;
    const RIGHT: f64 = 880.0;
    const TOP: f64 = 112.0;
    /// Right of the scale, clear of its last label.
    const NEVER: f64 = 52.0;
    let step = 14.0 * count(series.len()) + 12.0;
    let bottom = TOP + step * count(rows.len());
    let values = rows.iter().flat_map(|row| &row.spreads).flat_map(|spread| [spread.median, spread.min, spread.max]);
    let scale = Log::around(values.flatten().chain(mark.map(|(_, at)| at)), LEFT, RIGHT);
    let mut svg = head(title, note, bottom + 60.0);
    for (at, label) in scale.ticks() {
        line(&mut svg, (at, TOP - 8.0), (at, bottom), "#e5e7eb", 1.0);
        text(&mut svg, at, bottom + 18.0, "tick", "middle", &label);
    }
    text(&mut svg, f64::midpoint(LEFT, RIGHT), bottom + 42.0, "axis", "middle", "milliseconds, logarithmic");
    text(&mut svg, RIGHT + NEVER, bottom + 18.0, "tick", "middle", "never");
    if let Some((name, value)) = mark {
        let at = scale.at(value);
        put(
            &mut svg,
            format_args!(
                r##"<path d="M{at:.1} {}V{bottom:.1}" stroke="#4b5563" stroke-dasharray="5 3" stroke-width="1.5"/>"##,
                TOP - 14.0
            ),
        );
        text(&mut svg, at, TOP - 18.0, "tick", "middle", name);
    }
    legend(&mut svg, series, 78.0);
    for (nth, row) in rows.iter().enumerate() {
        let top = TOP + step * count(nth);
        text(&mut svg, LEFT - 12.0, top + (step - 12.0) / 2.0 + 4.0, "name", "end", &row.name);
        for (which, spread) in row.spreads.iter().enumerate() {
            let (y, colour) = (top + 7.0 + 14.0 * count(which), COLOURS[which % COLOURS.len()]);
            let place = |value: Option<f64>| value.map_or(RIGHT + NEVER, |value| scale.at(value));
            line(&mut svg, (place(spread.min), y), (place(spread.max), y), colour, 2.0);
            let x = place(spread.median);
            let shown = shown(spread.median);
            put(
                &mut svg,
                format_args!(
                    r#"<circle cx="{x:.1}" cy="{y:.1}" r="5" fill="{colour}"><title>{shown}</title></circle>"#
                ),
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// One line of a [`Panel`].
pub struct Line {
    /// In the legend; the same name has the same colour in all panels.
    pub name: String,
    /// Where on the horizontal axis, and how much; `None` is a gap.
    pub points: Vec<(f64, Option<f64>)>,
}

/// One diagram of [`lines`].
pub struct Panel {
    /// Above it.
    pub title: String,
    /// In the order of the legend.
    pub lines: Vec<Line>,
}

/// Diagrams side by side, with both scales logarithmic.
pub fn lines(title: &str, note: &str, axis: &str, panels: &[Panel]) -> String {
    const TOP: f64 = 140.0;
    const BOTTOM: f64 = 380.0;
    let mut svg = head(title, note, BOTTOM + 70.0);
    let names: Vec<&str> =
        panels.first().map_or(Vec::new(), |panel| panel.lines.iter().map(|one| one.name.as_str()).collect());
    legend(&mut svg, &names, 78.0);
    let width = (WIDTH - 40.0) / count(panels.len().max(1));
    for (nth, panel) in panels.iter().enumerate() {
        let (left, right) = (20.0 + width * count(nth) + 52.0, 20.0 + width * (count(nth) + 1.0) - 14.0);
        let points = || panel.lines.iter().flat_map(|one| &one.points);
        let across = Log::around(points().map(|(x, _)| *x), left, right);
        let up = Log::around(points().filter_map(|(_, y)| *y), BOTTOM, TOP);
        text(&mut svg, left - 40.0, TOP - 20.0, "name", "start", &panel.title);
        for (at, label) in up.ticks() {
            line(&mut svg, (left, at), (right, at), "#e5e7eb", 1.0);
            text(&mut svg, left - 6.0, at + 4.0, "tick", "end", &label);
        }
        let mut places: Vec<f64> = points().map(|(x, _)| *x).collect();
        places.sort_unstable_by(f64::total_cmp);
        places.dedup();
        for place in places {
            text(&mut svg, across.at(place), BOTTOM + 18.0, "tick", "middle", &short(place));
        }
        text(&mut svg, f64::midpoint(left, right), BOTTOM + 42.0, "axis", "middle", axis);
        for (which, one) in panel.lines.iter().enumerate() {
            let colour = COLOURS[which % COLOURS.len()];
            let known: Vec<(f64, f64)> =
                one.points.iter().filter_map(|(x, y)| Some((across.at(*x), up.at((*y)?)))).collect();
            let mut path = String::new();
            for (nth, (x, y)) in known.iter().enumerate() {
                let _ = write!(path, "{}{x:.1} {y:.1}", if nth == 0 { 'M' } else { 'L' });
                put(&mut svg, format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{colour}"/>"#));
            }
            put(&mut svg, format_args!(r#"<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>"#));
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// A logarithmic scale over whole powers of ten.
struct Log {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Log {
    /// Nothing is below a tenth: what took no time stands at the edge.
    const LEAST: f64 = 0.1;

    fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values {
            let power = value.max(Self::LEAST).log10();
            (low, high) = (low.min(power.floor()), high.max(power.ceil()));
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        Self { low, high: high.max(low + 1.0), from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = (value.max(Self::LEAST).log10() - self.low) / (self.high - self.low);
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        let powers = (-1..=9).map(f64::from).filter(|power| (self.low..=self.high).contains(power));
        powers.map(|power| 10_f64.powf(power)).map(|value| (self.at(value), short(value))).collect()
    }
}

/// `1`, `10k`, `0.1`.
fn short(value: f64) -> String {
    match value {
        value if value >= 1e6 => format!("{:.0}M", value / 1e6),
        value if value >= 1e4 => format!("{:.0}k", value / 1e3),
        value if value >= 1.0 => format!("{value:.0}"),
        value => format!("{value:.1}"),
    }
}

/// A value in a table and in a tooltip.
pub fn shown(value: Option<f64>) -> String {
    match value {
        Some(value) if value.fract() == 0.0 || value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 1.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
        None => "never".to_owned(),
    }
}

fn head(title: &str, note: &str, height: f64) -> String {
    let mut svg = String::new();
    put(
        &mut svg,
        format_args!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"
     role="img">
<title>{}</title>
<style>
text {{ font-family: {FONT}; fill: #1f2937; }}
.title {{ font-size: 20px; font-weight: 600; }}
.note {{ font-size: 13px; fill: #4b5563; }}
.name {{ font-size: 13px; font-weight: 600; }}
.tick {{ font-size: 12px; fill: #4b5563; }}
.axis {{ font-size: 13px; }}
</style>
<rect width="100%" height="100%" fill="#ffffff"/>"##,
            escaped(title)
        ),
    );
    text(&mut svg, 20.0, 34.0, "title", "start", title);
    text(&mut svg, 20.0, 56.0, "note", "start", note);
    svg
}

fn legend(svg: &mut String, names: &[&str], y: f64) {
    let mut x = 20.0;
    for (nth, name) in names.iter().enumerate() {
        let colour = COLOURS[nth % COLOURS.len()];
        put(svg, format_args!(r#"<rect x="{x:.1}" y="{}" width="11" height="11" rx="2" fill="{colour}"/>"#, y - 10.0));
        text(svg, x + 17.0, y, "tick", "start", name);
        x += 40.0 + 7.2 * count(name.chars().count());
    }
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
    put(
        svg,
        format_args!(
            r#"<path d="M{:.1} {:.1}L{:.1} {:.1}" stroke="{colour}" stroke-width="{width}"/>"#,
            from.0, from.1, to.0, to.1
        ),
    );
}

fn text(svg: &mut String, x: f64, y: f64, class: &str, anchor: &str, text: &str) {
    let text = escaped(text);
    put(svg, format_args!(r#"<text x="{x:.1}" y="{y:.1}" class="{class}" text-anchor="{anchor}">{text}</text>"#));
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[allow(clippy::cast_precision_loss, reason = "a handful")]
fn count(count: usize) -> f64 {
    count as f64
}

/// Writing into a string does not fail.
fn put(svg: &mut String, part: std::fmt::Arguments<'_>) {
    let _ = writeln!(svg, "{part}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_holds_all_its_values() {
        let scale = Log::around([3.0, 450.0].into_iter(), 100.0, 400.0);
        assert!((scale.at(1.0) - 100.0).abs() < 1e-9 && (scale.at(1000.0) - 400.0).abs() < 1e-9);
        assert!((scale.at(10.0) - 200.0).abs() < 1e-9);
        let labels: Vec<_> = scale.ticks().into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["1", "10", "100", "1000"]);
        assert!(Log::around(std::iter::empty(), 0.0, 1.0).at(0.0).is_finite());
    }

    #[test]
    fn what_never_came_stands_apart() {
        let never = Spread { median: None, min: Some(5.0), max: None };
        let row = Row { name: "a<b".to_owned(), spreads: vec![never] };
        let svg = dots("title", "note", &["first"], &[row], Some(("floor", 2.0)));
        assert!(svg.contains(r#"cx="932.0""#) && svg.contains("<title>never</title>"), "{svg}");
        assert!(svg.contains("a&lt;b"), "{svg}");
    }
}
