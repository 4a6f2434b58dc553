//! Judges a failed attempt by its closure's error and by the state of its session. The session counts even if the
//! closure has replaced the server's error by an error of its own.
//!
//! Pure. The table in `decide` says what follows from the verdict.

use std::error::Error as StdError;

use tokio_postgres::error::DbError;

use crate::classify::{
    Recurs, Verdict, classify, classify_chain, classify_report, ends_session, links, may_be_stale, misfits, recurs,
    report_in_chain, verdict_of_end,
};
use crate::error::{Error, InDoubt, RolledBack, SessionEnded};
use crate::topology::GenerationId;

/// What the closure's error alone says.
#[derive(Clone, Copy, Debug)]
pub(super) enum ClosureError<'a> {
    /// The error is the final error of another call of a pool. That call's outcome may be unknown, or its retries are
    /// used up.
    OtherCall,
    /// The error contains a database error.
    Database(Verdict, Option<&'a DbError>),
    /// The error contains no error that this crate knows.
    Nothing,
}

impl<'a> ClosureError<'a> {
    pub(super) fn of(error: &'a Error) -> Self {
        match error {
            Error::Database(error) => Self::Database(classify(error), error.as_db_error()),
            Error::Aborted(source) => Self::of_own(source.as_ref()),
            Error::SessionEnded(ended) => Self::Database(verdict_of_end(ended.report()), Some(ended.report())),
            _ => Self::OtherCall,
        }
    }

    fn of_own(error: &'a (dyn StdError + 'static)) -> Self {
        if links(error).any(<dyn StdError>::is::<InDoubt>) {
            return Self::OtherCall;
        }
        match links(error).find_map(|link| link.downcast_ref::<Error>()) {
            Some(Error::Database(error)) => Self::Database(classify(error), error.as_db_error()),
            Some(_) => Self::OtherCall,
            None => match classify_chain(error) {
                Some(verdict) => Self::Database(verdict, report_in_chain(error)),
                None => Self::Nothing,
            },
        }
    }

    pub(super) fn report(self) -> Option<&'a DbError> {
        match self {
            Self::Database(_, report) => report,
            Self::OtherCall | Self::Nothing => None,
        }
    }

    fn verdict(self) -> Option<Verdict> {
        match self {
            Self::Database(verdict, _) => Some(verdict),
            Self::OtherCall | Self::Nothing => None,
        }
    }
}

/// The state of the session after the closure has failed.
#[derive(Clone, Debug)]
pub(super) enum Session {
    /// The session is open, and as far as the pool knows, its transaction is open, too.
    Open,
    /// The server has aborted the transaction with this error.
    Aborted(DbError),
    /// The session has ended, with this report if there was one.
    Ended(Option<DbError>),
}

impl Session {
    /// The server's report about the end of the transaction.
    pub(super) fn report(&self) -> Option<&DbError> {
        match self {
            Self::Open => None,
            Self::Aborted(report) => Some(report),
            Self::Ended(report) => report.as_ref(),
        }
    }
}

/// The verdict on an attempt whose closure has failed.
pub(super) fn judge(closure_error: ClosureError<'_>, session: &Session) -> Verdict {
    match (closure_error, session) {
        (ClosureError::OtherCall, _) => Verdict::Application,
        (_, Session::Ended(Some(report))) => verdict_of_end(report),
        (ClosureError::Database(_, Some(report)), Session::Ended(None)) if ends_session(report) => {
            verdict_of_end(report)
        }
        (_, Session::Ended(None)) => Verdict::ConnectionLost,
        (closure_error, session) => {
            let said = closure_error.verdict().unwrap_or(Verdict::Application);
            let met = session.report().map(classify_report);
            met.filter(|met| passes(*met) && !passes(said)).unwrap_or(said)
        }
    }
}

/// The verdict on an attempt that failed before the closure ran. The work cannot have ended this session.
pub(super) fn judge_begin(error: &Error) -> Verdict {
    match (ClosureError::of(error), error) {
        // The connection has a failed transaction of its previous user, or it reaches another server now.
        (ClosureError::Database(Verdict::Aborted, _), _) | (_, Error::RolledBack(_)) => Verdict::ConnectionLost,
        (ClosureError::Database(Verdict::Application, Some(report)), _) if ends_session(report) => {
            Verdict::ConnectionLost
        }
        (closure_error, _) => closure_error.verdict().unwrap_or(Verdict::Application),
    }
}

/// The verdict on an attempt whose COMMIT was in doubt, and that settling found not to be committed. The server may
/// have ended the session because of this work, for instance during a deferred trigger.
pub(super) fn judge_absent(verdict: Verdict, session: &Session) -> Verdict {
    match session {
        Session::Ended(Some(report)) => verdict_of_end(report),
        _ => verdict,
    }
}

/// Returns whether the same work may succeed on another session or later.
pub(super) fn passes(verdict: Verdict) -> bool {
    match verdict {
        Verdict::ConnectionLost
        | Verdict::NotNow
        | Verdict::Full
        | Verdict::ReadOnly
        | Verdict::Conflict
        | Verdict::OutcomeUnknown
        | Verdict::Stale => true,
        Verdict::Aborted | Verdict::Refused | Verdict::NotPostgres | Verdict::Application => false,
    }
}

/// Returns whether the failure may come from a statement that was prepared before a type was changed. `statements`: the
/// session had prepared statements when the attempt began.
pub(super) fn perhaps_stale(closure_error: ClosureError<'_>, session: &Session, statements: bool) -> bool {
    let report = closure_error.report().or(session.report());
    statements && !matches!(session, Session::Ended(_)) && report.is_some_and(may_be_stale)
}

/// Returns whether the closure's error says that a Rust type does not take the type of a value; see [`misfits`].
pub(super) fn is_misfit(error: &Error) -> bool {
    match error {
        Error::Database(error) => misfits(error),
        Error::Aborted(own) => !matches!(ClosureError::of(error), ClosureError::OtherCall) && misfits(own.as_ref()),
        _ => false,
    }
}

/// Returns the failure of an attempt whose generation has ended. The session of a wrapped pool may still be open then,
/// because its driver is not this crate's.
pub(super) fn evicted() -> (Verdict, Error) {
    (Verdict::ConnectionLost, Error::RolledBack(RolledBack::LostWithPrimary))
}

/// Adds the reason of the session's end to the error, unless the error shows it already.
pub(super) fn with_reason(error: Error, verdict: Verdict, session: Session) -> Error {
    let Session::Ended(report) = session else { return error };
    let said = ClosureError::of(&error);
    let Some(report) = report.or_else(|| said.report().filter(|report| ends_session(report)).cloned()) else {
        return error;
    };
    if matches!(said, ClosureError::OtherCall) || (passes(verdict) && said.report().is_some()) {
        return error;
    }
    Error::SessionEnded(Box::new(SessionEnded::new(report, error)))
}

/// The limits that a call's earlier attempts set to further ones.
#[derive(Debug, Default)]
pub(super) struct Bounds {
    stale: u32,
    ended: Option<(String, GenerationId)>,
}

impl Bounds {
    /// Returns whether an attempt has met a stale statement.
    pub(super) fn met_stale(&self) -> bool {
        self.stale > 0
    }

    /// Changes the verdict to [`Verdict::Application`] if the same failure has happened before, because it would then
    /// repeat for ever. `fresh_after`: after so many failures of one call, no connection has a stale statement any
    /// more.
    pub(super) fn narrow(
        &mut self,
        verdict: Verdict,
        end: Option<&DbError>,
        generation: GenerationId,
        fresh_after: u32,
    ) -> Verdict {
        if verdict == Verdict::Stale {
            self.stale += 1;
            return if self.stale > fresh_after { Verdict::Application } else { verdict };
        }
        let perhaps = end.filter(|report| recurs(report) == Recurs::Perhaps);
        let ended = perhaps.map(|report| (report.code().code().to_owned(), generation));
        let again = ended.is_some() && ended == self.ended;
        self.ended = ended;
        if again { Verdict::Application } else { verdict }
    }
}

#[cfg(test)]
mod tests {
    use tokio_postgres::types::{Type, WrongType};

    use super::*;
    use crate::classify::tests::reported;
    use crate::commit::Unsettled;
    use crate::error::CommitUnknown;

    /// An error as applications define it: `source()` skips the wrapped error and returns the source of that error.
    #[derive(Debug, thiserror::Error)]
    enum App {
        #[error(transparent)]
        Pool(#[from] Error),
        #[error("application")]
        Named(#[source] Error),
    }

    fn verdict_of(error: &Error) -> Verdict {
        judge(ClosureError::of(error), &Session::Open)
    }

    /// Only the driver can construct its errors; this one comes from a connection string.
    fn driver_error() -> tokio_postgres::Error {
        "host=h port=x".parse::<tokio_postgres::Config>().unwrap_err()
    }

    #[test]
    fn the_doubt_of_another_call_is_met_before_its_lost_connection() {
        for wrap in [App::Pool, App::Named] {
            let doubt = Error::CommitUnknown(Box::new(CommitUnknown::new(Some(driver_error()), Unsettled::NoMark)));
            let links: Vec<String> = links(&wrap(doubt)).map(ToString::to_string).collect();
            assert!(links.iter().any(|link| link == "the outcome of a commit is not known"), "{links:?}");
            let doubt = Error::CommitUnknown(Box::new(CommitUnknown::new(Some(driver_error()), Unsettled::NoMark)));
            assert_eq!(
                judge(ClosureError::of(&Error::abort(wrap(doubt))), &Session::Ended(None)),
                Verdict::Application
            );
        }
    }

    #[test]
    fn a_database_error_within_an_own_one_decides() {
        let expected = classify(&driver_error());
        assert_ne!(expected, Verdict::Application, "the test needs a verdict that shows");
        for wrap in [App::Pool, App::Named] {
            assert_eq!(verdict_of(&Error::abort(wrap(Error::Database(driver_error())))), expected);
        }
        assert_eq!(verdict_of(&Error::abort("own")), Verdict::Application);
        assert_eq!(verdict_of(&Error::abort(App::Pool(Error::Closed))), Verdict::Application);
    }

    #[test]
    fn a_value_that_does_not_fit_its_type_is_found_at_any_depth() {
        #[derive(Debug, thiserror::Error)]
        #[error("reading failed")]
        struct Reading(#[source] WrongType);

        let wrong = || WrongType::new::<i32>(Type::TEXT);
        for error in [
            Error::abort(wrong()),
            Error::abort(Reading(wrong())),
            Error::abort(anyhow::Error::new(Reading(wrong()))),
            Error::abort(anyhow::Error::new(Reading(wrong())).context("with a context")),
            Error::abort(eyre::Report::new(Reading(wrong()))),
            Error::abort_report(anyhow::Error::new(Reading(wrong()))),
        ] {
            assert!(is_misfit(&error), "{error:?}");
        }
        for error in [Error::abort("own"), Error::abort(App::Named(Error::Database(driver_error()))), Error::Closed] {
            assert!(!is_misfit(&error), "{error:?}");
        }
    }

    #[test]
    fn what_the_session_has_met_counts_and_the_word_of_another_call_more() {
        let text = Error::abort("own");
        let other = Error::abort(App::Named(Error::Closed));
        assert_eq!(judge(ClosureError::of(&text), &Session::Open), Verdict::Application);
        assert_eq!(judge(ClosureError::of(&text), &Session::Ended(None)), Verdict::ConnectionLost);
        assert_eq!(judge(ClosureError::of(&other), &Session::Ended(None)), Verdict::Application);
    }

    #[test]
    fn what_ended_a_session_during_commit_counts() {
        let doubt = Verdict::OutcomeUnknown;
        for (code, expected) in [("25P04", Verdict::Application), ("57P01", Verdict::ConnectionLost)] {
            let report = reported("FATAL", code, "terminating connection", Some("ProcessInterrupts"));
            assert_eq!(judge_absent(doubt, &Session::Ended(Some(report))), expected, "{code}");
        }
        for session in [Session::Open, Session::Ended(None)] {
            assert_eq!(judge_absent(doubt, &session), doubt, "{session:?}");
        }
    }

    #[test]
    fn a_stale_statement_is_met_once() {
        let id = GenerationId::default();
        for fresh_after in [1, 3] {
            let mut bounds = Bounds::default();
            for _ in 0..fresh_after {
                assert_eq!(bounds.narrow(Verdict::Stale, None, id, fresh_after), Verdict::Stale);
                assert_eq!(bounds.narrow(Verdict::ConnectionLost, None, id, fresh_after), Verdict::ConnectionLost);
            }
            assert_eq!(bounds.narrow(Verdict::Stale, None, id, fresh_after), Verdict::Application);
        }
    }

    #[test]
    fn an_end_that_nobody_knows_is_run_again_once() {
        let one = GenerationId::default();
        let memory = reported("FATAL", "53200", "out of memory", Some("somewhere"));
        let strange = reported("FATAL", "XX000", "what is this", Some("somewhere"));
        let admin = reported("FATAL", "57P01", "terminating connection", Some("somewhere"));
        let lost = Verdict::ConnectionLost;
        let mut bounds = Bounds::default();
        assert_eq!(bounds.narrow(lost, Some(&memory), one, 1), lost);
        assert_eq!(bounds.narrow(lost, Some(&strange), one, 1), lost, "another one");
        assert_eq!(bounds.narrow(lost, Some(&strange), one, 1), Verdict::Application);
        for _ in 0..9 {
            assert_eq!(bounds.narrow(lost, Some(&admin), one, 1), lost, "a failover takes as long as it takes");
            assert_eq!(bounds.narrow(lost, None, one, 1), lost);
        }
        assert_eq!(bounds.narrow(lost, Some(&strange), one, 1), lost, "not in a row");
    }
}
