//! One session on a server: its transaction, and how each statement is carried out.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

use crate::columns::value_of;
use crate::done::Done;
use crate::durable::raised;
use crate::log::{Row, What};
use crate::node::{Node, Troubles};
use crate::proto::Answer;
use crate::sql::{SqlError, Statement, read};
use crate::world::Sim;

pub(crate) const READ_ONLY: &str = "25006";

/// An open transaction.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Transaction {
    /// It was begun by BEGIN, and not by a statement alone.
    pub(crate) block: bool,
    pub(crate) failed: bool,
    pub(crate) xid: Option<u64>,
    pub(crate) began_in_recovery: bool,
    pub(crate) read_only: bool,
    /// It has a snapshot.
    pub(crate) has_queried: bool,
    /// The message that began it.
    message: u64,
    begun_at: Instant,
    pub(crate) rows: Vec<Row>,
    /// The calls of which its NOTIFY tells.
    pub(crate) tells: Vec<i64>,
    /// Which of `RAISED` its COMMIT meets.
    pub(crate) raises: Option<usize>,
    pub(crate) savepoints: Vec<String>,
    /// The values before each `SET`, and whether it was a `SET LOCAL`.
    pub(crate) before: Vec<(String, Option<String>, bool)>,
}

pub(crate) struct Session {
    pub(crate) sim: Arc<Sim>,
    pub(crate) node: usize,
    pub(crate) pid: i32,
    pub(crate) cancel: Arc<Notify>,
    pub(crate) transaction: Option<Transaction>,
    pub(crate) settings: BTreeMap<String, String>,
    pub(crate) prepared: BTreeMap<String, Statement>,
    pub(crate) message: u64,
    /// The server's fence for open sessions, as this one last looked. It looks between two messages.
    fenced: bool,
    /// The last value of `default_transaction_read_only` that was reported.
    reported: Option<bool>,
    /// An error has ended it.
    pub(crate) ended: bool,
}

impl Session {
    pub(crate) fn new(sim: &Arc<Sim>, node: usize, pid: i32, cancel: Arc<Notify>) -> Self {
        let fenced = sim.lock().nodes[node].fenced;
        let default = if fenced { "on" } else { "off" };
        let settings = BTreeMap::from([
            ("default_transaction_read_only".to_owned(), default.to_owned()),
            ("synchronous_commit".to_owned(), "on".to_owned()),
            ("server_version_num".to_owned(), "150008".to_owned()),
        ]);
        Self {
            sim: Arc::clone(sim),
            node,
            pid,
            cancel,
            transaction: None,
            settings,
            prepared: BTreeMap::new(),
            message: 0,
            fenced: false,
            reported: None,
            ended: false,
        }
    }

    pub(crate) fn of_node<T>(&self, read: impl FnOnce(&mut Node) -> T) -> T {
        read(&mut self.sim.lock().nodes[self.node])
    }

    /// Reports something that the model does not know.
    pub(crate) fn unknown(&self, what: &str) -> SqlError {
        self.sim.lock().oracle.model_lacks(what);
        SqlError::new("42601", format!("the model does not know: {what}"))
    }

    /// The status in `ReadyForQuery`.
    pub(crate) fn status(&self) -> u8 {
        match &self.transaction {
            Some(Transaction { failed: true, .. }) => b'E',
            Some(_) => b'T',
            None => b'I',
        }
    }

    pub(crate) fn setting(&self, name: &str) -> Option<String> {
        let on = match name {
            "transaction_read_only" => self.is_read_only(),
            "default_transaction_read_only" => self.is_read_only_by_default(),
            _ => return self.settings.get(name).cloned(),
        };
        Some(if on { "on" } else { "off" }.to_owned())
    }

    fn is_read_only_by_default(&self) -> bool {
        let by_setting = self.settings.get("default_transaction_read_only").is_some_and(|value| value == "on");
        by_setting || self.fenced
    }

    /// Reads the server's configuration again, as a session does between two messages.
    pub(crate) fn reload(&mut self) {
        self.fenced = self.of_node(|node| node.troubles.read_only);
    }

    /// Returns what has to be reported before the end of a request.
    pub(crate) fn reports(&mut self) -> Option<&'static str> {
        let read_only = self.is_read_only_by_default();
        let changed = self.reported.replace(read_only) != Some(read_only);
        changed.then_some(if read_only { "on" } else { "off" })
    }

    pub(crate) fn is_read_only(&self) -> bool {
        let transaction = self.transaction.as_ref();
        transaction.map_or_else(|| self.is_read_only_by_default(), |it| it.read_only || it.began_in_recovery)
    }

    /// The transaction began with this message.
    pub(crate) fn begun_here(&self) -> bool {
        self.transaction.as_ref().is_none_or(|it| it.message == self.message)
    }

    /// The transaction's id, which is assigned if it has none yet.
    pub(crate) fn xid(&mut self) -> Result<u64, SqlError> {
        let (node, pid) = (self.node, self.pid);
        self.not_during_recovery("pg_current_xact_id()")?;
        let Some(transaction) = &mut self.transaction else { return Err(SqlError::new("25P01", "no transaction")) };
        if let Some(xid) = transaction.xid {
            return Ok(xid);
        }
        let mut world = self.sim.lock();
        if world.nodes[node].troubles.full_disk {
            return Err(SqlError::new("53100", "could not extend file: No space left on device"));
        }
        let xid = world.assign_xid(node, pid);
        transaction.xid = Some(xid);
        Ok(xid)
    }

    pub(crate) fn begin(&mut self, block: bool) {
        let default = self.is_read_only_by_default();
        self.transaction = Some(Transaction {
            block,
            failed: false,
            xid: None,
            began_in_recovery: self.of_node(|node| node.recovery),
            read_only: default,
            has_queried: false,
            message: self.message,
            begun_at: Instant::now(),
            rows: Vec::new(),
            tells: Vec::new(),
            raises: None,
            savepoints: Vec::new(),
            before: Vec::new(),
        });
        self.show_start(Some(Instant::now()));
    }

    /// Undoes each `SET LOCAL` at a transaction's end, and each `SET` if it was rolled back.
    pub(crate) fn undo_settings(&mut self, before: Vec<(String, Option<String>, bool)>, committed: bool) {
        for (name, value, local) in before.into_iter().rev() {
            match value {
                _ if committed && !local => {}
                Some(value) => drop(self.settings.insert(name, value)),
                // Once it was set, a setting of an extension is empty, and not unknown.
                None if name.contains('.') => drop(self.settings.insert(name, String::new())),
                None => drop(self.settings.remove(&name)),
            }
        }
    }

    pub(crate) fn abort(&mut self) {
        let Some(transaction) = self.transaction.take() else { return };
        self.abort_id(transaction.xid);
        self.show_start(None);
        self.undo_settings(transaction.before, false);
    }

    fn abort_id(&self, xid: Option<u64>) {
        let Some(xid) = xid else { return };
        let mut world = self.sim.lock();
        // A transaction whose COMMIT was carried out is committed, however its session ends.
        if world.nodes[self.node].running.remove(&xid) && world.nodes[self.node].log.outcome(xid).is_none() {
            world.append(self.node, What::Abort { xid });
        }
        if let Some(backend) = world.nodes[self.node].backends.get_mut(&self.pid) {
            backend.xid = None;
        }
        world.nodes[self.node].ended.notify_waiters();
    }

    /// Waits while the process is stopped.
    pub(crate) async fn thaw(&self) {
        loop {
            let thawed = self.of_node(|node| Arc::clone(&node.thawed));
            let thawed = thawed.notified();
            if !self.of_node(|node| node.frozen) {
                return;
            }
            thawed.await;
        }
    }

    /// Waits until the server is no standby any more, but not longer than this.
    async fn promotion(&self, until: Instant) {
        loop {
            let changed = self.of_node(|node| Arc::clone(&node.thawed));
            let changed = changed.notified();
            if !self.of_node(|node| node.recovery) || timeout_at(until, changed).await.is_err() {
                break;
            }
        }
        self.thaw().await;
    }

    /// Carries out the statements of one message.
    pub(crate) async fn query(&mut self, text: &str, answer: &mut Answer) {
        #[cfg(test)]
        crate::reality::heard(text);
        self.message += 1;
        // No caller's work is as long as the pool's questions.
        let ends = text.len() > 1000 || ["COMMIT", "END", "PREPARE"].iter().any(|word| text.contains(word));
        self.of_node(|node| node.backends.get_mut(&self.pid).map(|backend| backend.ends = ends));
        let all = read(text);
        if all.is_empty() {
            return answer.no_query();
        }
        for (number, statement) in all.iter().enumerate() {
            match self.one(statement, number + 1 == all.len(), answer).await {
                Ok(done) => {
                    if done.has_rows() {
                        answer.columns(done.columns, 25);
                    }
                    done.rows.iter().for_each(|row| answer.row(row));
                    answer.complete(done.tag);
                }
                Err(error) => {
                    self.ended |= error.fatal;
                    if error.code == "garbage" {
                        answer.garbage();
                    } else {
                        answer.error(if error.fatal { "FATAL" } else { "ERROR" }, &error);
                    }
                    self.fail();
                    return;
                }
            }
        }
    }

    /// After an error, a transaction block has failed, and anything else is rolled back.
    pub(crate) fn fail(&mut self) {
        match &mut self.transaction {
            Some(transaction) if transaction.block => {
                transaction.failed = true;
                // Behind a savepoint, only what came after it is aborted.
                if transaction.savepoints.is_empty() {
                    let xid = transaction.xid.take();
                    self.abort_id(xid);
                    self.show_start(None);
                }
            }
            _ => self.abort(),
        }
    }

    /// Carries out one statement. `last`: it is the last one of its message, so a transaction without a block ends.
    pub(crate) async fn one(
        &mut self,
        statement: &Statement,
        last: bool,
        answer: &mut Answer,
    ) -> Result<Done, SqlError> {
        if let Some(transaction) = &self.transaction
            && transaction.failed
            && !statement.ends_a_failure()
        {
            let message = "current transaction is aborted, commands ignored until end of transaction block";
            return Err(SqlError::new("25P02", message));
        }
        if self.transaction.is_none() && !matches!(statement, Statement::Begin { .. }) {
            self.begin(false);
        }
        if matches!(statement, Statement::Columns(_) | Statement::Insert(_) | Statement::Execute { .. }) && self.fails()
        {
            return Err(SqlError::new("53200", "out of memory"));
        }
        if statement.takes_a_snapshot()
            && let Some(transaction) = &mut self.transaction
        {
            transaction.has_queried = true;
        }
        let done = self.carry_out(statement, answer).await?;
        if last && self.transaction.as_ref().is_some_and(|it| !it.block) {
            self.commit(answer).await?;
        }
        Ok(done)
    }

    fn fails(&self) -> bool {
        self.happens(|troubles| troubles.errors)
    }

    /// Whether a trouble happens that has this chance.
    fn happens(&self, percent: fn(&Troubles) -> u64) -> bool {
        let mut world = self.sim.lock();
        let percent = percent(&world.nodes[self.node].troubles);
        percent > 0 && world.rng.chance(percent)
    }

    pub(crate) fn write(&mut self, [call, attempt]: [i64; 2]) -> Result<(), SqlError> {
        if self.is_read_only() {
            return Err(SqlError::new(READ_ONLY, "cannot execute INSERT in a read-only transaction"));
        }
        let (xid, row) = (self.xid()?, Row { call, attempt });
        let mut world = self.sim.lock();
        world.append(self.node, What::Insert { xid, row });
        let timeline = world.nodes[self.node].timeline;
        if let Some(transaction) = &mut self.transaction {
            world.work_on(self.node, timeline, transaction.begun_at);
            transaction.rows.push(row);
        }
        Ok(())
    }

    /// The transaction's id, if it has one.
    pub(crate) fn assigned_xid(&self) -> Option<u64> {
        self.transaction.as_ref().and_then(|it| it.xid)
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each statement")]
    async fn carry_out(&mut self, statement: &Statement, answer: &mut Answer) -> Result<Done, SqlError> {
        Ok(match statement {
            Statement::Begin { .. } if self.happens(|troubles| troubles.begin) => return Err(cancelled_by_user()),
            Statement::Begin { read_only, tag } => {
                self.begin_block(*read_only, answer)?;
                Done::tag(tag)
            }
            Statement::Commit => {
                self.warn_of_no_block(answer);
                let failed = self.transaction.as_ref().is_some_and(|it| it.failed);
                if failed {
                    self.abort();
                } else {
                    self.commit(answer).await?;
                }
                Done::tag(if failed { "ROLLBACK" } else { "COMMIT" })
            }
            Statement::Rollback => {
                self.warn_of_no_block(answer);
                self.abort();
                Done::tag("ROLLBACK")
            }
            Statement::RollbackAndChain => {
                let read_only = self.block("ROLLBACK AND CHAIN")?.read_only;
                self.abort();
                self.begin(true);
                // The access mode is kept as it was. `RestoreTransactionCharacteristics` does not check it, so a
                // standby does not refuse it either.
                if let Some(transaction) = &mut self.transaction {
                    transaction.read_only = read_only;
                }
                Done::tag("ROLLBACK")
            }
            Statement::RollbackToSavepoint(name) => self.back_to(name)?,
            Statement::Savepoint(name) => {
                self.block("SAVEPOINT")?.savepoints.push(name.clone());
                Done::tag("SAVEPOINT")
            }
            Statement::Release => Done::tag("RELEASE"),
            Statement::Set { name, value, local } => {
                let before = self.settings.insert(name.clone(), value.clone());
                if let Some(transaction) = &mut self.transaction {
                    transaction.before.push((name.clone(), before, *local));
                }
                Done::tag("SET")
            }
            Statement::Show(name) => match self.setting(name) {
                Some(value) => Done { columns: 1, rows: vec![vec![Some(value)]], tag: "SHOW" },
                None if name.contains('.') => {
                    return Err(SqlError::new("42704", format!("unrecognized configuration parameter \"{name}\"")));
                }
                None => Done { columns: 1, rows: vec![vec![Some("read committed".to_owned())]], tag: "SHOW" },
            },
            Statement::Prepare { name, body } => {
                if self.prepared.contains_key(name) {
                    return Err(SqlError::new("42P05", format!("prepared statement \"{name}\" already exists")));
                }
                self.prepared.insert(name.clone(), Statement::clone(body));
                Done::tag("PREPARE")
            }
            Statement::Execute { name, argument } => match self.prepared.get(name).cloned() {
                Some(Statement::Mark { nonce: None, direct }) => self.mark(argument, direct)?,
                Some(Statement::Enter { direct }) => self.enter(direct)?,
                Some(Statement::Insist { function, expected: None }) => self.insist(&function, argument)?,
                Some(_) => return Err(self.unknown(name)),
                None => {
                    return Err(SqlError::new("26000", format!("prepared statement \"{name}\" does not exist")));
                }
            },
            Statement::Deallocate => {
                self.prepared.clear();
                Done::tag("DEALLOCATE ALL")
            }
            Statement::Insert(Some(row)) => {
                self.write(*row)?;
                Done::tag("INSERT 0 1")
            }
            Statement::Sleep(duration) => {
                let cancelled = self.cancel.notified();
                tokio::select! {
                    biased;
                    () = cancelled => return Err(cancelled_by_user()),
                    () = sleep(*duration) => self.thaw().await,
                }
                Done::row(vec![Some(String::new())])
            }
            Statement::PromotionWait { step, steps } => {
                self.promotion(Instant::now() + *step * *steps).await;
                // A row without columns says that the wait is over.
                if self.of_node(|node| node.recovery) { Done::nothing(0) } else { Done::row(Vec::new()) }
            }
            Statement::Mark { nonce: Some(nonce), direct } => self.mark(nonce, *direct)?,
            Statement::Insist { function, expected: Some(expected) } => self.insist(function, expected)?,
            Statement::History { position, nonce } => self.history(*position, nonce)?,
            Statement::Files { timeline } => {
                let there = self.of_node(|node| node.segments.contains(timeline));
                Done::row(vec![Some(if there { "t" } else { "f" }.to_owned())])
            }
            Statement::Signed(ids) => {
                let own = self.xid()?;
                let all = self.of_node(|node| {
                    let is = |(id, committed): &(u64, bool)| {
                        *id < own && node.status(*id) == Some(if *committed { "committed" } else { "aborted" })
                    };
                    ids.iter().all(is)
                });
                Done::row(vec![Some(if all { "t" } else { "f" }.to_owned())])
            }
            Statement::Raise { which, at_commit: false } => return Err(raised(*which)),
            Statement::Raise { which, at_commit: true } => {
                if let Some(transaction) = &mut self.transaction {
                    transaction.raises = Some(*which);
                }
                Done::nothing(1)
            }
            Statement::Enter { direct } => self.enter(*direct)?,
            Statement::Fence(id) => self.fence_entry(*id).await?,
            Statement::HasEntry(id) => self.has_entry(*id),
            Statement::Listen => self.listen()?,
            Statement::Channels => self.channels(),
            Statement::Unlimited => Done::nothing(0),
            Statement::Stay => Done::row(vec![Some("0".to_owned())]),
            Statement::Notify(call) => {
                self.not_during_recovery("NOTIFY")?;
                self.transaction.iter_mut().for_each(|transaction| transaction.tells.push(*call));
                Done::row(vec![Some(String::new())])
            }
            Statement::Prune if self.is_read_only() => {
                return Err(SqlError::new(READ_ONLY, "cannot execute DELETE in a read-only transaction"));
            }
            Statement::Prune => Done::tag("DELETE 0"),
            Statement::Terminate { pid, xid } => self.end_abandoned(*pid, *xid),
            Statement::TerminateInDoubt { pid, whose } => self.end_in_doubt(*pid, whose),
            Statement::TerminateUnmarked { pid, whose } => self.end_unmarked(*pid, whose),
            Statement::Ends { pid, xid } => Done::row(vec![self.ends(*pid, *xid)]),
            Statement::Columns(list) => {
                let values: Result<Vec<_>, _> = list.iter().map(|column| value_of(self, column)).collect();
                Done::row(values?)
            }
            Statement::Unknown(text) => return Err(self.unknown(text)),
            Statement::Insert(None) | Statement::Mark { nonce: None, .. } | Statement::Insist { .. } => {
                return Err(self.unknown("a parameter"));
            }
        })
    }
}

fn cancelled_by_user() -> SqlError {
    SqlError::new("57014", "canceling statement due to user request")
}
