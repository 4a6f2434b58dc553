//! Runs the scenario files in `tests/topology`. Each says what the servers answer, and which one must then be the
//! primary. `tests/topology/README.md` explains the format.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Debug, Write as _};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::*;

/// The system identifier of a server for which the scenario gives none.
const OURS: u64 = 77;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scenario {
    title: String,
    /// The rows in docs/scenarios.md that the scenario covers.
    covers: Vec<String>,
    about: String,
    /// The addresses in the configuration.
    #[serde(default)]
    members: Vec<u8>,
    /// The configuration contains a DNS name.
    #[serde(default)]
    name: bool,
    #[serde(default, deserialize_with = "duration")]
    patrol: Option<Duration>,
    #[serde(default, deserialize_with = "duration")]
    dead_after: Option<Duration>,
    #[serde(default)]
    warm_standbys: bool,
    steps: Vec<Spanned<Step>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Step {
    #[serde(default, deserialize_with = "duration")]
    at: Option<Duration>,

    server: Option<u8>,
    says: Option<Says>,
    timeline: Option<u32>,
    wal: Option<u64>,
    /// Where the server's last replay ended. A crash changes it.
    replayed: Option<u64>,
    /// The start of the server, as a number. A restart changes it.
    started: Option<i64>,
    cluster: Option<u64>,
    /// The server reports only its role, without identity and timeline.
    #[serde(default)]
    anonymous: bool,
    #[serde(default)]
    fence_pending: bool,
    fresh: Option<bool>,
    still_open: Option<bool>,

    suspect: Option<Suspect>,
    generation: Option<u64>,

    dns: Option<Vec<u8>>,
    dns_fails: Option<String>,

    expect: Option<Expect>,
}

#[derive(Clone, Copy, Deserialize)]
enum Says {
    #[serde(rename = "primary")]
    Primary,
    #[serde(rename = "standby")]
    Standby,
    #[serde(rename = "fenced")]
    Fenced,
    #[serde(rename = "promoting")]
    Promoting,
    #[serde(rename = "unreachable")]
    Unreachable,
    #[serde(rename = "timed out")]
    TimedOut,
    #[serde(rename = "full")]
    Full,
    #[serde(rename = "not now")]
    NotNow,
    #[serde(rename = "refused")]
    Refused,
    #[serde(rename = "not PostgreSQL")]
    NotPostgres,
}

#[derive(Clone, Copy, Deserialize)]
enum Suspect {
    #[serde(rename = "connection")]
    Connection,
    #[serde(rename = "read-only")]
    ReadOnly,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    /// The server whose connections are handed out, or 0 for none.
    primary: Option<u8>,
    generation: Option<u64>,
    /// All generations that have ended so far.
    ended: Option<Vec<u64>>,
    /// For each server: why its last answer does not make it the primary.
    refused: Option<BTreeMap<String, String>>,
    /// All notices that the operator has got so far.
    told: Option<Vec<String>>,
    /// The servers that were asked in the step before this one or since.
    asked: Option<BTreeSet<u8>>,
    asked_freshly: Option<BTreeSet<u8>>,
    asked_dns: Option<bool>,
    /// The servers that the next search would ask.
    candidates: Option<BTreeSet<u8>>,
    /// Callers fail immediately because every server refuses the pool.
    callers_refused: Option<bool>,
}

/// `"120 ms"` or `"3 s"`.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let parsed = text.split_once(' ').and_then(|(number, unit)| {
        let number: u64 = number.parse().ok()?;
        match unit {
            "ms" => Some(Duration::from_millis(number)),
            "s" => Some(Duration::from_secs(number)),
            _ => None,
        }
    });
    parsed.map(Some).ok_or_else(|| D::Error::custom(format!("`{text}` is no time; write \"120 ms\" or \"3 s\"")))
}

fn address(n: u8) -> Address {
    Address::Tcp(SocketAddr::from(([127, 0, 0, n], 5432)))
}

fn endpoint(n: u8) -> Endpoint {
    Endpoint { host: Some(Arc::from("pg.internal")), address: address(n) }
}

fn number(address: &Address) -> u8 {
    match address {
        Address::Tcp(SocketAddr::V4(address)) => address.ip().octets()[3],
        _ => unreachable!("servers of scenarios have numbers"),
    }
}

fn lsn(position: u64) -> Lsn {
    format!("0/{position:X}").parse().expect("an LSN")
}

impl Step {
    fn answer(&self, server: u8, says: Says) -> Result<ServerReport, ProbeFailure> {
        let failed = |kind: FailureKind| Err(ProbeFailure::new(kind, format!("{kind:?}")));
        let (in_recovery, read_only, default_read_only) = match says {
            Says::Primary => (false, false, false),
            Says::Standby => (true, true, false),
            Says::Fenced => (false, true, true),
            Says::Promoting => (false, true, false),
            Says::Unreachable => return failed(FailureKind::Unreachable),
            Says::TimedOut => return failed(FailureKind::TimedOut),
            Says::Full => return failed(FailureKind::Full),
            Says::NotNow => return failed(FailureKind::NotNow),
            Says::Refused => return failed(FailureKind::Refused),
            Says::NotPostgres => return failed(FailureKind::NotPostgres),
        };
        let known = !self.anonymous;
        Ok(ServerReport {
            in_recovery,
            read_only,
            default_read_only,
            fence_pending: self.fence_pending,
            system_identifier: known.then(|| self.cluster.unwrap_or(OURS)),
            started_at: known.then(|| self.started.unwrap_or(i64::from(server))),
            timeline: self.timeline,
            wal: self.wal.map(lsn),
            replayed: self.replayed.map(lsn),
            stats_reset: None,
            checkpointed: None,
            evidence: None,
            withheld: [Part::Identity, Part::StartTime, Part::Timeline].into_iter().filter(|_| !known).collect(),
        })
    }

    /// Returns what is wrong with the step itself.
    fn mistake(&self, started: bool, named: bool) -> Option<&'static str> {
        let about_a_report = self.timeline.is_some()
            || self.wal.is_some()
            || self.replayed.is_some()
            || self.started.is_some()
            || self.cluster.is_some()
            || self.anonymous
            || self.fence_pending;
        let reports = matches!(self.says, Some(Says::Primary | Says::Standby | Says::Fenced | Says::Promoting));
        let inputs = u8::from(self.server.is_some())
            + u8::from(self.suspect.is_some())
            + u8::from(self.dns.is_some() || self.dns_fails.is_some());
        let mistakes = [
            (!started && self.at.is_none(), "the first step needs `at`"),
            (inputs > 1, "one thing happens in a step: a server's answer, a suspicion, or an answer of DNS"),
            (self.server.is_some() != self.says.is_some(), "`server` and `says` go together"),
            (self.suspect.is_some() != self.generation.is_some(), "`suspect` and `generation` go together"),
            (self.says.is_none() && (self.fresh.is_some() || self.still_open.is_some()), "`fresh` without `says`"),
            (about_a_report && !reports, "only a server that reports its role can say more"),
            (matches!(self.says, Some(Says::Standby)) && self.timeline.is_some(), "a standby tells no timeline"),
            (
                matches!(self.says, Some(Says::Primary | Says::Fenced | Says::Promoting))
                    && self.timeline.is_none() != self.anonymous,
                "a server that is not in recovery tells its `timeline`, unless it is `anonymous`",
            ),
            ((self.dns.is_some() || self.dns_fails.is_some()) && !named, "DNS answers, but there is no `name`"),
            (inputs == 0 && self.expect.is_none(), "nothing happens, and nothing is expected"),
        ];
        mistakes.into_iter().find_map(|(wrong, what)| wrong.then_some(what))
    }
}

/// A topology, its clock, and what it has done so far.
struct Run {
    topology: Topology,
    began: Instant,
    now: Instant,
    asking: BTreeMap<u8, bool>,
    resolving: bool,
    ended: Vec<u64>,
    told: Vec<String>,
    asked: BTreeSet<u8>,
    asked_freshly: BTreeSet<u8>,
    asked_dns: bool,
    /// The last generation that began, and its timeline.
    newest: (u64, Option<u32>),
}

impl Run {
    fn new(scenario: &Scenario) -> Self {
        let settings = Settings {
            patrol: scenario.patrol.unwrap_or(Duration::from_secs(5)),
            dead_after: scenario.dead_after.unwrap_or(Duration::from_secs(20)),
            warm_standbys: scenario.warm_standbys,
            ..Settings::default()
        };
        let now = Instant::now();
        let members = scenario.members.iter().copied().map(endpoint).collect();
        Self {
            topology: Topology::new(settings, members, usize::from(scenario.name), 1, now),
            began: now,
            now,
            asking: BTreeMap::new(),
            resolving: false,
            ended: Vec::new(),
            told: Vec::new(),
            asked: BTreeSet::new(),
            asked_freshly: BTreeSet::new(),
            asked_dns: false,
            newest: (0, None),
        }
    }

    fn advance(&mut self, at: Duration) -> Result<(), String> {
        let until = self.began + at;
        if until < self.now {
            return Err("time runs backwards".to_owned());
        }
        while let Some(next) = self.topology.wake_at().filter(|next| *next <= until) {
            self.now = self.now.max(next);
            self.poll()?;
        }
        self.now = until;
        self.poll()
    }

    fn poll(&mut self) -> Result<(), String> {
        for action in self.topology.poll(self.now) {
            match action {
                Action::Resolve(_) => (self.resolving, self.asked_dns) = (true, true),
                Action::Probe { endpoint, fresh, .. } => {
                    let server = number(&endpoint.address);
                    self.asking.insert(server, fresh);
                    self.asked.insert(server);
                    if fresh {
                        self.asked_freshly.insert(server);
                    }
                }
                Action::End { id, .. } => self.ended.push(id.get()),
                Action::Begin { primary, .. } => {
                    let begun = (primary.id.get(), primary.report.timeline);
                    if begun.0 <= self.newest.0 || begun.1 < self.newest.1 {
                        return Err(format!("generation and timeline go back: {:?} after {:?}", begun, self.newest));
                    }
                    if (1..begun.0).any(|id| !self.ended.contains(&id)) {
                        return Err(format!("generation {} began while an older one lives", begun.0));
                    }
                    self.newest = begun;
                }
                Action::Notice(notice) => self.told.push(told(&notice)),
                // The view shows suspensions and resumptions.
                _ => {}
            }
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        if let Some(at) = step.at {
            self.advance(at)?;
        }
        if let (Some(server), Some(says)) = (step.server, step.says) {
            let fresh = step.fresh.unwrap_or(true);
            match self.asking.remove(&server) {
                None => return Err(format!("server {server} answers, but it was not asked")),
                Some(true) if !fresh => return Err(format!("server {server} was asked on a fresh session")),
                Some(_) => {}
            }
            let result = step.answer(server, says);
            let still_open = step.still_open.unwrap_or(result.is_ok());
            let address = address(server);
            let beside =
                fresh && self.topology.beside.asking && self.topology.primary_address().as_ref() == Some(&address);
            // A server that is gone does not answer on any session.
            let gone = beside && !still_open && self.topology.members[&address].asking;
            let both = gone.then(|| result.clone());
            self.topology.probed(self.now, &Probed { address: address.clone(), result, fresh, still_open, beside });
            if let Some(result @ Err(_)) = both {
                self.topology.probed(self.now, &Probed { address, result, fresh: false, still_open, beside: false });
            }
        }
        if let (Some(suspect), Some(generation)) = (step.suspect, step.generation) {
            let suspicion = match suspect {
                Suspect::Connection => Suspicion::Connection,
                Suspect::ReadOnly => Suspicion::ReadOnly,
            };
            self.topology.suspected(self.now, GenerationId(generation), suspicion);
        }
        if step.dns.is_some() || step.dns_fails.is_some() {
            if !std::mem::take(&mut self.resolving) {
                return Err("DNS answers, but it was not asked".to_owned());
            }
            let found = step.dns.iter().flatten().copied().map(endpoint).collect();
            let answer = match &step.dns_fails {
                Some(why) if why.starts_with("NXDOMAIN") => NameAnswer::Unknown(why.clone()),
                Some(why) => NameAnswer::Failed(why.clone()),
                None => NameAnswer::Addresses { endpoints: found, partial: None },
            };
            self.topology.resolved(self.now, 0, answer);
        }
        self.poll()?;
        step.expect.as_ref().map_or(Ok(()), |expect| self.check(expect))?;
        self.asked.clear();
        self.asked_freshly.clear();
        self.asked_dns = false;
        Ok(())
    }

    fn check(&self, expect: &Expect) -> Result<(), String> {
        let view = self.topology.view();
        let (primary, callers_refused) = match &view.state {
            State::Primary { endpoint, .. } => (number(&endpoint.address), false),
            State::Searching { refused } => (0, refused.is_some()),
            State::Closed | State::Asleep => unreachable!("a topology is never closed, and nobody lets it sleep here"),
        };
        let candidates = self.topology.candidates();
        let refused = |candidate: &CandidateReport| match &candidate.answer {
            Some(Answer::Refused(_, refusal)) => Some((number(&candidate.endpoint.address).to_string(), word(refusal))),
            _ => None,
        };
        let mut problem = String::new();
        differ(&mut problem, "primary", expect.primary.as_ref(), &primary);
        differ(&mut problem, "generation", expect.generation.as_ref(), &view.generation.get());
        differ(&mut problem, "ended", expect.ended.as_ref(), &self.ended);
        differ(&mut problem, "refused", expect.refused.as_ref(), &candidates.iter().filter_map(refused).collect());
        differ(&mut problem, "told", expect.told.as_ref(), &self.told);
        differ(&mut problem, "asked", expect.asked.as_ref(), &self.asked);
        differ(&mut problem, "asked_freshly", expect.asked_freshly.as_ref(), &self.asked_freshly);
        differ(&mut problem, "asked_dns", expect.asked_dns.as_ref(), &self.asked_dns);
        let numbers = candidates.iter().map(|candidate| number(&candidate.endpoint.address)).collect();
        differ(&mut problem, "candidates", expect.candidates.as_ref(), &numbers);
        differ(&mut problem, "callers_refused", expect.callers_refused.as_ref(), &callers_refused);
        if problem.is_empty() { Ok(()) } else { Err(format!("{problem}; the last change: {}", view.changed.why)) }
    }
}

fn differ<T: PartialEq + Debug>(problem: &mut String, what: &str, expected: Option<&T>, found: &T) {
    if let Some(expected) = expected.filter(|expected| *expected != found) {
        let comma = if problem.is_empty() { "" } else { ", " };
        let _ = write!(problem, "{comma}{what} is {found:?} and should be {expected:?}");
    }
}

fn word(refusal: &Refusal) -> String {
    let word = match refusal {
        Refusal::Standby => "standby",
        Refusal::Fenced => "fenced",
        Refusal::Promoting => "promoting",
        Refusal::OtherCluster { .. } => "other cluster",
        Refusal::Zombie { .. } => "zombie",
        Refusal::Unidentified => "unidentified",
        // A variant that this table does not contain has its own name.
        other => return format!("{other:?}"),
    };
    word.to_owned()
}

fn told(notice: &Notice) -> String {
    match notice {
        Notice::Refused(address, refusal) => format!("{} refused: {}", number(address), word(refusal)),
        Notice::TwoPrimaries(address) => format!("{} is a second primary", number(address)),
        Notice::Withheld(address, parts) => format!("{} keeps back {parts}", number(address)),
        Notice::TooManyCandidates(_) => "too many candidates".to_owned(),
        Notice::StillSearching(_) => "still searching".to_owned(),
        Notice::ClusterAccepted { .. } => "another cluster is accepted".to_owned(),
    }
}

/// Runs a scenario. Returns it, or the error in it or in the topology, with the line.
fn run(name: &str, text: &str) -> Result<Scenario, String> {
    let line = |offset: usize| text[..offset.min(text.len())].matches('\n').count() + 1;
    let scenario: Scenario = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(1, |span| line(span.start));
        format!("{name}:{at}: {}", error.message())
    })?;
    if scenario.title.is_empty() || scenario.about.is_empty() || scenario.covers.is_empty() {
        return Err(format!("{name}:1: title, about or covers is empty"));
    }
    if !scenario.steps.iter().any(|step| step.get_ref().expect.is_some()) {
        return Err(format!("{name}:1: nothing is expected"));
    }
    let mut run = Run::new(&scenario);
    for (index, step) in scenario.steps.iter().enumerate() {
        let at = line(step.span().start);
        if let Some(mistake) = step.get_ref().mistake(index > 0, scenario.name) {
            return Err(format!("{name}:{at}: {mistake}"));
        }
        run.step(step.get_ref()).map_err(|problem| format!("{name}:{at}: {problem}"))?;
    }
    Ok(scenario)
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/topology")
}

#[test]
fn every_scenario_file_holds() {
    let mut problems = Vec::new();
    let mut titles = BTreeSet::new();
    let mut files: Vec<PathBuf> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for path in files.iter().filter(|path| path.extension().is_some_and(|extension| extension == "toml")) {
        let name = path.file_name().unwrap().to_string_lossy();
        match run(&name, &fs::read_to_string(path).unwrap()) {
            Ok(scenario) if !titles.insert(scenario.title.clone()) => {
                problems.push(format!("{name}:1: another file has the title `{}`", scenario.title));
            }
            Ok(_) => {}
            Err(problem) => problems.push(problem),
        }
    }
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
    assert!(titles.len() >= 20, "only {} scenarios were found", titles.len());
}

#[test]
fn mistakes_in_a_file_are_named_with_their_line() {
    let head = "title = 'a'\ncovers = ['R1']\nabout = 'b'\nmembers = [1]\n";
    let first = "{ at = '1 ms', server = 1, says = 'primary', timeline = 1, expect = { primary = 1 } }";
    assert!(run("x", &format!("{head}steps = [\n{first},\n]")).is_ok());
    for (text, expected) in [
        (format!("memers = [2]\n{head}steps = [\n{first}]"), "x:1: unknown field `memers`"),
        (format!("{head}steps = [\n{}]", first.replace("says", "syas")), "x:6: unknown field `syas`"),
        (format!("{head}steps = [\n{}]", first.replace("'primary'", "'pirmary'")), "x:6: unknown variant `pirmary`"),
        (format!("{head}steps = [\n{}]", first.replace("{ primary", "{ primray")), "x:6: unknown field `primray`"),
        (format!("{head}steps = [\n{}]", first.replace("1 ms", "1 min")), "x:6: `1 min` is no time"),
        (format!("{head}steps = [\n{}]", first.replace("timeline = 1,", "")), "x:6: a server that is not in recovery"),
        (
            format!("{head}steps = [\n{}]", first.replace("server = 1", "server = 2")),
            "x:6: server 2 answers, but it was",
        ),
        (format!("{head}steps = [\n{first},\n\n{first}]"), "x:8: server 1 answers, but it was not asked"),
        (
            format!("{head}steps = [\n{}]", first.replace("{ primary = 1", "{ primary = 3")),
            "x:6: primary is 1 and should",
        ),
        (format!("{head}steps = [\n{}]", first.replace(", expect = { primary = 1 }", "")), "x:1: nothing is expected"),
        (format!("{head}steps = ["), "x:5: "),
    ] {
        let problem = run("x", &text).err().unwrap_or_else(|| panic!("taken: {text}"));
        assert!(problem.starts_with(expected), "`{problem}` is not `{expected}…`");
    }
}
