//! The extended protocol: statements that are parsed, bound to their values and carried out.

use crate::proto::Answer;
use crate::session::Session;
use crate::sql::{SqlError, Statement, parse};

/// A statement with its values.
#[derive(Debug)]
pub(crate) enum Bound {
    Insert([i64; 2]),
    Other(Statement),
}

impl Session {
    /// Parses a statement, and keeps it by its name.
    pub(crate) fn keep(&mut self, name: String, sql: &str) -> Result<(), SqlError> {
        let statement = parse(sql);
        if self.transaction.as_ref().is_some_and(|it| it.failed) && !statement.ends_a_failure() {
            return Err(SqlError::new("25P02", "current transaction is aborted"));
        }
        self.prepared.insert(name, statement);
        Ok(())
    }

    pub(crate) fn kept(&self, name: &str) -> Statement {
        self.prepared.get(name).cloned().unwrap_or_else(|| Statement::Unknown(name.to_owned()))
    }

    pub(crate) fn close(&mut self, name: &str) {
        self.prepared.remove(name);
    }

    /// Binds a statement. One that SQL has prepared is known here, too.
    pub(crate) fn bind(&self, name: &str, values: &[Option<Vec<u8>>]) -> Result<Bound, SqlError> {
        let Some(statement) = self.prepared.get(name) else {
            return Err(SqlError::new("26000", format!("prepared statement \"{name}\" does not exist")));
        };
        let number = |at: usize| Some(i64::from_be_bytes(values.get(at)?.as_deref()?.try_into().ok()?));
        let text = || Some(String::from_utf8_lossy(values.first()?.as_deref()?).into_owned());
        let bound = match statement {
            Statement::Insert(None) => number(0).zip(number(1)).map(|(call, attempt)| Bound::Insert([call, attempt])),
            Statement::Mark { nonce: None, .. } => {
                text().map(|argument| Bound::Other(Statement::Execute { name: name.to_owned(), argument }))
            }
            Statement::Enter { .. } => {
                Some(Bound::Other(Statement::Execute { name: name.to_owned(), argument: String::new() }))
            }
            Statement::Begin { .. } => Some(Bound::Other(statement.clone())),
            _ => None,
        };
        bound.ok_or_else(|| self.unknown("a bound statement"))
    }

    /// Carries out a bound statement. Its rows are not described.
    pub(crate) async fn execute(&mut self, bound: Bound, answer: &mut Answer) -> Result<(), SqlError> {
        let statement = match bound {
            Bound::Insert(row) => return self.insert(row, answer).await.map(|()| answer.complete("INSERT 0 1")),
            Bound::Other(statement) => statement,
        };
        self.message += 1;
        match self.one(&statement, true, answer).await {
            Ok(done) => {
                done.rows.iter().for_each(|row| answer.row(row));
                answer.complete(done.tag);
                Ok(())
            }
            Err(error) => {
                self.ended |= error.fatal;
                self.fail();
                Err(error)
            }
        }
    }

    /// `INSERT` with parameters.
    async fn insert(&mut self, row: [i64; 2], answer: &mut Answer) -> Result<(), SqlError> {
        self.message += 1;
        if self.transaction.as_ref().is_some_and(|it| it.failed) {
            return Err(SqlError::new("25P02", "current transaction is aborted"));
        }
        if self.transaction.is_none() {
            self.begin(false);
        }
        let done = async {
            self.write(row)?;
            if self.transaction.as_ref().is_some_and(|it| !it.block) { self.commit(answer).await } else { Ok(()) }
        };
        let done = done.await;
        if done.is_err() {
            self.fail();
        }
        done
    }
}
