//! How a transaction begins by a message of its own, which contains BEGIN and the mark. Later, the transaction can be
//! found by its mark. `opening.rs` says when BEGIN travels with the first statement instead.

use std::sync::Arc;

use super::attempt::Attempt;
use super::begin::{Begin, MarkKind};
use super::finish::{OPEN, remember};
use super::settle::{SettleBy, SettleKey};
use crate::classify::{Verdict, classify, explain, lacks_function, not_offered};
use crate::commit::{Ledger, Life, Nonce, Signature};
use crate::error::{Error, RolledBack};
use crate::pool::{Check, SignatureState, UNIDENTIFIED};
use crate::server::SessionClient;
use crate::settle::ledger::{Entering, entered, entered_directly};
use crate::settle::wal::{self, Backend, MarkAnswer, MarkForm, MarkStatement};
use crate::sync::log_safely;
use crate::topology::{BadReport, Suspicion};

/// Precedes a BEGIN without a mark in the same message. It rolls back a transaction that was left open on the session,
/// so that the coming COMMIT does not commit it. The server's warning about it is not enough: a role's
/// `client_min_messages` may hide it, and this crate does not see the notices of a wrapped pool. On a clean session it
/// has no effect.
const CLEAN: &str = "BEGIN; ROLLBACK; ";

impl<C: SessionClient> Attempt<C> {
    /// Sends BEGIN and the mark in one message.
    pub(super) async fn begin(&self, begin: &Begin) -> Result<Option<SettleKey>, Error> {
        let client = self.client();
        let nonce = self.pool().next_nonce();
        let signature =
            if matches!(begin.marks, MarkKind::Wal) && self.can_be_marked() { self.signature().await? } else { None };
        let answer = match &begin.marks {
            MarkKind::Ledger(ledger) => self.enter(&begin.sql, ledger).await,
            MarkKind::Wal | MarkKind::Write if self.can_be_marked() => self.mark(&begin.sql, nonce).await,
            MarkKind::Nothing | MarkKind::Wal | MarkKind::Write => {
                self.begin_unmarked(begin, CLEAN).await?;
                return Ok(None);
            }
        };
        let row = match answer {
            Ok(row) => row,
            // A standby may refuse the same, for instance a serializable transaction. Such an error says nothing about
            // the primary, so it does not mean that marks are unavailable.
            Err(error) if !not_offered(&error) || classify(&error) == Verdict::ReadOnly => return Err(error.into()),
            Err(error) if matches!(begin.marks, MarkKind::Ledger(_)) => return Err(Error::Ledger(error)),
            Err(error) => {
                let mut why = explain(&error);
                if lacks_function(&error) {
                    why.push_str("; PostgreSQL 13 is the oldest version that tells what became of a commit");
                }
                self.pool().lacking().set_unmarked(client.generation(), &why);
                client.run_own("ROLLBACK").await?;
                self.begin_unmarked(begin, "").await?;
                return Ok(None);
            }
        };
        // The life is read once, because more may be learned about it at any time.
        let life = client.life();
        let mark = |by, backend| self.key(by, backend, life, signature.clone());
        let read = match (&begin.marks, life) {
            (MarkKind::Ledger(ledger), life) => match self.read_entry(life.as_ref(), &row) {
                Ok(Entering::As(entered, backend)) => {
                    Ok(Some(mark(SettleBy::Ledger(ledger.clone(), entered), backend)))
                }
                Ok(Entering::Elsewhere) => return Err(self.elsewhere()),
                Ok(Entering::Joined) => return Err(Error::RolledBack(RolledBack::StrangeSession)),
                Err(bad) => Err(bad),
            },
            (_, Some(life)) => match self.read_mark(&life, nonce, &row) {
                Ok(MarkAnswer::Elsewhere) => return Err(self.elsewhere()),
                // The server also reports this by a notice, but this crate does not see the notices of a wrapped pool.
                Ok(MarkAnswer::Joined) => return Err(Error::RolledBack(RolledBack::StrangeSession)),
                Ok(MarkAnswer::By(marker, backend)) => Ok(Some(mark(SettleBy::Wal(marker), backend))),
                Ok(MarkAnswer::ReadOnly) => {
                    self.note_read_only();
                    Ok(None)
                }
                Err(bad) => Err(bad),
            },
            (_, None) => Ok(None),
        };
        let mark = read.unwrap_or_else(|bad| {
            self.pool().lacking().set_unmarked(client.generation(), &bad.to_string());
            None
        });
        if !self.do_answers_tell() && (mark.is_none() || self.check == Check::ByShow) {
            client.run_own(&format!("{OPEN}; {}", remember(self.run))).await?;
        }
        Ok(mark)
    }

    /// Returns by what this transaction can be found.
    pub(super) fn key(
        &self,
        by: SettleBy,
        backend: Backend,
        life: Option<Life>,
        signature: Option<Arc<Signature>>,
    ) -> SettleKey {
        let client = self.client();
        SettleKey { by, backend, generation: client.generation(), cluster: client.cluster(), life, signature }
    }

    /// Returns whether the pool has read every answer on the session, and these show that no transaction is open.
    /// Behind a proxy, another session of the server may answer next.
    pub(super) async fn is_seen_without_transaction(&self) -> bool {
        let client = self.client();
        let Some(activity) = client.watched_activity().filter(|_| client.notices().is_direct()) else { return false };
        if activity.is_idle().is_none() {
            client.notices().requests_are_seen().await;
        }
        activity.is_idle() == Some(true)
    }

    /// Begins a transaction without a mark, behind `clean`. One that only reads needs no value of [`remember`].
    async fn begin_unmarked(&self, begin: &Begin, clean: &str) -> Result<(), Error> {
        let (client, sql) = (self.client(), &begin.unmarked);
        if self.do_answers_tell() && (begin.read_only || client.notices().activity.tells_read_only()) {
            return Ok(client.run_own(&begin.sql).await?);
        }
        if begin.read_only {
            return Ok(client.run_own(&format!("{clean}{sql}")).await?);
        }
        let sql = format!("{clean}{sql}; {}; SHOW transaction_read_only", remember(self.run));
        let shown = client.noted(wal::only_row(client, &sql).await)?;
        if shown.first().and_then(Option::as_deref) == Some("on") {
            self.note_read_only();
        }
        Ok(())
    }

    /// Notes that the transaction began read-only.
    pub(super) fn note_read_only(&self) {
        // Setting it cannot fail, because an attempt begins only once.
        let _ = self.began_read_only.set(());
    }

    /// Returns the error if a proxy has connected the transaction to another server than the one that was verified.
    fn elsewhere(&self) -> Error {
        self.client().suspect(Suspicion::Connection);
        Error::RolledBack(RolledBack::OtherServer)
    }

    /// Returns the signature of the timeline. A successor that has the signature proves that it continues this
    /// timeline. Timeline 1 needs no signature, because every history begins with it. The pool's first transaction on a
    /// primary signs; transactions that begin meanwhile have no signature.
    async fn signature(&self) -> Result<Option<Arc<Signature>>, Error> {
        let (client, pool) = (self.client(), self.pool());
        let Some(life) = self.life_to_sign() else { return Ok(None) };
        let signer = match pool.signatures().of(client.generation()) {
            SignatureState::Done(signature) => return Ok(signature),
            SignatureState::Yours(signer) => signer,
        };
        match wal::sign(client, &life, pool.next_seed()).await {
            Ok(signature) => {
                let signature = signature.map(Arc::new);
                signer.ended(signature.clone());
                Ok(signature)
            }
            Err(error) if error.as_db_error().is_some() && !client.is_closed() => {
                signer.ended(None);
                log_safely(|| tracing::debug!("the timeline could not be signed: {}", explain(&error)));
                client.run_own("ROLLBACK").await?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn mark(&self, begin: &str, nonce: Nonce) -> Result<wal::Row, tokio_postgres::Error> {
        let (form, statement) = self.mark_form();
        let became = |statement| self.client().set_mark_statement(statement);
        self.begin_with(statement, |statement| statement.sql(form, begin, nonce), became).await
    }

    async fn enter(&self, begin: &str, ledger: &Ledger) -> Result<wal::Row, tokio_postgres::Error> {
        let client = self.client();
        if !self.do_answers_tell() {
            return wal::only_row(client, &format!("{begin}; {}", ledger.enter())).await;
        }
        let key = ledger.key();
        let sql = |statement| format!("{begin}; {}", ledger.enter_directly(statement));
        let became = |statement| client.set_entry_statement(key, statement);
        self.begin_with(client.entry_statement(key), sql, became).await
    }

    /// Sends BEGIN and a statement that the session may have prepared. `became`: notes what becomes of the statement.
    async fn begin_with(
        &self,
        statement: MarkStatement,
        sql: impl Fn(MarkStatement) -> String,
        became: impl Fn(MarkStatement),
    ) -> Result<wal::Row, tokio_postgres::Error> {
        let client = self.client();
        match wal::only_row(client, &sql(statement)).await {
            Ok(row) => {
                if statement == MarkStatement::New {
                    became(MarkStatement::Prepared);
                }
                Ok(row)
            }
            Err(error) if statement.failed(&error) => {
                client.run_own("ROLLBACK").await?;
                let row = wal::only_row(client, &sql(MarkStatement::Plain)).await?;
                became(statement.after(&error, self.do_answers_tell()));
                Ok(row)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns how the transaction is marked. A session prepares only one of the two forms.
    pub(super) fn mark_form(&self) -> (MarkForm, MarkStatement) {
        let client = self.client();
        match (self.do_answers_tell(), client.notices().is_direct()) {
            (true, _) => (MarkForm::Direct, client.mark_statement()),
            (false, true) => (MarkForm::Full, MarkStatement::Plain),
            (false, false) => (MarkForm::Full, client.mark_statement()),
        }
    }

    /// The life of the server, if its timeline needs a signature.
    pub(super) fn life_to_sign(&self) -> Option<Life> {
        self.client().life().filter(|life| life.server.timeline > 1)
    }

    /// The server process of the session, if the short answers to the mark and to the ledger's entry are asked for.
    fn direct_pid(&self) -> Option<i32> {
        let session = self.client().notices().server_session().filter(|_| self.do_answers_tell());
        session.map(|session| session.pid)
    }

    pub(super) fn read_entry(&self, life: Option<&Life>, row: &wal::Row) -> Result<Entering, BadReport> {
        match self.direct_pid() {
            Some(pid) => entered_directly(pid, row),
            None => entered(life, row),
        }
    }

    pub(super) fn read_mark(&self, life: &Life, nonce: Nonce, row: &wal::Row) -> Result<MarkAnswer, BadReport> {
        match self.direct_pid() {
            Some(pid) => wal::read_direct_mark(life, pid, nonce, row),
            None => wal::read_mark(life, nonce, row),
        }
    }

    pub(super) fn can_be_marked(&self) -> bool {
        let (client, pool) = (self.client(), self.pool());
        let identified = client.life().is_some();
        if pool.lacking().is_unmarked(client.generation(), identified) {
            return false;
        }
        if !identified {
            pool.lacking().set_unmarked(client.generation(), UNIDENTIFIED);
        }
        identified
    }
}
