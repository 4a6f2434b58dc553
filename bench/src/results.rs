//! What a case came to, as a file. The report is made of these files alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::Error;
use crate::measurement::Measurement;
use crate::peer::Peer;
use crate::versions::Machine;

/// A peer as it was measured, or why it was not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerInfo {
    /// [`Peer::name`].
    pub name: String,
    /// [`Peer::version`].
    pub version: String,
    /// [`Peer::config`].
    pub config: String,
    /// Why it was left out of this case.
    pub missing: Option<String>,
}

impl PeerInfo {
    /// Of a peer that takes part, or does not.
    pub fn of(peer: &dyn Peer, missing: Option<String>) -> Self {
        Self { name: peer.name(), version: peer.version(), config: peer.config(), missing }
    }
}

/// One run of one case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Results {
    /// `floor`, `recovery/kill`, `growth/waiters`, `quiet`, …
    pub case: String,
    /// What happened, in a sentence.
    pub explained: String,
    /// The command that repeats it.
    pub command: String,
    /// When it ended, in seconds since 1970.
    pub at: u64,
    /// Where it ran.
    pub machine: Machine,
    /// How often everything was repeated.
    pub rounds: usize,
    /// Of all randomness in the harness.
    pub seed: u64,
    /// Who was measured, and who was not.
    pub peers: Vec<PeerInfo>,
    /// What a reader has to know.
    pub notes: Vec<String>,
    /// The figures.
    pub measurements: Vec<Measurement>,
    /// Of each peer: what its callers were told, and how often.
    pub told: BTreeMap<String, BTreeMap<String, usize>>,
}

impl Results {
    /// Writes `out/results/CASE.json` in place of an earlier run's.
    pub fn write(&self, out: &Path) -> Result<PathBuf, Error> {
        let folder = out.join("results");
        std::fs::create_dir_all(&folder).map_err(Error::file(&folder))?;
        let path = folder.join(format!("{}.json", self.case.replace('/', "-")));
        let text =
            serde_json::to_string_pretty(self).map_err(|source| Error::Results { path: path.clone(), source })?;
        std::fs::write(&path, text + "\n").map_err(Error::file(&path))?;
        Ok(path)
    }

    /// Every results file, by the name of its case.
    pub fn read_all(out: &Path) -> Result<Vec<Self>, Error> {
        let folder = out.join("results");
        let mut all = Vec::new();
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(all),
            Err(error) => return Err(Error::file(&folder)(error)),
        };
        for entry in entries {
            let path = entry.map_err(Error::file(&folder))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let text = std::fs::read_to_string(&path).map_err(Error::file(&path))?;
                all.push(serde_json::from_str(&text).map_err(|source| Error::Results { path, source })?);
            }
        }
        all.sort_unstable_by(|one: &Self, other: &Self| one.case.cmp(&other.case));
        Ok(all)
    }

    /// The measurement of one metric of one peer.
    pub fn of(&self, peer: &str, metric: &str) -> Option<&Measurement> {
        self.measurements.iter().find(|measured| measured.peer == peer && measured.metric == metric)
    }
}

/// One object per measurement of all results.
pub fn summary(all: &[Results]) -> Value {
    let measurements = all.iter().flat_map(|results| &results.measurements);
    Value::Array(
        measurements
            .map(|measured| {
                let spread = measured.spread();
                json!({
                    "peer": measured.peer,
                    "case": measured.case,
                    "metric": measured.metric,
                    "unit": measured.unit,
                    "repetitions": measured.samples.len(),
                    "median": rounded(spread.median),
                    "min": rounded(spread.min),
                    "max": rounded(spread.max),
                    "ratio": rounded(measured.ratio()),
                    "ratio_to": measured.base.as_ref().map(|base| base.name.as_str()),
                })
            })
            .collect(),
    )
}

/// Three digits behind the point: a microsecond.
fn rounded(value: Option<f64>) -> Option<f64> {
    value.map(|value| (value * 1000.0).round() / 1000.0)
}
