//! The report: tables, pictures and one file of figures, made of the results files alone.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use testbed::Spread;

use crate::error::Error;
use crate::floor::NAME_OF_FLOOR;
use crate::measurement::Measurement;
use crate::plot::{self, Line, Panel, Row, shown};
use crate::quiet;
use crate::results::{PeerInfo, Results, summary};
use crate::targets::verdicts;

const TEMPLATE: &str = include_str!("../BENCHMARKS.template.md");
/// The order of the recovery cases; one that is not named here comes last.
const FAILURES: [&str; 7] = ["dns-all", "kill", "dns-late", "planned", "demotion", "freeze", "vanish"];

/// Where the report goes.
pub struct Places {
    /// The text.
    pub text: PathBuf,
    /// The pictures.
    pub pictures: PathBuf,
    /// The pictures' folder as the text names it, with a slash, or nothing.
    pub link: &'static str,
}

impl Places {
    /// `target/bench`.
    pub fn beside_results(out: &Path) -> Self {
        Self { text: out.join("report.md"), pictures: out.to_owned(), link: "" }
    }

    /// The project's own `BENCHMARKS.md` and `docs/bench`.
    pub fn of_the_project() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
        Self { text: root.join("BENCHMARKS.md"), pictures: root.join("docs/bench"), link: "docs/bench/" }
    }
}

/// Writes the summary beside the results, and the text and the pictures where they shall go.
pub fn write(out: &Path, places: &Places) -> Result<(), Error> {
    let mut all = Results::read_all(out)?;
    if all.is_empty() {
        return Err(Error::Other(format!("{} holds no results: run `make bench` first", out.display())));
    }
    all.sort_by_key(|results| order(&results.case));
    save(&out.join("summary.json"), &format!("{:#}\n", summary(&all)))?;
    for (name, picture) in pictures(&all) {
        save(&places.pictures.join(name), &picture)?;
    }
    save(&places.text, &text(&all, places.link))
}

fn save(path: &Path, content: &str) -> Result<(), Error> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
    }
    std::fs::write(path, content).map_err(Error::file(path))?;
    println!("{}", path.display());
    Ok(())
}

fn order(case: &str) -> (usize, usize, String) {
    let (family, rest) = case.split_once('/').unwrap_or((case, ""));
    let family = ["recovery", "floor", "growth", "quiet"].iter().position(|one| *one == family).unwrap_or(9);
    let nth = FAILURES.iter().position(|one| *one == rest).unwrap_or(FAILURES.len());
    (family, nth, rest.to_owned())
}

fn file_name(case: &str) -> String {
    format!("{}.svg", case.replace('/', "-"))
}

fn pictures(all: &[Results]) -> Vec<(String, String)> {
    let drawn = all.iter().filter_map(|results| {
        let picture = if results.case.starts_with("recovery/") {
            Some(recovery_picture(results))
        } else {
            growth_picture(results)
        };
        Some((file_name(&results.case), picture?))
    });
    drawn.collect()
}

fn recovery_picture(results: &Results) -> String {
    let empty = Spread { median: None, min: None, max: None };
    let spread = |peer: &str, metric: &str| results.of(peer, metric).map_or(empty, Measurement::spread);
    let measured = results.peers.iter().filter(|peer| results.of(&peer.name, "first_write").is_some());
    let rows: Vec<Row> = measured
        .map(|peer| Row {
            name: peer.name.clone(),
            spreads: vec![spread(&peer.name, "first_write"), spread(&peer.name, "all_workers")],
        })
        .collect();
    let floor = spread(NAME_OF_FLOOR, "first_write").median.map(|floor| ("floor", floor));
    let series = ["first write after the new primary took one", "all workers writing again"];
    let note = format!("{}; median of {}, line: least to largest", results.explained, results.rounds);
    plot::dots(&format!("Recovery: {}", results.case.trim_start_matches("recovery/")), &note, &series, &rows, floor)
}

/// What is drawn of each axis: metric and title.
fn panels_of(case: &str) -> Option<[(&'static str, &'static str); 3]> {
    let time = match case {
        "growth/waiters" => ("beyond_work", "recovery beyond the work, ms"),
        "growth/candidates" | "growth/pools" => ("all_workers", "all workers write again, ms"),
        _ => return None,
    };
    let memory = match case {
        "growth/waiters" => ("memory_per_waiter", "memory per waiter, KiB"),
        "growth/pools" => ("memory_per_pool", "memory per pool, KiB"),
        _ => ("probes", "statements before the promotion"),
    };
    Some([time, ("connection_starts", "connections the servers saw"), memory])
}

fn growth_picture(results: &Results) -> Option<String> {
    let panels = panels_of(&results.case)?.map(|(metric, title)| Panel {
        title: title.to_owned(),
        lines: results.peers.iter().map(|peer| line_of(results, &peer.name, metric)).collect(),
    });
    let axis = results.case.trim_start_matches("growth/");
    let note = format!("kill −9; medians of {}; both scales logarithmic", results.rounds);
    Some(plot::lines(&format!("Growth: {axis}"), &note, axis, &panels))
}

fn line_of(results: &Results, peer: &str, metric: &str) -> Line {
    let of_this = results.measurements.iter().filter(|one| one.peer == peer && one.metric == metric);
    let mut points: Vec<(f64, Option<f64>)> = of_this
        .filter_map(|measured| {
            let size = measured.case.rsplit('/').next()?.parse().ok()?;
            Some((size, measured.spread().median))
        })
        .collect();
    points.sort_unstable_by(|one, other| one.0.total_cmp(&other.0));
    Line { name: peer.to_owned(), points }
}

fn text(all: &[Results], link: &str) -> String {
    let sections = |family: &str, table: fn(&Results) -> String| {
        let of_family = all.iter().filter(|results| results.case.split('/').next() == Some(family));
        let made: Vec<String> = of_family.map(|results| section(results, &table(results), link)).collect();
        if made.is_empty() { "Not measured yet.\n".to_owned() } else { made.join("\n") }
    };
    let main = all.iter().find(|results| results.case.starts_with("recovery/"));
    let picture = main.map_or_else(String::new, |results| picture_link(&results.case, link));
    TEMPLATE
        .replace("{{main picture}}", &picture)
        .replace("{{machine}}", &machines(all))
        .replace("{{targets}}", &targets(all))
        .replace("{{recovery}}", &sections("recovery", recovery_table))
        .replace("{{floor}}", &sections("floor", any_table))
        .replace("{{growth}}", &sections("growth", any_table))
        .replace("{{quiet}}", &sections("quiet", |results| quiet::tables(&results.measurements)))
        .replace("{{peers}}", &peers(all))
}

fn picture_link(case: &str, link: &str) -> String {
    format!("![{case}]({link}{})\n", file_name(case))
}

fn section(results: &Results, table: &str, link: &str) -> String {
    let mut text = format!("### {}\n\n{}.\n\n", results.case, results.explained);
    let _ = writeln!(text, "`{}`\n", results.command);
    text.push_str(table);
    if results.case.starts_with("recovery/") || panels_of(&results.case).is_some() {
        let _ = write!(text, "\n{}", picture_link(&results.case, link));
    }
    for note in &results.notes {
        let _ = write!(text, "\n- {note}");
    }
    for peer in results.peers.iter().filter(|peer| peer.missing.is_some()) {
        // A foreign program's stack trace says it in its first line.
        let why = peer.missing.as_deref().and_then(|why| why.split(" | ").next()).unwrap_or_default();
        let _ = write!(text, "\n- missing: {}: {why}", peer.name);
    }
    text.push('\n');
    text
}

fn recovery_table(results: &Results) -> String {
    let late = results.measurements.iter().any(|one| one.metric == "first_write_after_dns");
    let mut columns = vec!["first_write", "all_workers", "longest_gap", "errors", "duplicates", "lost", "stuck"];
    let mut heads = vec!["first write, ms", "all workers, ms", "longest gap, ms", "errors", "twice", "lost", "stuck"];
    if late {
        columns.insert(1, "first_write_after_dns");
        heads.insert(1, "first write after DNS, ms");
    }
    let mut text = format!("| | {} | × floor |\n|---|{}---|\n", heads.join(" | "), "---|".repeat(heads.len()));
    let measured = results.peers.iter().filter(|peer| results.of(&peer.name, "first_write").is_some());
    for peer in measured {
        let cells: Vec<String> = columns.iter().map(|metric| cell(results.of(&peer.name, metric))).collect();
        let ratio = results.of(&peer.name, "first_write").and_then(Measurement::ratio);
        let ratio = ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"));
        let _ = writeln!(text, "| {} | {} | {ratio} |", peer.name, cells.join(" | "));
    }
    let floor = cell(results.of(NAME_OF_FLOOR, "first_write"));
    let promoted = cell(results.of(NAME_OF_FLOOR, "first_write_promoted"));
    let _ = writeln!(text, "\nFloor of this run: {floor} ms on a quiet primary, {promoted} ms on one just promoted.");
    text
}

/// A row for each subject, a column for each metric.
fn any_table(results: &Results) -> String {
    let mut metrics: Vec<(&str, &str)> = Vec::new();
    let mut rows: Vec<(&str, &str)> = Vec::new();
    for measured in &results.measurements {
        let (metric, row) =
            ((measured.metric.as_str(), measured.unit.as_str()), (measured.case.as_str(), measured.peer.as_str()));
        if !metrics.contains(&metric) {
            metrics.push(metric);
        }
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    let head = |(metric, unit): &(&str, &str)| match *unit {
        "count" | "" => metric.replace('_', " "),
        unit => format!("{}, {unit}", metric.replace('_', " ")),
    };
    let heads: Vec<String> = metrics.iter().map(head).collect();
    let mut text = format!("| | | {} |\n|---|---|{}\n", heads.join(" | "), "---|".repeat(heads.len()));
    let prefix = format!("{}/", results.case);
    for (case, peer) in rows {
        let find = |metric: &str| {
            results.measurements.iter().find(|one| one.case == case && one.peer == peer && one.metric == metric)
        };
        let cells: Vec<String> = metrics.iter().map(|(metric, _)| cell(find(metric))).collect();
        let _ = writeln!(text, "| {} | {peer} | {} |", case.strip_prefix(&prefix).unwrap_or(case), cells.join(" | "));
    }
    text
}

/// Median, and the least and the largest where they differ.
fn cell(measured: Option<&Measurement>) -> String {
    let Some(measured) = measured else {
        return "–".to_owned();
    };
    let Spread { median, min, max } = measured.spread();
    if measured.samples.len() < 2 || (median == min && median == max) {
        return shown(median);
    }
    format!("{} ({} – {})", shown(median), shown(min), shown(max))
}

fn targets(all: &[Results]) -> String {
    let mut text = "| promise | measured | kept |\n|---|---|---|\n".to_owned();
    for verdict in verdicts(all) {
        let kept = match verdict.kept {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "–",
        };
        let _ = writeln!(text, "| {} | {} | {kept} |", verdict.promise, verdict.measured);
    }
    text
}

/// Runs may have been made on different machines, or of different commits: each is told once, with its cases.
fn machines(all: &[Results]) -> String {
    let mut told: Vec<(String, Vec<&str>)> = Vec::new();
    for results in all {
        let machine = &results.machine;
        let text = format!(
            "{} × {}, {} MiB, {}; PostgreSQL {}; {}; commit `{}`",
            machine.cores,
            machine.processor,
            machine.memory,
            machine.kernel,
            machine.postgres,
            machine.rust,
            machine.commit
        );
        match told.iter_mut().find(|(one, _)| *one == text) {
            Some((_, cases)) => cases.push(&results.case),
            None => told.push((text, vec![&results.case])),
        }
    }
    match told.as_slice() {
        [(text, _)] => format!("{text}.\n"),
        several => {
            let lines: Vec<String> =
                several.iter().map(|(text, cases)| format!("- {text}: {}", cases.join(", "))).collect();
            lines.join("\n") + "\n"
        }
    }
}

fn peers(all: &[Results]) -> String {
    let mut known: BTreeMap<usize, &PeerInfo> = BTreeMap::new();
    let mut names: Vec<&str> = Vec::new();
    for peer in all.iter().flat_map(|results| &results.peers) {
        let nth = names.iter().position(|name| *name == peer.name).unwrap_or_else(|| {
            names.push(&peer.name);
            names.len() - 1
        });
        known.entry(nth).or_insert(peer);
    }
    let mut text = "| name | library | configuration |\n|---|---|---|\n".to_owned();
    for peer in known.values() {
        let _ = writeln!(text, "| {} | {} | {} |", peer.name, peer.version, peer.config.replace('|', "\\|"));
    }
    text
}
