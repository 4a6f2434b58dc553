//! The timeline picture: writes per 50 ms of both sides, one above the other, and what happened when.

use std::fmt::Write;
use std::time::Instant;

use crate::scenario::{BIN, Outcome, Run};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 540.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 930.0;
/// Upper edges of the two panels, and their height.
const PANELS: [f64; 2] = [134.0, 322.0];
const PANEL: f64 = 140.0;
const COLOURS: [&str; 2] = ["#0f766e", "#b45309"];
const ERROR: &str = "#dc2626";
/// What is shown around the kill, in seconds.
const BEFORE: f64 = 1.5;
const AFTER: f64 = 4.5;

/// The whole picture as SVG.
pub(crate) fn draw(run: &Run) -> String {
    let scale = Scale::new(run);
    let mut svg = String::new();
    head(&mut svg, run);
    for (nth, side) in [&run.pool, &run.plain].into_iter().enumerate() {
        panel(&mut svg, &scale, nth, side);
    }
    events(&mut svg, &scale, run);
    for second in scale.seconds() {
        let x = scale.x(second);
        let y = PANELS[1] + PANEL + 18.0;
        let sign = if second > 0.0 { "+" } else { "" };
        put(
            &mut svg,
            format_args!(r#"<text x="{x:.1}" y="{y}" class="tick" text-anchor="middle">{sign}{second}</text>"#),
        );
    }
    put(
        &mut svg,
        format_args!(
            r#"<text x="{}" y="{}" class="axis" text-anchor="middle">seconds since the kill</text>"#,
            f64::midpoint(LEFT, RIGHT),
            PANELS[1] + PANEL + 42.0
        ),
    );
    svg.push_str("</svg>\n");
    svg
}

/// Where a moment and a number lie in the picture. Time zero is the kill.
struct Scale {
    zero: Instant,
    from: f64,
    to: f64,
    most: f64,
    /// The start of the first bin.
    start: f64,
}

impl Scale {
    fn new(run: &Run) -> Self {
        let zero = run.timeline.killed;
        let (start, end) = (-(zero - run.timeline.start).as_secs_f64(), (run.timeline.end - zero).as_secs_f64());
        let most = run.pool.writes.iter().chain(&run.plain.writes).max().copied().unwrap_or(1);
        // A round number above the highest bin, for the axis.
        let most = (f64::from(most) / 20.0).ceil().max(1.0) * 20.0;
        Self { zero, from: start.max(-BEFORE), to: end.min(AFTER), most, start }
    }

    fn x(&self, second: f64) -> f64 {
        LEFT + (second - self.from) / (self.to - self.from) * (RIGHT - LEFT)
    }

    fn height(&self, count: f64) -> f64 {
        count / self.most * PANEL
    }

    fn second(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.zero).as_secs_f64()
    }

    fn seconds(&self) -> impl Iterator<Item = f64> {
        let (from, to) = (self.from, self.to);
        (-10..=60).map(f64::from).filter(move |second| (from..=to).contains(second))
    }

    /// The bins in view: begin, end and count.
    fn bins<'a>(&'a self, counts: &'a [u32]) -> impl Iterator<Item = (f64, f64, u32)> + 'a {
        let bin = BIN.as_secs_f64();
        let begins = (0_u32..).map(move |nth| self.start + f64::from(nth) * bin);
        begins
            .zip(counts)
            .map(move |(begin, count)| (begin, begin + bin, *count))
            .filter(move |(begin, end, _)| *begin >= self.from - bin / 2.0 && *end <= self.to + bin / 2.0)
            .map(|(begin, end, count)| (begin.max(self.from), end.min(self.to), count))
    }
}

fn head(svg: &mut String, run: &Run) {
    put(
        svg,
        format_args!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">
<title>Acknowledged writes while a PostgreSQL primary is killed and a standby promoted</title>
<style>
text {{ font-family: "Inter", "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; fill: #1f2937; }}
.title {{ font-size: 20px; font-weight: 600; }}
.note {{ font-size: 13px; fill: #4b5563; }}
.name {{ font-size: 14px; font-weight: 600; }}
.tick {{ font-size: 12px; fill: #4b5563; }}
.axis {{ font-size: 13px; }}
.event {{ font-size: 13px; font-weight: 600; }}
</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="{LEFT}" y="34" class="title">The primary is killed under load</text>
<text x="{LEFT}" y="56" class="note">Acknowledged writes per 50 ms, {} writers on each side; {}</text>"##,
            crate::WRITERS,
            run.naming.explained()
        ),
    );
    let middle = PANELS[0] + PANEL + 20.0;
    put(
        svg,
        format_args!(
            r#"<text transform="translate(22 {middle}) rotate(-90)" class="axis" text-anchor="middle">writes per 50 ms</text>"#
        ),
    );
}

fn panel(svg: &mut String, scale: &Scale, nth: usize, side: &Outcome) {
    let (top, colour) = (PANELS[nth], COLOURS[nth]);
    let base = top + PANEL;
    for share in [0.0, 0.5, 1.0] {
        let (count, y) = (scale.most * share, base - PANEL * share);
        put(svg, format_args!(r##"<path d="M{LEFT} {y}H{RIGHT}" stroke="#e5e7eb"/>"##));
        put(
            svg,
            format_args!(r#"<text x="{}" y="{}" class="tick" text-anchor="end">{count}</text>"#, LEFT - 8.0, y + 4.0),
        );
    }
    let mut outline = format!("M{LEFT} {base}");
    for (begin, end, count) in scale.bins(&side.writes) {
        let y = base - scale.height(f64::from(count));
        put(&mut outline, format_args!("L{:.1} {y:.1}H{:.1}", scale.x(begin), scale.x(end)));
    }
    put(
        svg,
        format_args!(
            r#"<path d="{outline}V{base}Z" fill="{colour}" fill-opacity="0.28" stroke="{colour}" stroke-width="1.3" stroke-linejoin="round"/>"#
        ),
    );
    for (begin, end, count) in scale.bins(&side.errors).filter(|(_, _, count)| *count > 0) {
        // At least three pixels high: an error shows however many writes there are.
        let (x, width, height) =
            (scale.x(begin), scale.x(end) - scale.x(begin), scale.height(f64::from(count)).max(3.0));
        let y = base - height;
        put(
            svg,
            format_args!(r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}" fill="{ERROR}"/>"#),
        );
    }
    legend(svg, nth, side);
}

fn legend(svg: &mut String, nth: usize, side: &Outcome) {
    // The first panel has the names of the events above it, too.
    let (y, colour) = (PANELS[nth] - [34.0, 14.0][nth], COLOURS[nth]);
    let name = ["tokio-postgres-failover", "plain deadpool-postgres with a retry loop"][nth];
    let figures = &side.figures;
    let errors = match figures.errors {
        0 => "no error reached a caller".to_owned(),
        count => format!("{count} errors reached the callers"),
    };
    let further = |count: usize, what: &str| if count > 0 { format!(", {count} {what}") } else { String::new() };
    let twice = further(figures.duplicates, "stored twice");
    let lost = further(figures.lost, "lost");
    let note = if figures.errors > 0 { ERROR } else { "#4b5563" };
    put(
        svg,
        format_args!(
            r#"<rect x="{LEFT}" y="{}" width="12" height="12" rx="2" fill="{colour}"/>
<text x="{}" y="{y}" class="name">{name}<tspan dx="10" font-weight="400" style="fill:{note}">{errors}{twice}{lost}</tspan></text>"#,
            y - 11.0,
            LEFT + 20.0
        ),
    );
}

/// The vertical lines, and the time in which nobody could have written.
fn events(svg: &mut String, scale: &Scale, run: &Run) {
    let promoted = scale.second(run.timeline.accepted);
    let mut events = vec![(0.0, "kill −9", ERROR, "end"), (promoted, "promoted", "#1d4ed8", "end")];
    events.extend(run.timeline.named.map(|named| (scale.second(named), "DNS moves", "#7c3aed", "start")));
    for (second, label, colour, anchor) in events {
        let x = scale.x(second);
        let aside = if anchor == "end" { x + 3.0 } else { x - 3.0 };
        put(
            svg,
            format_args!(
                r#"<text x="{aside:.1}" y="{}" class="event" text-anchor="{anchor}" style="fill:{colour}">{label}</text>"#,
                PANELS[0] - 10.0
            ),
        );
        for (top, above) in PANELS.into_iter().zip([6.0, 0.0]) {
            put(
                svg,
                format_args!(
                    r#"<path d="M{x:.1} {}V{}" stroke="{colour}" stroke-width="1.5" stroke-dasharray="5 3"/>"#,
                    top - above,
                    top + PANEL
                ),
            );
        }
    }
    put(
        svg,
        format_args!(
            r#"<text x="{:.1}" y="{}" class="note" text-anchor="middle">no primary exists</text>"#,
            f64::midpoint(scale.x(0.0), scale.x(promoted)),
            PANELS[0] + PANEL / 2.0 + 4.0
        ),
    );
}

/// Writing into a string does not fail.
fn put(svg: &mut String, part: std::fmt::Arguments<'_>) {
    let _ = writeln!(svg, "{part}");
}
