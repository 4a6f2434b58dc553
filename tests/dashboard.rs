//! The dashboard and docs/metrics.md name what the crate reports, and nothing else.

#![cfg(feature = "metrics")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use serde_json::Value;
use tokio_postgres_failover::Pool;

const POOL: &str = "db.client.connection.pool.name";
/// Its value is the user's.
const NAMESPACE: &str = "db.namespace";
/// What only an operation that failed has.
const OF_FAILURES: [&str; 2] = ["error.type", "db.response.status_code"];

/// One figure: its kind, its unit, and the values of each label beside the pool's name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Figure {
    kind: String,
    unit: String,
    labels: BTreeMap<String, BTreeSet<String>>,
}

/// Remembers what is described and what is registered.
#[derive(Default)]
struct Reported {
    described: Mutex<BTreeMap<String, (&'static str, Unit)>>,
    registered: Mutex<BTreeMap<String, Figure>>,
}

impl Reported {
    fn describe(&self, kind: &'static str, name: &KeyName, unit: Option<Unit>, text: &SharedString) {
        assert!(text.ends_with('.'), "{text}");
        self.described.lock().unwrap().insert(name.as_str().to_owned(), (kind, unit.expect("every figure has a unit")));
    }

    fn register(&self, kind: &str, key: &Key) {
        let mut registered = self.registered.lock().unwrap();
        let figure = registered.entry(key.name().to_owned()).or_default();
        kind.clone_into(&mut figure.kind);
        let mut named = false;
        for label in key.labels() {
            if label.key() == POOL {
                named = label.value() == "orders";
            } else if label.key() == NAMESPACE {
                assert_eq!(label.value(), "app");
                figure.labels.entry(NAMESPACE.to_owned()).or_default();
            } else {
                figure.labels.entry(label.key().to_owned()).or_default().insert(label.value().to_owned());
            }
        }
        assert!(named, "{key} lacks the pool's name");
    }
}

impl Recorder for Reported {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.describe("counter", &name, unit, &text);
    }

    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.describe("gauge", &name, unit, &text);
    }

    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.describe("histogram", &name, unit, &text);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.register("counter", key);
        Counter::noop()
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.register("gauge", key);
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.register("histogram", key);
        Histogram::noop()
    }
}

/// What a pool reports, by name. Everything is registered when it is built.
async fn reported() -> BTreeMap<String, Figure> {
    let recorder = Reported::default();
    let pool = metrics::with_local_recorder(&recorder, || {
        Pool::builder("postgres://app@127.0.0.1/app").unwrap().pool_name("orders").build().unwrap()
    });
    pool.close();
    tokio::task::yield_now().await;
    let described = recorder.described.into_inner().unwrap();
    let mut figures = recorder.registered.into_inner().unwrap();
    assert!(figures.len() > 10, "{figures:?}");
    let kinds: BTreeMap<_, _> = figures.iter().map(|(name, figure)| (name.clone(), figure.kind.as_str())).collect();
    assert_eq!(described.iter().map(|(name, (kind, _))| (name.clone(), *kind)).collect::<BTreeMap<_, _>>(), kinds);
    for (name, (_, unit)) in described {
        let unit = if unit == Unit::Seconds { "s" } else { "–" };
        unit.clone_into(&mut figures.get_mut(&name).unwrap().unit);
    }
    figures
}

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[tokio::test]
async fn the_table_of_the_metrics_is_true() {
    let mut table = BTreeMap::new();
    let text = read("docs/metrics.md");
    for row in text.lines().filter(|line| line.starts_with("| `db.client")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, unit, labels, meaning, _] = cells[..] else { panic!("{row}") };
        assert!(!meaning.is_empty(), "{row}");
        let words = labels.split(';').map(|label| quoted(label).into_iter());
        let labels = words.filter_map(|mut words| Some((words.next()?, words.collect()))).collect();
        let figure = Figure { kind: kind.to_owned(), unit: unit.to_owned(), labels };
        assert!(table.insert(quoted(name)[0].clone(), figure).is_none(), "{row}");
    }
    let reported = reported().await;
    assert_eq!(table, reported);

    let series = |kind: &str| {
        let of_kind = reported.values().filter(|figure| figure.kind == kind);
        of_kind.map(|figure| figure.labels.values().map(|values| values.len().max(1)).product::<usize>()).sum::<usize>()
    };
    let (counters, gauges, histograms) = (series("counter"), series("gauge"), series("histogram"));
    let sentence = format!("{gauges} gauges, {counters} counters and {histograms} histograms");
    assert!(text.contains(&sentence), "docs/metrics.md should say: {sentence}");
}

/// Prometheus' names, as metrics-exporter-prometheus makes them with its recommended naming.
fn series_of(name: &str, figure: &Figure) -> Vec<String> {
    let mut name = name.replace('.', "_");
    if figure.unit == "s" {
        name.push_str("_seconds");
    }
    match figure.kind.as_str() {
        "counter" => vec![name + "_total"],
        "histogram" => ["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")).into(),
        _ => vec![name],
    }
}

/// Every string that is an expression or a query of the dashboard.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                match value {
                    Value::String(text) if ["expr", "query", "definition"].contains(&key.as_str()) => {
                        found.push(text.clone());
                    }
                    value => expressions(value, found),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn the_dashboard_reads_what_the_crate_reports() {
    let dashboard: Value = serde_json::from_str(&read("docs/grafana-dashboard.json")).unwrap();
    let mut found = Vec::new();
    expressions(&dashboard, &mut found);
    assert!(found.len() > 15, "{found:?}");
    let reported = reported().await;
    let mut series: BTreeMap<String, &str> = BTreeMap::new();
    let mut labels: BTreeSet<String> =
        OF_FAILURES.into_iter().chain([POOL]).map(|label| label.replace('.', "_")).collect();
    for (name, figure) in &reported {
        series.extend(series_of(name, figure).into_iter().map(|series| (series, name.as_str())));
        labels.extend(figure.labels.keys().map(|label| label.replace('.', "_")));
    }
    let mut shown = BTreeSet::new();
    for expression in &found {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for word in words.filter(|word| word.starts_with("db_")) {
            if !labels.contains(word) {
                let name = series.get(word).unwrap_or_else(|| panic!("{word} is not reported: {expression}"));
                shown.insert(*name);
            }
        }
        for by in expression.split("by (").skip(1) {
            for label in by.split(')').next().unwrap().split(',').map(str::trim) {
                assert!(label == "le" || labels.contains(label), "{label} is no label: {expression}");
            }
        }
    }
    let all: BTreeSet<&str> = reported.keys().map(String::as_str).collect();
    assert_eq!(shown, all, "the dashboard leaves something out");
}

/// What Grafana replaces in an expression, beside the dashboard's own variables.
const REPLACED: [&str; 2] = ["__range", "__rate_interval"];

/// What may be in front of a bracket: functions of Prometheus, `by`, and Grafana's own function for a variable.
const FUNCTIONS: [&str; 9] =
    ["by", "changes", "count", "histogram_quantile", "increase", "label_values", "max", "rate", "sum"];
/// Grafana's ids of the units that are in use. It shows another one as a text behind the figure.
const UNITS: [&str; 3] = ["ops", "s", "short"];

/// The words of `text` that follow each `mark`.
fn words_after<'a>(text: &'a str, mark: &'a str) -> impl Iterator<Item = &'a str> {
    let end = |rest: &str| rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    text.split(mark).skip(1).map(move |rest| &rest[..end(rest)])
}

/// Returns whether each bracket has its other half. Texts within the expressions have none.
fn is_balanced(text: &str) -> bool {
    let mut open = Vec::new();
    for c in text.chars() {
        match c {
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' if open.pop() != Some(c) => return false,
            _ => {}
        }
    }
    open.is_empty()
}

/// Grafana shows an expression that it cannot read as a panel without data.
#[tokio::test]
async fn the_expressions_are_whole() {
    let dashboard: Value = serde_json::from_str(&read("docs/grafana-dashboard.json")).unwrap();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let named: Vec<&str> = variables.iter().filter_map(|variable| variable["name"].as_str()).chain(REPLACED).collect();
    let mut found = Vec::new();
    expressions(&dashboard, &mut found);
    let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (label, of_figure) in reported().await.into_values().flat_map(|figure| figure.labels) {
        values.entry(label.replace('.', "_")).or_default().extend(of_figure);
    }
    for expression in &found {
        assert!(is_balanced(expression), "{expression}");
        for before in expression.split('(').rev().skip(1) {
            let word = before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap();
            assert!(word.is_empty() || FUNCTIONS.contains(&word), "{word} is no function: {expression}");
        }
        for variable in words_after(expression, "$") {
            assert!(named.contains(&variable), "${variable} is no variable: {expression}");
        }
        for (label, known) in &values {
            for value in words_after(expression, &format!("{label}=\"")) {
                assert!(known.contains(value), "{label} is never `{value}`: {expression}");
            }
        }
    }
}

/// What Grafana's schema of dashboards (`kinds/dashboard` of its sources) asks of this one.
#[test]
fn the_dashboard_fits_the_schema() {
    let dashboard: Value = serde_json::from_str(&read("docs/grafana-dashboard.json")).unwrap();
    let uid = dashboard["uid"].as_str().unwrap();
    assert!((8..=40).contains(&uid.len()), "{uid}");
    assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| version >= 36));
    assert!(["dark", "light", "null"].contains(&dashboard["style"].as_str().unwrap_or("null")));
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        assert!(["query", "datasource"].contains(&variable["type"].as_str().unwrap()), "{variable}");
        assert!(variable["name"].is_string(), "{variable}");
    }
    for annotation in dashboard["annotations"]["list"].as_array().unwrap() {
        let typed = annotation["name"].is_string() && annotation["iconColor"].is_string();
        assert!(typed && annotation["enable"].is_boolean() && is_source(&annotation["datasource"]), "{annotation}");
    }
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut taken) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "two panels with one id: {panel}");
        assert!(["stat", "timeseries"].contains(&panel["type"].as_str().unwrap()), "{panel}");
        assert!(panel["title"].is_string() && is_source(&panel["datasource"]), "{panel}");
        assert!(
            panel["fieldConfig"]["defaults"].is_object() && panel["fieldConfig"]["overrides"].is_array(),
            "{panel}"
        );
        let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap_or("short");
        assert!(UNITS.contains(&unit), "{unit} is no unit: {panel}");
        let place = ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().unwrap());
        let [x, y, w, h] = place;
        assert!(w > 0 && h > 0 && x + w <= 24, "{place:?}");
        for cell in (x..x + w).flat_map(|column| (y..y + h).map(move |row| (column, row))) {
            assert!(taken.insert(cell), "two panels at {cell:?}: {panel}");
        }
        let targets = panel["targets"].as_array().unwrap();
        let names: BTreeSet<&str> = targets.iter().map(|target| target["refId"].as_str().unwrap()).collect();
        assert_eq!(names.len(), targets.len(), "two targets with one refId: {panel}");
        for target in targets {
            assert!(target["expr"].is_string() && is_source(&target["datasource"]), "{target}");
        }
    }
}

fn is_source(value: &Value) -> bool {
    value["type"] == "prometheus" && value["uid"] == "${datasource}"
}
