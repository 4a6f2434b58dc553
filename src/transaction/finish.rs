//! How a transaction is finished: the messages that commit it or roll it back, and what their answers prove.
//!
//! Three things can go wrong at the end. The server may have aborted the transaction: then it turns COMMIT into a
//! ROLLBACK. The closure may have ended the transaction itself: then COMMIT ends another transaction, or none. Or an
//! error or a lost connection comes after COMMIT was carried out. So COMMIT is the last of several statements in one
//! message. The first one fails in an aborted transaction. If the pool has read every answer that the closure got, the
//! answers show whether the closure has ended the transaction. Otherwise a second statement fails in every transaction
//! except the pool's, and in the first such message of a session, one more statement prepares that one. The pool counts
//! the statements that were carried out. Pure functions decide what an answer means. The tests are in
//! `tests/it/commit/finish.rs`.

use std::borrow::Cow;
use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, timeout_at};
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use crate::classify::{commit_refused, is_the_servers, no_transaction, not_offered, not_ours, not_prepared};
use crate::commit::Nonce;
use crate::error::Ending;
use crate::pool::Check;
use crate::server::POOLS_COMMIT;

/// How long the rest of an answer may take after an error. A server sends the rest immediately.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

/// BEGIN sets this for one transaction. The value disappears at the end of the transaction, whether it commits or not.
pub(super) const OPEN: &str = "SET LOCAL tokio_postgres_failover.transaction = off";

/// BEGIN sets this if a transaction has no mark and may write. The value is unique to the transaction. It disappears
/// with a rollback, and stays on the session after a commit, whether the pool or the closure committed.
const RUN: &str = "tokio_postgres_failover.run";

pub(super) fn remember(run: Nonce) -> String {
    format!("SET {RUN} = '{run}'")
}

/// The name of the prepared check. Change the number whenever the text changes, because different versions of this
/// crate may share a session behind a proxy.
const PREPARED: &str = "tokio_postgres_failover_check_2";

/// How COMMIT's message looks for its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// It does not look: the answers to the closure have shown that the transaction is open.
    Not,
    /// It prepares the check on this session, and executes it.
    Prepare,
    /// It executes the check that the session has prepared.
    Execute,
    /// It sends the check as text. `Check` says which functions the check may call.
    Plain(Check),
}

impl Look {
    /// The number of statements in the message. COMMIT is the last one.
    fn statements(self) -> usize {
        match self {
            Self::Not => 2,
            Self::Execute | Self::Plain(_) => 3,
            Self::Prepare => 4,
        }
    }

    fn is_prepared(self) -> bool {
        matches!(self, Self::Prepare | Self::Execute)
    }

    /// Returns whether the pool compares the answer's row itself, because the statement does not fail on a wrong value.
    fn is_shown(self) -> bool {
        self == Self::Plain(Check::ByShow)
    }
}

/// How the message of COMMIT recognises the pool's transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::enum_variant_names, reason = "they read on from the name")]
pub(super) enum Known {
    /// By the transaction id that its mark has assigned.
    ById(u64),
    /// By the setting of [`OPEN`]. After a rollback, the value of [`remember`] shows whether the closure had committed
    /// before.
    BySetting(Nonce),
    /// By the same setting, for a transaction that only reads: a wrong value does not stop the COMMIT. The statement
    /// needs no planning and no snapshot. A deferrable transaction would wait for a snapshot.
    ByShow,
    /// By nothing: the pool has read each answer on the session, and these show whether it is open.
    ByAnswers,
}

impl Known {
    /// Returns COMMIT in one message with the statements that check its conditions.
    ///
    /// The first statement fails in an aborted transaction (25P02). It also makes the server send its warning if the
    /// wait for a synchronous standby is cancelled, whatever the session's `client_min_messages` was.
    pub(super) fn commit(self, look: Look) -> Cow<'static, str> {
        let looks = match (self, look) {
            (_, Look::Not) => return UNCHECKED_COMMIT.into(),
            (Self::ById(xid), Look::Execute) => format!("EXECUTE {PREPARED} ('{xid}')"),
            (Self::ById(xid), Look::Prepare) => {
                let insists = insists("pg_current_xact_id_if_assigned()", "$1");
                format!("PREPARE {PREPARED} (pg_catalog.xid8) AS {insists}; EXECUTE {PREPARED} ('{xid}')")
            }
            (_, Look::Execute | Look::Prepare) => self.looks(Check::Full),
            (_, Look::Plain(check)) => self.looks(check),
        };
        format!("{POOLS_COMMIT}{looks}; COMMIT").into()
    }

    fn looks(self, check: Check) -> String {
        let own = match (self, check) {
            (Self::ByShow | Self::ByAnswers, _) | (_, Check::ByShow) => None,
            (Self::ById(xid), Check::Prepared | Check::Full) => {
                Some(("pg_current_xact_id_if_assigned()", xid.to_string()))
            }
            // The role may call this function, as the mark has called it. In another transaction it assigns an id that
            // differs from this one.
            (Self::ById(xid), Check::Other) => Some(("pg_current_xact_id()", xid.to_string())),
            (Self::BySetting(_), Check::Prepared | Check::Full) => {
                Some(("current_setting('tokio_postgres_failover.transaction', true)", "off".to_owned()))
            }
            // This fails if the setting was never set.
            (Self::BySetting(_), Check::Other) => {
                Some(("current_setting('tokio_postgres_failover.transaction')", "off".to_owned()))
            }
        };
        own.map_or_else(
            || "SHOW tokio_postgres_failover.transaction".to_owned(),
            |(asked, expected)| insists(asked, &format!("'{expected}'")),
        )
    }

    /// Returns ROLLBACK, followed by the question `role` if there is one, and by [`Self::status`]. If the closure has
    /// run (`known`) and no transaction is open, then the closure has ended it. In that case the first statement fails
    /// (25P01).
    pub(super) fn roll_back(known: Option<Self>, role: Option<&str>) -> String {
        let mut sql = if known.is_some() { "ROLLBACK AND CHAIN; ROLLBACK" } else { "ROLLBACK" }.to_owned();
        for question in role.map(str::to_owned).into_iter().chain(known.and_then(Self::status)) {
            sql.push_str("; ");
            sql.push_str(&question);
        }
        sql
    }

    /// Returns SQL that asks for the transaction's outcome. `None` if the transaction leaves nothing behind that shows
    /// it.
    pub(super) fn status(self) -> Option<String> {
        match self {
            Self::ById(xid) => Some(format!("SELECT pg_catalog.pg_xact_status('{xid}')")),
            Self::BySetting(_) => Some(format!("SHOW {RUN}")),
            Self::ByShow | Self::ByAnswers => None,
        }
    }

    /// Returns whether the answer to [`Known::status`] is the value that only a commit leaves on the session.
    fn has_left(self, status: Option<&str>) -> bool {
        matches!((self, status), (Self::BySetting(run), Some(word)) if word == run.to_string())
    }
}

/// COMMIT's message without a check: [`POOLS_COMMIT`], and COMMIT.
const UNCHECKED_COMMIT: &str = "SET LOCAL client_min_messages = warning; COMMIT";

/// Returns SQL that fails with a division by zero unless the function returns the expected value. The quotient is
/// compared with a number, because a planner may know without a division that an expression is not NULL.
fn insists(function: &str, expected: &str) -> String {
    format!(
        "SELECT WHERE (1 OPERATOR(pg_catalog./) coalesce(pg_catalog.{function} \
         OPERATOR(pg_catalog.=) {expected}, false)::pg_catalog.int4) OPERATOR(pg_catalog.=) 2"
    )
}

/// The answer to a message of several statements.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// The number of statements that were carried out.
    pub(super) completed: usize,
    /// The first value of each row. A row without columns has none.
    pub(super) values: Vec<Option<String>>,
    /// The first error.
    pub(super) error: Option<Error>,
    /// The server has answered the whole message, and is ready for the next one.
    pub(super) ready: bool,
}

impl Answer {
    /// Sends the message and waits for the end of its answer. If the future is dropped, a message that was already sent
    /// is still carried out, as with the driver.
    pub(super) async fn to(client: &Client, sql: &str) -> Self {
        let mut answer = Self::default();
        let messages = match client.simple_query_raw(sql).await {
            Ok(messages) => messages,
            Err(error) => return Self { error: Some(error), ..answer },
        };
        let (mut messages, mut until) = (pin!(messages), None);
        loop {
            let next = match until {
                None => messages.next().await,
                Some(until) => match timeout_at(until, messages.next()).await {
                    Ok(next) => next,
                    Err(_) => return answer,
                },
            };
            let Some(message) = next else { break };
            match message {
                Ok(_) if answer.error.is_some() => {}
                Ok(SimpleQueryMessage::CommandComplete(_)) => answer.completed += 1,
                Ok(SimpleQueryMessage::Row(row)) if !row.is_empty() => {
                    answer.values.push(row.try_get(0).ok().flatten().map(str::to_owned));
                }
                Ok(_) => {}
                Err(error) => {
                    let more_may_follow = error.as_db_error().is_some();
                    answer.error.get_or_insert(error);
                    if !more_may_follow {
                        return answer;
                    }
                    until.get_or_insert_with(|| Instant::now() + ENDS_WITHIN);
                }
            }
        }
        answer.ready = true;
        answer
    }
}

impl Answer {
    /// For the answer to [`Known::roll_back`]: returns whether the rollback succeeded, and the only error is that the
    /// server does not offer a question that follows it.
    pub(super) fn left_idle(&self) -> bool {
        self.completed >= 2 && self.error.as_ref().is_some_and(not_offered)
    }
}

/// What the answer to COMMIT's message proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CommitProof {
    /// The transaction is committed. `answered`: the session answered completely, and can be used again.
    Committed {
        answered: bool,
    },
    /// The open transaction was not the one that the pool began. `committed`: COMMIT has committed that other one.
    NotOurs {
        committed: bool,
    },
    /// The server did not commit the transaction, and never will. `over`: it is already rolled back.
    Refused {
        over: bool,
    },
    /// The role may not run the check, so COMMIT did not run.
    Unchecked,
    /// The prepared check was missing, so COMMIT did not run.
    Unprepared,
    Nothing,
}

impl Known {
    /// Decides what this answer to [`Known::commit`] proves. Only COMMIT's own answer proves a commit, not the lack of
    /// an error: a proxy may keep back a message that begins with SET, and answer that alone.
    pub(super) fn proof(self, look: Look, answer: &Answer) -> CommitProof {
        let (statements, before) = (look.statements(), look.statements() - 1);
        let shown = answer.values.first().and_then(Option::as_deref);
        let insisted = self != Self::ByShow && !look.is_shown() && look != Look::Not;
        // If the number of completed statements is in this range, the check is the statement that failed.
        let looked = 1..before;
        let ours = insisted || look == Look::Not || answer.completed < before || shown == Some("off");
        match &answer.error {
            None if answer.completed < statements => CommitProof::Nothing,
            Some(_) if planted!("takes an error for a commit") => CommitProof::Committed { answered: false },
            Some(_) if answer.completed < statements && planted!("takes silence for a refusal") => {
                CommitProof::Refused { over: false }
            }
            Some(_) if answer.completed == 0 && answer.ready && planted!("takes a failed transaction for a commit") => {
                CommitProof::Committed { answered: true }
            }
            Some(error) if not_ours(error) && planted!("takes a closure's own end for a commit") => {
                CommitProof::Committed { answered: true }
            }
            None if ours => CommitProof::Committed { answered: true },
            None => CommitProof::NotOurs { committed: true },
            // The server has reported the COMMIT as done. A later failure of the session does not change that.
            Some(_) if answer.completed >= statements && ours => CommitProof::Committed { answered: false },
            Some(_) if answer.completed >= statements => CommitProof::NotOurs { committed: true },
            Some(error) if insisted && answer.completed == before - 1 && not_ours(error) => {
                CommitProof::NotOurs { committed: false }
            }
            Some(error) if looked.contains(&answer.completed) && look.is_prepared() && not_prepared(error) => {
                CommitProof::Unprepared
            }
            Some(error) if looked.contains(&answer.completed) && insisted && not_offered(error) => {
                CommitProof::Unchecked
            }
            // COMMIT was not reached.
            Some(error) if answer.completed < before && is_the_servers(error) => CommitProof::Refused { over: false },
            // If a server fails after it wrote the commit record, it reports the error and then stops. So the error is
            // a refusal only if the server is ready for the next message.
            Some(error) if answer.ready && commit_refused(error) => {
                CommitProof::Refused { over: answer.completed >= before }
            }
            Some(_) => CommitProof::Nothing,
        }
    }
}

/// What is known after a [`Known::roll_back`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Undone {
    /// This message rolled it back.
    Here,
    /// The closure had ended the pool's transaction, so this message rolled back nothing, or another transaction.
    Before(Ending),
    /// The session gave no useful answer.
    Unanswered,
}

impl Known {
    /// Decides what the answer to [`Known::roll_back`] proves. `None`: no transaction was open, so the caller must ask
    /// for [`Known::status`].
    pub(super) fn undone(known: Option<Self>, answer: &Answer, status: Option<&str>) -> Option<Undone> {
        let rollbacks = if known.is_some() { 2 } else { 1 };
        if answer.error.is_none() && answer.completed < rollbacks {
            return Some(Undone::Unanswered);
        }
        if answer.error.is_some() && !answer.left_idle() {
            let idle = answer.completed == 0 && answer.error.as_ref().is_some_and(no_transaction);
            return if idle { None } else { Some(Undone::Unanswered) };
        }
        // If the pool's transaction had ended before, the message has rolled back another one.
        Some(match status {
            Some("committed") => Undone::Before(Ending::Committed),
            Some("in progress") => Undone::Before(Ending::Prepared),
            // The closure has committed or prepared the transaction. The setting does not show which.
            _ if known.is_some_and(|known| known.has_left(status)) => Undone::Before(Ending::Unknown),
            _ => Undone::Here,
        })
    }
}

/// How the closure has ended the transaction, as `pg_xact_status` shows after the end.
pub(super) fn ending(status: Option<&str>) -> Ending {
    match status {
        Some("committed") => Ending::Committed,
        Some("aborted") => Ending::RolledBack,
        // The transaction is in progress, but this session is not in it any more. So it is prepared.
        Some("in progress") => Ending::Prepared,
        _ => Ending::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(completed: usize) -> Answer {
        Answer { completed, values: vec![Some("off".to_owned())], error: None, ready: true }
    }

    #[test]
    fn only_the_answer_to_commit_itself_proves_a_commit() {
        let run = Nonce(7);
        let looks = [Look::Not, Look::Prepare, Look::Execute, Look::Plain(Check::Full), Look::Plain(Check::ByShow)];
        for look in looks {
            for known in [Known::ById(7), Known::BySetting(run), Known::ByShow, Known::ByAnswers] {
                let prepared = look.is_prepared() && !matches!(known, Known::ById(_));
                if prepared || (look != Look::Not && known == Known::ByAnswers) {
                    continue;
                }
                let commit = known.commit(look);
                assert!(commit.starts_with(POOLS_COMMIT), "{commit}");
                assert_eq!(commit.matches("; ").count() + 1, look.statements(), "{commit}");
                for completed in 0..=look.statements() {
                    let proved = known.proof(look, &answered(completed)) == CommitProof::Committed { answered: true };
                    assert_eq!(proved, completed == look.statements(), "{known:?} {look:?} {completed}");
                }
            }
        }
    }

    #[test]
    fn only_the_answer_to_rollback_itself_proves_a_rollback() {
        for known in [None, Some(Known::ById(7)), Some(Known::ByShow), Some(Known::ByAnswers)] {
            let sql = Known::roll_back(known, None);
            let rollbacks = sql.matches("ROLLBACK").count();
            for completed in 0..=rollbacks {
                let undone = Known::undone(known, &answered(completed), None);
                let expected = if completed == rollbacks { Undone::Here } else { Undone::Unanswered };
                assert_eq!(undone, Some(expected), "{sql} {completed}");
            }
        }
    }
}
