//! How a transaction is finished: the messages that commit it or roll it back, and what their answers prove.
//!
//! Three things can go wrong at its end. The server may have failed the transaction, and then turns COMMIT into a
//! ROLLBACK. The closure may have ended the transaction itself, and then COMMIT ends another one, or none. And an error or
//! a lost connection may come after COMMIT was carried out. So COMMIT is the last of three statements in one message: the
//! first fails in a failed transaction, the second fails in any transaction but ours, and the answers are counted.
//! What an answer means is decided by pure functions. Tests: `tests/it/finish.rs`.

use std::pin::pin;

use futures_util::StreamExt;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use crate::classify::{commit_refused, no_transaction, not_offered, not_ours, not_prepared};
use crate::error::Ending;
use crate::pool::Check;

/// Set by BEGIN for one transaction: its end, however it comes about, takes the value away.
pub(super) const OPEN: &str = "SET LOCAL tokio_postgres_failover.transaction = off";

/// Looks for the transaction by its id. Another number for another text: behind a proxy, versions of this crate may share a
/// session.
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

/// By what a transaction is known again when it is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::enum_variant_names, reason = "they read on from the name")]
pub(super) enum Known {
    /// The transaction id that its mark has given it.
    ById(u64),
    /// The setting of [`OPEN`].
    BySetting,
    /// The same, of a transaction that only reads: it is looked at and not insisted on. This takes no snapshot, which a
    /// deferrable transaction would wait for, and no planning.
    ByShow,
}

impl Known {
    /// COMMIT, in one message with what has to hold for it.
    ///
    /// The first statement fails in a failed transaction (25P02). It also lets the warning through by which the server says
    /// that the wait for a synchronous standby was cancelled, whatever `client_min_messages` the session has.
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
            // The mark has called it. It gives another transaction an id that is not this one.
            (Self::ById(xid), Check::Other) => Some(("pg_current_xact_id()", xid.to_string())),
            (Self::BySetting, Check::Prepared | Check::Full) => {
                Some(("current_setting('tokio_postgres_failover.transaction', true)", "off".to_owned()))
            }
            // Fails where nobody has ever set it.
            (Self::BySetting, Check::Other) => {
                Some(("current_setting('tokio_postgres_failover.transaction')", "off".to_owned()))
            }
        };
        own.map_or_else(
            || "SHOW tokio_postgres_failover.transaction".to_owned(),
            |(asked, expected)| insists(asked, &format!("'{expected}'")),
        )
    }

    /// ROLLBACK, and with `role` that question. Where no transaction is open although the closure was run, it has ended that,
    /// and the first statement fails (25P01).
    pub(super) fn roll_back(known: Option<Self>, role: Option<&str>) -> String {
        let mut sql = if known.is_some() { "ROLLBACK AND CHAIN; ROLLBACK" } else { "ROLLBACK" }.to_owned();
        for question in role.map(str::to_owned).into_iter().chain(known.and_then(Self::status)) {
            sql.push_str("; ");
            sql.push_str(&question);
        }
        sql
    }

    /// What became of the transaction, where its id is known.
    pub(super) fn status(self) -> Option<String> {
        match self {
            Self::ById(xid) => Some(format!("SELECT pg_catalog.pg_xact_status('{xid}')")),
            Self::BySetting | Self::ByShow => None,
        }
    }
}

/// Fails with a division by zero unless the function returns this.
fn insists(function: &str, expected: &str) -> String {
    format!(
        "SELECT WHERE 1 OPERATOR(pg_catalog./) coalesce(pg_catalog.{function} \
         OPERATOR(pg_catalog.=) {expected}, false)::pg_catalog.int4 IS NULL"
    )
}

/// What came back for a message of several statements.
#[derive(Debug, Default)]
pub(super) struct Answer {
    /// How many statements were carried out.
    pub(super) completed: usize,
    /// The first value of each row. A row without columns has none.
    pub(super) values: Vec<Option<String>>,
    /// What came after that.
    pub(super) error: Option<Error>,
}

impl Answer {
    /// Sends the message and waits for the end of its answer. Cancel-safe as far as the driver is: what was sent is sent.
    pub(super) async fn to(client: &Client, sql: &str) -> Self {
        let mut answer = Self::default();
        let messages = match client.simple_query_raw(sql).await {
            Ok(messages) => messages,
            Err(error) => return Self { error: Some(error), ..answer },
        };
        let mut messages = pin!(messages);
        while let Some(message) = messages.next().await {
            match message {
                Ok(SimpleQueryMessage::CommandComplete(_)) => answer.completed += 1,
                Ok(SimpleQueryMessage::Row(row)) if !row.is_empty() => {
                    answer.values.push(row.try_get(0).ok().flatten().map(str::to_owned));
                }
                Ok(_) => {}
                Err(error) => {
                    answer.error = Some(error);
                    break;
                }
            }
        }
        answer
    }
}

impl Answer {
    /// Of [`Known::roll_back`]: rolled back, and only what was asked after that is not offered.
    pub(super) fn left_idle(&self) -> bool {
        self.completed >= 2 && self.error.as_ref().is_some_and(not_offered)
    }
}

/// What the answer to COMMIT's message proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// The transaction is committed. `answered`: the session has said so to the end, and can be used again.
    Committed {
        answered: bool,
    },
    /// What COMMIT met was not the transaction that the pool began. `committed`: it was committed all the same.
    NotOurs {
        committed: bool,
    },
    /// The server did not commit it, and never will. `over`: it is rolled back already.
    Refused {
        over: bool,
    },
    /// The server does not let this role look for the transaction, and so did not come to COMMIT.
    Unchecked,
    /// The prepared statement that looks for the transaction was not there, so the server did not come to COMMIT.
    Unprepared,
    Nothing,
}

impl Known {
    /// What does this answer to [`Known::commit`] prove?
    pub(super) fn proof(self, look: Look, answer: &Answer) -> Proof {
        let (statements, before) = (look.statements(), look.statements() - 1);
        let shown = answer.values.first().and_then(Option::as_deref);
        let insisted = self != Self::ByShow && !look.is_shown();
        // What comes to an end before COMMIT does, after the first.
        let looked = 1..before;
        let ours = insisted || answer.completed < before || shown == Some("off");
        match &answer.error {
            None if ours => Proof::Committed { answered: true },
            None => Proof::NotOurs { committed: true },
            // The server has said that it committed; what befell the session after that changes nothing.
            Some(_) if answer.completed >= statements && ours => Proof::Committed { answered: false },
            Some(_) if answer.completed >= statements => Proof::NotOurs { committed: true },
            Some(error) if answer.completed == before - 1 && not_ours(error) => Proof::NotOurs { committed: false },
            Some(error) if looked.contains(&answer.completed) && look.is_prepared() && not_prepared(error) => {
                Proof::Unprepared
            }
            Some(error) if looked.contains(&answer.completed) && insisted && not_offered(error) => Proof::Unchecked,
            Some(error) if commit_refused(error) => Proof::Refused { over: answer.completed >= before },
            Some(_) => Proof::Nothing,
        }
    }
}

/// What is known after a [`Known::roll_back`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Undone {
    /// Rolled back, by this.
    Here,
    /// There was nothing to roll back, or another transaction than the pool's: the closure had ended that.
    Before(Ending),
    /// The session gave no answer that tells.
    Unanswered,
}

impl Known {
    /// What the answer to [`Known::roll_back`] proves; `None`: the session was idle, and has to be asked for
    /// [`Known::status`].
    pub(super) fn undone(answer: &Answer, status: Option<&str>) -> Option<Undone> {
        if answer.error.is_some() && !answer.left_idle() {
            let idle = answer.completed == 0 && answer.error.as_ref().is_some_and(no_transaction);
            return if idle { None } else { Some(Undone::Unanswered) };
        }
        // It was not the pool's transaction that was rolled back if that was committed before.
        Some(match status {
            Some("committed") => Undone::Before(Ending::Committed),
            Some("in progress") => Undone::Before(Ending::Prepared),
            _ => Undone::Here,
        })
    }
}

/// How the closure has ended the transaction, by what `pg_xact_status` says of it now that it is not open.
pub(super) fn ending(status: Option<&str>) -> Ending {
    match status {
        Some("committed") => Ending::Committed,
        Some("aborted") => Ending::RolledBack,
        // No session runs it any more.
        Some("in progress") => Ending::Prepared,
        _ => Ending::Unknown,
    }
}
