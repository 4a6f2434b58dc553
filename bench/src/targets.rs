//! What this crate promises, held against the figures. Pure.

use crate::measurement::Measurement;
use crate::results::Results;

/// One promise.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What is promised.
    pub promise: String,
    /// What was measured.
    pub measured: String,
    /// `None`: there are no figures for it.
    pub kept: Option<bool>,
}

/// This crate's variants have names that begin with it.
const OURS: &str = "failover";

/// Every promise, in the order of the report.
pub fn verdicts(all: &[Results]) -> Vec<Verdict> {
    let case = |name: &str| all.iter().find(|results| results.case == name);
    let mut verdicts =
        vec![within(case("recovery/dns-all"), OURS, 3.0), within(case("recovery/dns-all"), "failover-warm", 1.5)];
    verdicts.extend(["dns-all", "freeze", "vanish"].map(|name| ahead(case(&format!("recovery/{name}")), name)));
    verdicts.extend(["freeze", "vanish"].map(|name| none(case(&format!("recovery/{name}")), name, &["stuck"])));
    verdicts.extend(all.iter().filter_map(|results| {
        let name = results.case.strip_prefix("recovery/")?;
        Some(none(Some(results), name, &["errors", "duplicates", "lost"]))
    }));
    let quiet = case("quiet");
    verdicts.push(keeps_up(quiet, "get", OURS, "throughput", |ratio| ratio >= 0.98, "≥ 0.98"));
    verdicts.push(keeps_up(quiet, "get", OURS, "p50", |ratio| ratio <= 1.02, "≤ 1.02"));
    for mode in ["exactly-once", "at-most-once", "idempotent"] {
        verdicts.push(keeps_up(quiet, "transaction", mode, "throughput", |ratio| ratio >= 0.98, "≥ 0.98"));
    }
    verdicts.push(grows(case("growth/waiters"), "beyond_work", ["10", "10000"], 2.0));
    verdicts.push(grows(case("growth/waiters"), "probes", ["10", "10000"], 1.5));
    verdicts.push(grows(case("growth/waiters"), "connection_starts", ["10", "10000"], 2.0));
    verdicts.push(grows(case("growth/candidates"), "first_write", ["3", "64"], 1.5));
    verdicts
}

fn within(results: Option<&Results>, peer: &str, times: f64) -> Verdict {
    let promise = format!("kill −9, all members in DNS: first write of {peer} ≤ {times} × the floor of the same run");
    let ratio = results.and_then(|results| results.of(peer, "first_write")).and_then(Measurement::ratio);
    Verdict {
        promise,
        measured: ratio.map_or_else(|| "no figures".to_owned(), |ratio| format!("{ratio:.2} ×")),
        kept: ratio.map(|ratio| ratio <= times),
    }
}

fn is_peer(name: &str) -> bool {
    !name.starts_with(OURS) && name != crate::floor::NAME_OF_FLOOR
}

fn ahead(results: Option<&Results>, name: &str) -> Verdict {
    let promise = format!("{name}: median of the first write of {OURS} before that of every peer");
    let medians = |wanted: &dyn Fn(&str) -> bool| -> Vec<(String, f64)> {
        let all = results.iter().flat_map(|results| &results.measurements);
        let firsts = all.filter(|measured| measured.metric == "first_write" && wanted(&measured.peer));
        // What never came is behind everyone.
        firsts.map(|one| (one.peer.clone(), one.spread().median.unwrap_or(f64::INFINITY))).collect()
    };
    let best = medians(&is_peer).into_iter().min_by(|one, other| one.1.total_cmp(&other.1));
    let ours = medians(&|peer| peer == OURS).into_iter().next();
    let Some(((peer, theirs), (_, ours))) = best.zip(ours) else {
        return Verdict { promise, measured: "no figures".to_owned(), kept: None };
    };
    let theirs_shown = if theirs.is_finite() { format!("{theirs:.1} ms") } else { "never".to_owned() };
    Verdict { promise, measured: format!("{ours:.1} ms; best peer: {peer}, {theirs_shown}"), kept: Some(ours < theirs) }
}

fn none(results: Option<&Results>, name: &str, metrics: &[&str]) -> Verdict {
    let promise = format!("{name}: no {} of this crate, in any repetition", metrics.join(", none "));
    let all = results.iter().flat_map(|results| &results.measurements);
    let of_ours: Vec<&Measurement> =
        all.filter(|measured| measured.peer.starts_with(OURS) && metrics.contains(&measured.metric.as_str())).collect();
    let worst: Vec<String> = of_ours
        .iter()
        .filter(|measured| measured.samples.iter().any(|sample| *sample != Some(0.0)))
        .map(|measured| {
            format!("{}: {:.0} {}", measured.peer, measured.spread().max.unwrap_or_default(), measured.metric)
        })
        .collect();
    match (of_ours.is_empty(), worst.is_empty()) {
        (true, _) => Verdict { promise, measured: "no figures".to_owned(), kept: None },
        (false, true) => Verdict { promise, measured: "none".to_owned(), kept: Some(true) },
        (false, false) => Verdict { promise, measured: worst.join("; "), kept: Some(false) },
    }
}

/// Medians of the ratios of each round, at every number of tasks.
fn keeps_up(
    results: Option<&Results>,
    work: &str,
    peer: &str,
    metric: &str,
    is_kept: fn(f64) -> bool,
    limit: &str,
) -> Verdict {
    let measured = results.map_or(&[][..], |results| &results.measurements);
    let (shown, kept) = keeps_up_in(measured, work, peer, metric, is_kept);
    Verdict {
        promise: format!("quiet {work}: {metric} of {peer} {limit} of deadpool-fast's, at each number of tasks"),
        measured: if kept.is_none() { "no figures".to_owned() } else { shown },
        kept,
    }
}

fn keeps_up_in(
    measured: &[Measurement],
    work: &str,
    peer: &str,
    metric: &str,
    is_kept: fn(f64) -> bool,
) -> (String, Option<bool>) {
    let (prefix, metric) = (format!("quiet/{work}/"), format!("{metric}, ratio"));
    let ratio = |one: &Measurement| {
        let tasks = one.case.strip_prefix(&prefix)?.to_owned();
        let ratio = one.spread().median.filter(|_| one.peer == peer && one.metric == metric)?;
        Some((tasks, ratio))
    };
    let ratios: Vec<(String, f64)> = measured.iter().filter_map(ratio).collect();
    let shown: Vec<String> = ratios.iter().map(|(tasks, ratio)| format!("{ratio:.2} at {tasks}")).collect();
    (shown.join(", "), (!ratios.is_empty()).then(|| ratios.iter().all(|(_, ratio)| is_kept(*ratio))))
}

fn grows(results: Option<&Results>, metric: &str, points: [&str; 2], times: f64) -> Verdict {
    let [few, many] = points;
    let axis = results.and_then(|results| results.case.split_once('/')).map_or("growth", |(_, axis)| axis);
    let promise = format!("{axis}: {metric} of {OURS} at {many} ≤ {times} × that at {few}");
    let at = |point: &str| {
        let results = results?;
        let case = format!("{}/{point}", results.case);
        let found =
            results.measurements.iter().find(|one| one.peer == OURS && one.case == case && one.metric == metric);
        found.and_then(|measured| measured.spread().median)
    };
    match at(few).zip(at(many)) {
        None => Verdict { promise, measured: "no figures".to_owned(), kept: None },
        Some((first, last)) => {
            Verdict { promise, measured: format!("{first:.1} and {last:.1}"), kept: Some(last <= first * times) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet(ratios: &[(&str, f64)]) -> Vec<Measurement> {
        let of = |(tasks, ratio): &(&str, f64)| {
            let case = format!("quiet/get/{tasks}");
            Measurement::new(OURS, case, "throughput, ratio", "ratio", vec![Some(*ratio), Some(*ratio)])
        };
        ratios.iter().map(of).collect()
    }

    #[test]
    fn one_number_of_tasks_is_enough_to_break_a_promise() {
        let judged = |ratios: &[(&str, f64)]| keeps_up_in(&quiet(ratios), "get", OURS, "throughput", |it| it >= 0.98);
        assert_eq!(judged(&[]), (String::new(), None));
        assert_eq!(judged(&[("1", 1.0), ("8", 0.98)]), ("1.00 at 1, 0.98 at 8".to_owned(), Some(true)));
        assert_eq!(judged(&[("1", 1.0), ("8", 0.97)]).1, Some(false));
        assert_eq!(keeps_up_in(&quiet(&[("1", 1.0)]), "get", OURS, "p50", |_| true).1, None, "another metric");
    }
}
