//! How a transaction is finished: the messages that commit it or roll it back, and what their answers prove.
//!
//! Three things can go wrong at the end. The server may have aborted the transaction, and then turns COMMIT into a
//! ROLLBACK. The closure may have ended the transaction itself, and then COMMIT ends another one, or none. And an error
//! or a lost connection may come after COMMIT was carried out. So COMMIT is the last of three statements in one
//! message. The first fails in an aborted transaction, the second fails in any transaction but ours, and the answers
//! are counted. In the first message of a session, one more prepares the second. Pure functions decide what an answer
//! means. The tests are in `tests/it/commit/finish.rs`.

use std::pin::pin;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::time::{Instant, timeout_at};
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use crate::classify::{commit_refused, is_the_servers, no_transaction, not_offered, not_ours, not_prepared};
use crate::commit::Nonce;
use crate::error::Ending;
use crate::pool::Check;

/// How long the rest of an answer may take after an error. The server sends it at once.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

/// Set by BEGIN for one transaction. The value disappears with the transaction, however it ends.
pub(super) const OPEN: &str = "SET LOCAL tokio_postgres_failover.transaction = off";

/// Set by BEGIN if a transaction has no mark and may write. The value is unique to the transaction. It disappears with a
/// rollback and stays after a commit, whoever sends it.
const RUN: &str = "tokio_postgres_failover.run";

pub(super) fn remember(run: Nonce) -> String {
    format!("SET {RUN} = '{run}'")
}

/// The name of the prepared check. Its number changes with its text, because versions of this crate may share a session
/// behind a proxy.
const PREPARED: &str = "tokio_postgres_failover_check_1";

/// How COMMIT's message looks for its transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// By the session's prepared statement, which this message prepares.
    Prepare,
    /// By the session's prepared statement.
    Execute,
    /// By what this check lets it call.
    Plain(Check),
}

impl Look {
    /// How many statements the message has. COMMIT is the last.
    fn statements(self) -> usize {
        if self == Self::Prepare { 4 } else { 3 }
    }

    fn is_prepared(self) -> bool {
        matches!(self, Self::Prepare | Self::Execute)
    }

    /// Is the answer's row looked at, and not insisted on?
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
    /// By the setting of [`OPEN`]. The value of [`remember`] shows after a rollback whether it was committed before.
    BySetting(Nonce),
    /// By the same setting, for a transaction that only reads: a wrong value does not stop the COMMIT. This needs no
    /// planning, and no snapshot, for which a deferrable transaction would wait.
    ByShow,
}

impl Known {
    /// Returns COMMIT in one message with the statements that check its conditions.
    ///
    /// The first statement fails in an aborted transaction (25P02). It also enables the warning by which the server
    /// reports that the wait for a synchronous standby was cancelled, whatever `client_min_messages` the session has.
    pub(super) fn commit(self, look: Look) -> String {
        let looks = match (self, look) {
            (Self::ById(xid), Look::Execute) => format!("EXECUTE {PREPARED} ('{xid}')"),
            (Self::ById(xid), Look::Prepare) => {
                let insists = insists("pg_current_xact_id_if_assigned()", "$1");
                format!("PREPARE {PREPARED} (pg_catalog.xid8) AS {insists}; EXECUTE {PREPARED} ('{xid}')")
            }
            (_, Look::Execute | Look::Prepare) => self.looks(Check::Full),
            (_, Look::Plain(check)) => self.looks(check),
        };
        format!("SET LOCAL client_min_messages = warning; {looks}; COMMIT")
    }

    fn looks(self, check: Check) -> String {
        let own = match (self, check) {
            (Self::ByShow, _) | (_, Check::ByShow) => None,
            (Self::ById(xid), Check::Prepared | Check::Full) => {
                Some(("pg_current_xact_id_if_assigned()", xid.to_string()))
            }
            // The mark has called this function already. In another transaction it assigns another id, which differs
            // from this one.
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

    /// Returns ROLLBACK, and the question `role` if given. If no transaction is open although the closure has run, the
    /// closure has ended it, and the first statement fails (25P01).
    pub(super) fn roll_back(known: Option<Self>, role: Option<&str>) -> String {
        let mut sql = if known.is_some() { "ROLLBACK AND CHAIN; ROLLBACK" } else { "ROLLBACK" }.to_owned();
        for question in role.map(str::to_owned).into_iter().chain(known.and_then(Self::status)) {
            sql.push_str("; ");
            sql.push_str(&question);
        }
        sql
    }

    /// Returns the question for the transaction's outcome, if it leaves something behind that can be asked for.
    pub(super) fn status(self) -> Option<String> {
        match self {
            Self::ById(xid) => Some(format!("SELECT pg_catalog.pg_xact_status('{xid}')")),
            Self::BySetting(_) => Some(format!("SHOW {RUN}")),
            Self::ByShow => None,
        }
    }

    /// Whether the answer to [`Known::status`] is the value that only a commit leaves on the session.
    fn has_left(self, status: Option<&str>) -> bool {
        matches!((self, status), (Self::BySetting(run), Some(word)) if word == run.to_string())
    }
}

/// Fails with a division by zero unless the function returns this.
fn insists(function: &str, expected: &str) -> String {
    format!(
        "SELECT WHERE 1 OPERATOR(pg_catalog./) coalesce(pg_catalog.{function} \
         OPERATOR(pg_catalog.=) {expected}, false)::pg_catalog.int4 IS NULL"
    )
}

/// The answer to a message of several statements.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// The number of statements that were carried out.
    pub(super) completed: usize,
    /// The first value of each row. A row without columns has none.
    pub(super) values: Vec<Option<String>>,
    /// The error that came after that.
    pub(super) error: Option<Error>,
    /// The server has finished the message, and takes the next one.
    pub(super) ready: bool,
}

impl Answer {
    /// Sends the message and waits for the end of its answer. Cancel-safe like the driver: a message that was sent
    /// stays sent.
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
    /// For [`Known::roll_back`]: it rolled back, and only a later question is not offered.
    pub(super) fn left_idle(&self) -> bool {
        self.completed >= 2 && self.error.as_ref().is_some_and(not_offered)
    }
}

/// What the answer to COMMIT's message proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// The transaction is committed. `answered`: the session answered completely, and can be used again.
    Committed {
        answered: bool,
    },
    /// COMMIT met another transaction than the one that the pool began. `committed`: that one was committed.
    NotOurs {
        committed: bool,
    },
    /// The server did not commit it, and never will. `over`: it is already rolled back.
    Refused {
        over: bool,
    },
    /// The role may not check for the transaction, so the server did not come to COMMIT.
    Unchecked,
    /// The prepared statement that looks for the transaction was not there, so the server did not come to COMMIT.
    Unprepared,
    Nothing,
}

impl Known {
    /// Decides what this answer to [`Known::commit`] proves.
    pub(super) fn proof(self, look: Look, answer: &Answer) -> Proof {
        let (statements, before) = (look.statements(), look.statements() - 1);
        let shown = answer.values.first().and_then(Option::as_deref);
        let insisted = self != Self::ByShow && !look.is_shown();
        // The numbers of completed statements after which the check is what failed.
        let looked = 1..before;
        let ours = insisted || answer.completed < before || shown == Some("off");
        match &answer.error {
            None if ours => Proof::Committed { answered: true },
            None => Proof::NotOurs { committed: true },
            // The server has said that it committed. A later failure of the session does not change that.
            Some(_) if answer.completed >= statements && ours => Proof::Committed { answered: false },
            Some(_) if answer.completed >= statements => Proof::NotOurs { committed: true },
            Some(error) if answer.completed == before - 1 && not_ours(error) => Proof::NotOurs { committed: false },
            Some(error) if looked.contains(&answer.completed) && look.is_prepared() && not_prepared(error) => {
                Proof::Unprepared
            }
            Some(error) if looked.contains(&answer.completed) && insisted && not_offered(error) => Proof::Unchecked,
            // COMMIT was not reached.
            Some(error) if answer.completed < before && is_the_servers(error) => Proof::Refused { over: false },
            // A server that fails behind the commit record reports that error first, and then stops.
            Some(error) if answer.ready && commit_refused(error) => Proof::Refused { over: answer.completed >= before },
            Some(_) => Proof::Nothing,
        }
    }
}

/// What is known after a [`Known::roll_back`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Undone {
    /// This message rolled it back.
    Here,
    /// There was nothing to roll back, or only another transaction, because the closure had ended the pool's.
    Before(Ending),
    /// The session gave no useful answer.
    Unanswered,
}

impl Known {
    /// Decides what the answer to [`Known::roll_back`] proves. `None`: the session had no transaction, and must be
    /// asked for [`Known::status`].
    pub(super) fn undone(known: Option<Self>, answer: &Answer, status: Option<&str>) -> Option<Undone> {
        if answer.error.is_some() && !answer.left_idle() {
            let idle = answer.completed == 0 && answer.error.as_ref().is_some_and(no_transaction);
            return if idle { None } else { Some(Undone::Unanswered) };
        }
        // If the pool's transaction was committed before, another one was rolled back.
        Some(match status {
            Some("committed") => Undone::Before(Ending::Committed),
            Some("in progress") => Undone::Before(Ending::Prepared),
            // The closure has committed or prepared it. The setting does not tell which.
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
        // It is in progress, but in no session: it is prepared.
        Some("in progress") => Ending::Prepared,
        _ => Ending::Unknown,
    }
}
