//! Remembers what the role may not ask the primary for. A transaction finds this out. Then the transactions do without
//! it for a while, and try again later.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::lock;
use crate::topology::GenerationId;

/// How long transactions do without what was refused. Then they try again, because the privilege may have been granted.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// The functions by which a COMMIT's message checks for the pool's own transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Check {
    /// A prepared statement of the session. Executing it costs the server a quarter of planning it.
    #[default]
    Prepared,
    /// The same statement, not prepared.
    Full,
    /// Other functions with nearly the same result.
    Other,
    /// No function: the check uses `SHOW`, and does not stop the COMMIT.
    ByShow,
}

impl Check {
    /// The check to use after this one was refused.
    fn weaker(self) -> Self {
        match self {
            // Both call the same function, so both are refused together.
            Self::Prepared | Self::Full => Self::Other,
            Self::Other | Self::ByShow => Self::ByShow,
        }
    }
}

/// What the transactions of a pool must do without.
#[derive(Debug, Default)]
pub(crate) struct Lacking {
    mark: Mutex<Option<Unmarked>>,
    check: Mutex<Weakened>,
}

/// A primary whose transactions cannot be marked.
#[derive(Debug)]
struct Unmarked {
    id: GenerationId,
    why: String,
    /// When that was found out. `None` means that marking is tried again.
    since: Option<Instant>,
}

#[derive(Debug, Default)]
struct Weakened {
    check: Check,
    since: Option<Instant>,
    said: bool,
    /// Prepared statements do not last on these sessions: a proxy gives each transaction another session, or a closure
    /// deallocates them.
    unprepared: bool,
}

impl Lacking {
    /// Returns whether this primary's transactions cannot be marked.
    pub(crate) fn is_unmarked(&self, id: GenerationId) -> bool {
        let mut mark = lock(&self.mark);
        let Some(unmarked) = mark.as_mut().filter(|unmarked| unmarked.id == id) else { return false };
        unmarked.since = unmarked.since.filter(|since| since.elapsed() < REFUSED_FOR);
        unmarked.since.is_some()
    }

    pub(super) fn why_unmarked(&self, id: GenerationId) -> Option<String> {
        let mark = lock(&self.mark);
        mark.as_ref().filter(|unmarked| unmarked.id == id && unmarked.since.is_some()).map(|it| it.why.clone())
    }

    /// Remembers that this primary's transactions cannot be marked, and logs it the first time.
    pub(crate) fn set_unmarked(&self, id: GenerationId, why: &str) {
        let before = lock(&self.mark).replace(Unmarked { id, why: why.to_owned(), since: Some(Instant::now()) });
        if before.is_none_or(|before| before.why != why) {
            tracing::warn!(why, "transactions cannot be settled here: ExactlyOnce is AtMostOnce");
        }
    }

    /// Returns how a COMMIT checks for its transaction.
    pub(crate) fn check(&self) -> Check {
        let mut weakened = lock(&self.check);
        if weakened.since.is_some_and(|since| since.elapsed() >= REFUSED_FOR) {
            (weakened.check, weakened.since) = (Check::default(), None);
        }
        let strongest = if weakened.unprepared { Check::Full } else { Check::Prepared };
        weakened.check.max(strongest)
    }

    /// Notes that a COMMIT did not run because its prepared check was gone. Each such attempt has to run again, so from
    /// now on the check is not prepared.
    pub(crate) fn check_is_gone(&self) {
        lock(&self.check).unprepared = true;
    }

    /// Remembers that the check was refused, so that COMMIT did not run. Logs this the first time.
    pub(crate) fn check_refused(&self, refused: Check, why: &str) {
        let mut weakened = lock(&self.check);
        weakened.check = weakened.check.max(refused.weaker());
        weakened.since = weakened.since.or(Some(Instant::now()));
        if !std::mem::replace(&mut weakened.said, true) {
            tracing::warn!(
                why,
                "this role may not call what COMMIT looks for its transaction by; another way is taken"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: GenerationId = GenerationId(1);

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_is_tried_again_after_a_while() {
        let lacking = Lacking::default();
        assert_eq!((lacking.is_unmarked(ONE), lacking.check()), (false, Check::Prepared));
        lacking.set_unmarked(ONE, "no right");
        lacking.check_refused(Check::Full, "no right");
        lacking.check_refused(Check::Full, "two transactions met it");
        assert!(lacking.is_unmarked(ONE) && !lacking.is_unmarked(GenerationId(2)));
        assert_eq!((lacking.why_unmarked(ONE), lacking.check()), (Some("no right".to_owned()), Check::Other));
        lacking.check_refused(Check::Other, "no right");
        assert_eq!(lacking.check(), Check::ByShow);
        tokio::time::advance(REFUSED_FOR).await;
        assert_eq!((lacking.is_unmarked(ONE), lacking.check()), (false, Check::Prepared));
        lacking.check_is_gone();
        tokio::time::advance(REFUSED_FOR).await;
        assert_eq!(lacking.check(), Check::Full);
        assert_eq!(lacking.why_unmarked(ONE), None);
    }
}
