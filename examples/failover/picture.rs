//! The timeline picture: for each failure the writes per 50 ms of both sides, one above the other, and what happened
//! when.

use std::fmt::Write;
use std::time::Instant;

use crate::fault::Fault;
use crate::scenario::{BIN, Outcome, Run};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 930.0;
/// The title, above the failures.
const HEAD: f64 = 66.0;
/// One failure's part: its height, the upper edges of its two panels, and their height.
const PART: f64 = 290.0;
const PANELS: [f64; 2] = [66.0, 170.0];
const PANEL: f64 = 76.0;
const COLOURS: [&str; 2] = ["#0f766e", "#b45309"];
const ERROR: &str = "#dc2626";
/// What is shown around the failure, in seconds.
const BEFORE: f64 = 1.5;
const AFTER: f64 = 6.5;

/// The whole picture as SVG: the last run of each failure.
pub(crate) fn draw(all: &[(Fault, Vec<Run>)]) -> String {
    let runs: Vec<&Run> = all.iter().filter_map(|(_, runs)| runs.last()).collect();
    let mut svg = String::new();
    head(&mut svg, &runs);
    let mut top = HEAD;
    for run in runs {
        put(&mut svg, format_args!(r#"<g transform="translate(0 {top})">"#));
        part(&mut svg, run);
        svg.push_str("</g>\n");
        top += PART;
    }
    svg.push_str("</svg>\n");
    svg
}

/// One failure.
fn part(svg: &mut String, run: &Run) {
    let scale = Scale::new(run);
    put(svg, format_args!(r#"<text x="{LEFT}" y="16" class="name">{}</text>"#, run.fault.explained()));
    for (nth, side) in [&run.pool, &run.plain].into_iter().enumerate() {
        panel(svg, &scale, nth, side);
    }
    events(svg, &scale, run);
    let below = PANELS[1] + PANEL + 16.0;
    for second in scale.seconds() {
        let x = scale.x(second);
        let sign = if second > 0.0 { "+" } else { "" };
        put(
            svg,
            format_args!(r#"<text x="{x:.1}" y="{below}" class="tick" text-anchor="middle">{sign}{second} s</text>"#),
        );
    }
}

/// Where a moment and a number lie in the picture. Time zero is the failure.
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
        let zero = run.timeline.struck;
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

fn head(svg: &mut String, runs: &[&Run]) {
    let height = runs.iter().fold(HEAD, |height, _| height + PART);
    let naming = runs.first().map_or("", |run| run.naming.explained());
    put(
        svg,
        format_args!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"
     role="img">
<title>Acknowledged writes while a PostgreSQL primary fails and a standby is promoted</title>
<style>
text {{ font-family: "Inter", "Segoe UI", "Helvetica Neue", "DejaVu Sans", Arial, sans-serif; fill: #1f2937; }}
.title {{ font-size: 20px; font-weight: 600; }}
.note {{ font-size: 13px; fill: #4b5563; }}
.name {{ font-size: 14px; font-weight: 600; }}
.side {{ font-size: 13px; font-weight: 600; }}
.tick {{ font-size: 12px; fill: #4b5563; }}
.event {{ font-size: 12px; font-weight: 600; }}
</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="{LEFT}" y="30" class="title">The primary fails under load</text>
<text x="{LEFT}" y="50" class="note">Acknowledged writes per 50 ms, {} writers on each side; {naming}</text>"##,
            crate::WRITERS
        ),
    );
}

fn panel(svg: &mut String, scale: &Scale, nth: usize, side: &Outcome) {
    let (top, colour) = (PANELS[nth], COLOURS[nth]);
    let base = top + PANEL;
    for share in [0.0, 1.0] {
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
            r#"<path d="{outline}V{base}Z" fill="{colour}" fill-opacity="0.28"
      stroke="{colour}" stroke-width="1.3" stroke-linejoin="round"/>"#
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
    let (y, colour) = (PANELS[nth] - [24.0, 8.0][nth], COLOURS[nth]);
    let name = ["tokio-postgres-failover", "plain deadpool-postgres with a retry loop"][nth];
    let figures = &side.figures;
    let errors = match figures.errors {
        0 => "no error reached a caller".to_owned(),
        count => format!("{count} errors reached the callers"),
    };
    let back = if figures.all_writers.is_some() { "" } else { ", not all writers wrote again" };
    let further = |count: usize, what: &str| if count > 0 { format!(", {count} {what}") } else { String::new() };
    let twice = further(figures.duplicates, "stored twice");
    let lost = further(figures.lost, "lost");
    let note = if figures.errors > 0 || figures.all_writers.is_none() { ERROR } else { "#4b5563" };
    put(
        svg,
        format_args!(
            r#"<rect x="{LEFT}" y="{}" width="12" height="12" rx="2" fill="{colour}"/>
<text x="{}" y="{y}" class="side">{name}<tspan dx="10" font-weight="400"
      style="fill:{note}">{errors}{twice}{lost}{back}</tspan></text>"#,
            y - 11.0,
            LEFT + 20.0
        ),
    );
}

/// The vertical lines, and the time in which nobody could have written.
fn events(svg: &mut String, scale: &Scale, run: &Run) {
    let promoted = scale.second(run.timeline.accepted);
    let mut events = vec![(0.0, run.fault.short(), ERROR, "end"), (promoted, "promoted", "#1d4ed8", "end")];
    events.extend(run.timeline.named.map(|named| (scale.second(named), "DNS moves", "#7c3aed", "start")));
    for (second, label, colour, anchor) in events {
        let x = scale.x(second);
        let aside = if anchor == "end" { x + 3.0 } else { x - 3.0 };
        put(
            svg,
            format_args!(
                r#"<text x="{aside:.1}" y="{}" class="event" text-anchor="{anchor}"
      style="fill:{colour}">{label}</text>"#,
                PANELS[0] - 8.0
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
