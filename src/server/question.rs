//! Asks a server what it is, and reads the answer. Each part of the answer may be missing.

use std::sync::{Arc, OnceLock};

use tokio_postgres::{Client, Error};

use super::failure;
use super::rows::rows;
use super::withheld::{self, Withheld};
use crate::classify::{Verdict, about_a_part, classify, cut_off, explain, not_offered};
use crate::sync::log_safely;
use crate::topology::{
    Address, BadReport, FailureKind, ProbeFailure, PromotionWait, Question, Refused, ServerReport, ServerSession,
    wait_for_promotion,
};

/// Asks servers what they are.
#[derive(Default)]
pub(crate) struct Questions {
    /// The parts that servers do not let this role read, by server.
    parts: Withheld<Refused>,
    /// The servers that did not let this role wait for a promotion.
    promotion_wait: Withheld<()>,
}

impl Questions {
    /// Asks the question. This takes one round trip, unless a part of the question is refused. Then the pool finds out
    /// the refused parts, and leaves them out for a while. `session` receives what the server calls this session, if
    /// the question asks for that.
    pub(crate) async fn ask(
        &self,
        address: &Address,
        client: &Client,
        question: Question,
        session: &OnceLock<ServerSession>,
    ) -> Result<ServerReport, ProbeFailure> {
        let known = self.parts.of(address).unwrap_or_default();
        let mut refused = known;
        for last in [false, false, true] {
            let error = match rows(client, &question.sql(refused)).await {
                Err(error) if about_a_part(&error) => error,
                answer => {
                    if let Some(told) = answer.as_ref().ok().and_then(|rows| ServerSession::of(rows)) {
                        let _ = session.set(told);
                    }
                    let report = read(question, refused, answer);
                    match &report {
                        Ok(_) if refused != known => self.parts.note(address, refused, Refused::and),
                        // The answer may be unreadable because a part was left out, so the next question asks for
                        // everything.
                        Err(_) => self.parts.forget(address),
                        Ok(_) => {}
                    }
                    return report;
                }
            };
            log_safely(|| tracing::debug!("a part of the question is refused: {}", explain(&error)));
            refused = refused.and(withheld::look_for(client, question, refused).await);
            if last {
                // Ask only for what needs no privilege. This is not remembered, because it is unknown what the server
                // really refuses.
                refused = refused.and(Refused::ALL);
            }
        }
        read(question, refused, rows(client, &question.sql(refused)).await)
    }

    /// Asks on a session that was opened earlier. The question is sent together with the promotion wait, but in a
    /// transaction of its own, because a transaction that began on a standby stays read-only. A server may not wait,
    /// because a privilege is missing or a time limit ends the wait. Such a server is asked without the wait for a
    /// while, because `transaction_timeout` would end the session each time.
    pub(crate) async fn ask_after(
        &self,
        promotion_wait: Option<PromotionWait>,
        address: &Address,
        client: &Client,
    ) -> Result<ServerReport, ProbeFailure> {
        let waiting = async {
            let Some(promotion_wait) = promotion_wait.filter(|_| self.promotion_wait.of(address).is_none()) else {
                return;
            };
            let Err(error) = rows(client, &wait_for_promotion(promotion_wait)).await else { return };
            log_safely(|| tracing::debug!("the server does not wait for its promotion: {}", explain(&error)));
            if not_offered(&error) || cut_off(&error) {
                self.promotion_wait.note(address, (), |(), ()| ());
            }
        };
        let untold = OnceLock::new();
        let ((), report) = tokio::join!(biased; waiting, self.ask(address, client, Question::Again, &untold));
        report
    }
}

fn read(
    question: Question,
    refused: Refused,
    answer: Result<Vec<Vec<Option<String>>>, Error>,
) -> Result<ServerReport, ProbeFailure> {
    let nonsense =
        |bad: BadReport| ProbeFailure::new(FailureKind::NotPostgres, bad.to_string()).caused_by(Arc::new(bad));
    question.read(refused, &answer.map_err(no_report)?).map_err(nonsense)
}

/// Describes the error of a question on an open session.
fn no_report(error: Error) -> ProbeFailure {
    let spoke = error.as_db_error().is_some();
    match classify(&error) {
        // The session is still usable, so the server lives.
        verdict @ (Verdict::Application | Verdict::Aborted | Verdict::Conflict | Verdict::ReadOnly) if spoke => {
            let mut failure = failure(verdict, error);
            failure.kind = FailureKind::Errored;
            failure
        }
        verdict => failure(verdict, error),
    }
}
