//! What the environment asks for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Error;
use crate::fault::Failure;
use crate::peer::Peer;

/// A family of measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// Each failure, each peer.
    Recovery,
    /// How recovery grows with waiters, candidates and pools.
    Growth,
    /// What no client can be faster than.
    Floor,
    /// What a transaction costs while nothing fails.
    Quiet,
    /// What a hundred pools ask of the servers while nobody uses them.
    Fleet,
}

impl Case {
    /// In the order in which they run.
    pub const ALL: [Self; 5] = [Self::Floor, Self::Recovery, Self::Growth, Self::Quiet, Self::Fleet];

    /// As `CASES=` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recovery => "recovery",
            Self::Growth => "growth",
            Self::Floor => "floor",
            Self::Quiet => "quiet",
            Self::Fleet => "fleet",
        }
    }
}

/// What `QUICK=1` measures unless told, within five minutes.
const QUICK_CASES: [Case; 3] = [Case::Floor, Case::Recovery, Case::Quiet];
const QUICK_FAILURES: [Failure; 2] = [Failure::DnsAll, Failure::Freeze];

/// The environment's variables, read.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `CASES=recovery,growth,floor,quiet,fleet`; all unless told, and all but growth and fleet with `QUICK=1`.
    pub cases: Vec<Case>,
    /// `FAILURES=kill,freeze`: these of the recovery case; all unless told, and two of them with `QUICK=1`.
    pub failures: Vec<Failure>,
    /// `PEERS=rust`, `all` or names; all unless told.
    pub peers: String,
    /// `QUICK=1`: few repetitions, a first answer.
    pub quick: bool,
    /// `ROUNDS=7`: repetitions of everything.
    pub rounds: Option<usize>,
    /// `SEED=1`: of all that is random in the harness.
    pub seed: u64,
    /// `WORKERS=8`: writers, and connections in each pool.
    pub workers: usize,
    /// `OUT=target/bench`: where results and report go.
    pub out: PathBuf,
}

impl Settings {
    /// Reads the process's environment.
    pub fn from_environment() -> Result<Self, Error> {
        Self::read(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let number = |name: &str| match variable(name) {
            Some(text) => text.parse().map(Some).map_err(|_| Error::setting(name, &text, "a whole number")),
            None => Ok(None),
        };
        let workers = number("WORKERS")?.unwrap_or(8);
        let rounds = number("ROUNDS")?;
        if workers == 0 || rounds == Some(0) {
            return Err(Error::setting("WORKERS or ROUNDS", "0", "1 or more"));
        }
        let quick = variable("QUICK").is_some_and(|value| value != "0");
        let (cases, failures) =
            if quick { (&QUICK_CASES[..], &QUICK_FAILURES[..]) } else { (&Case::ALL[..], &Failure::ALL[..]) };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
        Ok(Self {
            cases: chosen("CASES", variable("CASES"), &Case::ALL, cases, Case::name)?,
            failures: chosen("FAILURES", variable("FAILURES"), &Failure::ALL, failures, Failure::name)?,
            peers: variable("PEERS").unwrap_or_else(|| "all".to_owned()),
            quick,
            rounds: rounds.map(|rounds| usize::try_from(rounds).unwrap_or(usize::MAX)),
            seed: number("SEED")?.unwrap_or(1),
            workers: usize::try_from(workers).unwrap_or(usize::MAX),
            out: variable("OUT").map_or_else(|| root.join("target/bench"), PathBuf::from),
        })
    }

    /// Of these peers, those that were asked for. An unknown name is an error.
    pub fn choose(&self, peers: Vec<Box<dyn Peer>>) -> Result<Vec<Box<dyn Peer>>, Error> {
        let wanted: Vec<&str> = self.peers.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
        let is_group = |word: &str| matches!(word, "all" | "rust");
        for word in &wanted {
            if !is_group(word) && !peers.iter().any(|peer| peer.name() == *word) {
                let names: Vec<_> = peers.iter().map(|peer| peer.name()).collect();
                return Err(Error::setting("PEERS", word, &format!("all, rust, or some of {}", names.join(","))));
            }
        }
        let is_wanted = |peer: &dyn Peer| {
            let name = peer.name();
            wanted.iter().any(|word| *word == "all" || (*word == "rust" && peer.is_rust()) || *word == name)
        };
        Ok(peers.into_iter().filter(|peer| is_wanted(&**peer)).collect())
    }

    /// How long a worker may be without an acknowledgement, after the new primary has accepted a write, before it
    /// counts as stuck.
    pub fn stuck_after(&self) -> Duration {
        Duration::from_secs(if self.quick { 15 } else { 60 })
    }
}

fn chosen<T: Copy>(
    name: &str,
    value: Option<String>,
    all: &[T],
    untold: &[T],
    spelled: impl Fn(T) -> &'static str,
) -> Result<Vec<T>, Error> {
    let Some(value) = value else {
        return Ok(untold.to_vec());
    };
    let words: Vec<&str> = value.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    if let Some(unknown) = words.iter().find(|word| !all.iter().any(|one| spelled(*one) == **word)) {
        let names: Vec<_> = all.iter().map(|one| spelled(*one)).collect();
        return Err(Error::setting(name, unknown, &format!("some of {}", names.join(","))));
    }
    Ok(all.iter().copied().filter(|one| words.contains(&spelled(*one))).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "these are tests")]

    use super::*;

    fn settings(given: &[(&str, &str)]) -> Result<Settings, Error> {
        Settings::read(|name| given.iter().find(|(given, _)| *given == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn what_is_not_set_is_everything() {
        let all = settings(&[]).unwrap();
        assert_eq!((all.cases.len(), all.failures.len(), all.quick), (5, Failure::ALL.len(), false));
        assert_eq!(all.stuck_after(), Duration::from_mins(1));
    }

    #[test]
    fn quick_is_less_but_for_what_is_told() {
        let quick = settings(&[("QUICK", "1")]).unwrap();
        assert_eq!((quick.cases.len(), quick.failures.len()), (3, 2));
        let told = settings(&[("QUICK", "1"), ("CASES", "growth"), ("FAILURES", "vanish,kill")]).unwrap();
        assert_eq!((told.cases, told.failures), (vec![Case::Growth], vec![Failure::Kill, Failure::Vanish]));
        assert!(!settings(&[("QUICK", "0")]).unwrap().quick);
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        for given in [("CASES", "recovry"), ("FAILURES", "kill,flood"), ("ROUNDS", "many"), ("ROUNDS", "0")] {
            let error = settings(&[given]).unwrap_err().to_string();
            assert!(error.contains(given.0), "{error}");
        }
        let error = settings(&[("PEERS", "oracle")]).unwrap().choose(crate::rust_peers::peers()).err().unwrap();
        assert!(error.to_string().contains("deadpool-fast"), "{error}");
    }

    #[test]
    fn peers_are_chosen_by_name_and_by_group() {
        let names = |peers: &str| -> Vec<String> {
            let settings = settings(&[("PEERS", peers)]).unwrap();
            settings.choose(crate::rust_peers::peers()).unwrap().iter().map(|peer| peer.name()).collect()
        };
        assert_eq!(names("bb8,failover"), ["failover", "bb8"]);
        assert_eq!(names("rust").len(), 9);
    }
}
