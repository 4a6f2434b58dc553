//! One look at all servers, and what a pool would do with them.

use serde_json::{Value, json};
use tokio_postgres_failover::view::CandidateReport;
use tokio_postgres_failover::{Error, Pool};

use crate::table;
use crate::verdict::verdict;

pub(crate) struct Look {
    pub(crate) candidates: Vec<CandidateReport>,
    dns_failure: Option<String>,
    /// Whether a pool would use a primary.
    pub(crate) good: bool,
    pub(crate) sentence: String,
}

impl Look {
    /// `refused`: the error of a call, if there was one.
    pub(crate) fn at(pool: &Pool, refused: Option<Error>) -> Self {
        let mut candidates = pool.candidates();
        candidates.sort_by(|a, b| a.endpoint.address.cmp(&b.endpoint.address));
        let (good, sentence) = verdict(pool, &candidates, refused);
        Self { candidates, dns_failure: pool.dns_failure(), good, sentence }
    }

    /// What is printed, line by line.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = table::lines(&self.candidates);
        if !lines.is_empty() {
            lines.push(String::new());
        }
        lines.extend(self.dns_failure.as_ref().map(|failure| format!("DNS: {failure}")));
        lines.push(self.sentence.clone());
        lines.iter().map(|line| table::clean(line)).collect()
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "would_use_a_primary": self.good,
            "verdict": self.sentence,
            "dns_failure": self.dns_failure,
            "servers": table::json(&self.candidates),
        })
    }
}

#[cfg(test)]
impl Look {
    pub(crate) fn without_servers(sentence: &str) -> Self {
        Self { candidates: Vec::new(), dns_failure: None, good: false, sentence: sentence.to_owned() }
    }
}
