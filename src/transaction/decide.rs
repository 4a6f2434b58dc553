//! The table that says what follows from a failed attempt: mode × stage × verdict → next.
//!
//! Pure. If the table says that the work runs again, the retry policy is asked whether it allows another attempt. The
//! policy can only refuse.

use crate::classify::Verdict;

/// What the caller allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Run again only work that is known not to be committed. If that is unknown, find it out.
    Exactly,
    /// Run again only work that is known not to be committed. If that is unknown, give up.
    Once,
    /// Applying the work twice has the same effect as once.
    Idempotent,
    /// Nothing is written.
    Read,
}

/// How far an attempt had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// COMMIT was not sent.
    Body,
    /// COMMIT's message was sent, and the transaction is not committed. The answer proves that, or settling has found
    /// it out.
    Refused,
    /// COMMIT was sent, and it is unknown whether it was carried out.
    InDoubt,
}

/// What to do with a failed attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Give the caller the error.
    Return,
    /// Run the closure again.
    Rerun,
    /// Find out whether the work was committed (`Unanswered::settled` in `attempt.rs`).
    Settle,
    /// Tell the caller that the outcome is unknown.
    Unknown,
}

/// `verdict`: here [`Verdict::ReadOnly`] means that the *server* refuses writes. If the transaction made itself
/// read-only, the verdict is [`Verdict::Application`].
///
/// `decision`: what the user's hook has decided: run again, or do not. It counts only if the attempt is known not to be
/// committed. So no hook can make a commit with an unknown outcome run again.
#[deny(clippy::wildcard_enum_match_arm)]
pub(super) fn decide(mode: Mode, stage: Stage, verdict: Verdict, decision: Option<bool>) -> Next {
    seen!("decide", "{mode:?} {stage:?} {verdict:?} {decision:?}");
    #[cfg(failover_sim)]
    if let Some(wrong) = planted(mode, stage, verdict, decision) {
        return wrong;
    }
    match (stage, mode) {
        (Stage::InDoubt, Mode::Exactly) => return Next::Settle,
        (Stage::InDoubt, Mode::Once) => return Next::Unknown,
        // The reads of a serializable transaction are valid only if its COMMIT succeeds, so `Read` runs again, too.
        (Stage::InDoubt, Mode::Idempotent | Mode::Read) => return Next::Rerun,
        (Stage::Body | Stage::Refused, _) => {}
    }
    match decision {
        Some(true) => return Next::Rerun,
        Some(false) => return Next::Return,
        None => {}
    }
    match verdict {
        Verdict::ConnectionLost | Verdict::NotNow | Verdict::Full | Verdict::ReadOnly | Verdict::Conflict => {
            Next::Rerun
        }
        // Before COMMIT was sent, "unknown" is about a statement of a transaction that was rolled back. A stale
        // statement was removed from its session, or the session is closed. If it happens again, `Bounds` changes the
        // verdict.
        Verdict::OutcomeUnknown | Verdict::Stale => Next::Rerun,
        Verdict::Aborted | Verdict::Refused | Verdict::NotPostgres | Verdict::Application => Next::Return,
    }
}

/// The deliberate faults of the simulation in this table; see `planted!`.
#[cfg(failover_sim)]
fn planted(mode: Mode, stage: Stage, verdict: Verdict, decision: Option<bool>) -> Option<Next> {
    match (stage, mode, decision, verdict) {
        (Stage::InDoubt, Mode::Exactly, _, _) if planted!("runs again in doubt") => Some(Next::Rerun),
        (Stage::InDoubt, ..) => None,
        (_, _, Some(false), _) if planted!("ignores the user's word") => Some(Next::Rerun),
        (_, _, Some(_), _) => None,
        (_, _, _, Verdict::Conflict) if planted!("returns a conflict") => Some(Next::Return),
        (_, _, _, Verdict::ReadOnly) if planted!("returns a refusal to write") => Some(Next::Return),
        (_, _, _, Verdict::Application) if planted!("runs again what would fail again") => Some(Next::Rerun),
        _ => None,
    }
}

/// Returns what follows if the closure has made another call, and that call's outcome is unknown (`inner`). Then the
/// work does not run again in any mode, whatever the user's hook says: it would apply the other call's work twice.
pub(super) fn unless_in_doubt(next: Next, mode: Mode, stage: Stage, inner: bool) -> Next {
    match next {
        Next::Rerun if inner && planted!("runs again behind a call in doubt") => next,
        Next::Rerun if inner && stage == Stage::InDoubt && mode != Mode::Read => Next::Unknown,
        Next::Rerun if inner => Next::Return,
        next => next,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECISIONS: [Option<bool>; 3] = [None, Some(true), Some(false)];
    const MODES: [Mode; 4] = [Mode::Exactly, Mode::Once, Mode::Idempotent, Mode::Read];
    const VERDICTS: [Verdict; 11] = [
        Verdict::ConnectionLost,
        Verdict::NotNow,
        Verdict::Full,
        Verdict::ReadOnly,
        Verdict::Conflict,
        Verdict::OutcomeUnknown,
        Verdict::Aborted,
        Verdict::Stale,
        Verdict::Refused,
        Verdict::NotPostgres,
        Verdict::Application,
    ];

    #[test]
    fn an_unknown_commit_is_never_run_again_unless_the_caller_allows_it() {
        for verdict in VERDICTS {
            for decision in DECISIONS {
                let next = |mode| decide(mode, Stage::InDoubt, verdict, decision);
                assert_eq!(next(Mode::Exactly), Next::Settle, "{verdict:?} {decision:?}");
                assert_eq!(next(Mode::Once), Next::Unknown, "{verdict:?} {decision:?}");
                assert_eq!(next(Mode::Idempotent), Next::Rerun, "{verdict:?} {decision:?}");
                assert_eq!(next(Mode::Read), Next::Rerun, "{verdict:?} {decision:?}");
            }
        }
    }

    #[test]
    fn nothing_runs_again_behind_another_call_in_doubt() {
        for (mode, verdict) in MODES.into_iter().flat_map(|mode| VERDICTS.map(|verdict| (mode, verdict))) {
            for stage in [Stage::Body, Stage::Refused, Stage::InDoubt] {
                for decision in DECISIONS {
                    let what = format!("{mode:?} {stage:?} {verdict:?} {decision:?}");
                    let next = decide(mode, stage, verdict, decision);
                    assert_eq!(unless_in_doubt(next, mode, stage, false), next, "{what}");
                    let in_doubt = unless_in_doubt(next, mode, stage, true);
                    assert!(in_doubt != Next::Rerun, "{what}");
                    let is_unknown = stage == Stage::InDoubt && mode != Mode::Read;
                    assert_eq!(matches!(in_doubt, Next::Unknown | Next::Settle), is_unknown, "{what}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_committed_follows_the_users_word() {
        for mode in MODES {
            for stage in [Stage::Body, Stage::Refused] {
                for verdict in VERDICTS {
                    assert_eq!(decide(mode, stage, verdict, Some(true)), Next::Rerun, "{mode:?} {stage:?} {verdict:?}");
                    assert_eq!(
                        decide(mode, stage, verdict, Some(false)),
                        Next::Return,
                        "{mode:?} {stage:?} {verdict:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_a_failover_causes_is_run_again_in_every_mode() {
        for mode in MODES {
            for stage in [Stage::Body, Stage::Refused] {
                for verdict in VERDICTS {
                    let lasts = matches!(
                        verdict,
                        Verdict::Aborted | Verdict::Refused | Verdict::NotPostgres | Verdict::Application
                    );
                    let expected = if lasts { Next::Return } else { Next::Rerun };
                    assert_eq!(decide(mode, stage, verdict, None), expected, "{mode:?} {stage:?} {verdict:?}");
                }
            }
        }
    }
}
