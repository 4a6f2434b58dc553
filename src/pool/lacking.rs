//! What the role may not ask the primary for. Transactions find this out, do without it for a while, and then try
//! again.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::lock;
use crate::topology::GenerationId;

/// When to try again, as the privilege may have been granted.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// The functions by which a COMMIT's message checks for the pool's own transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Check {
    /// As a statement of the session's: to run it costs the server a quarter of what planning it does.
    #[default]
    Prepared,
    /// The same, not prepared.
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
            // They call the same function.
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
    /// When that was found; `None` means that it is tried again.
    since: Option<Instant>,
}

#[derive(Debug, Default)]
struct Weakened {
    check: Check,
    since: Option<Instant>,
    said: bool,
    /// What is prepared does not last: a proxy gives each transaction another session, or a closure deallocates it.
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

    /// How a COMMIT checks for its transaction.
    pub(crate) fn check(&self) -> Check {
        let mut weakened = lock(&self.check);
        if weakened.since.is_some_and(|since| since.elapsed() >= REFUSED_FOR) {
            (weakened.check, weakened.since) = (Check::default(), None);
        }
        let strongest = if weakened.unprepared { Check::Full } else { Check::Prepared };
        weakened.check.max(strongest)
    }

    /// COMMIT was not reached, as its prepared check was gone. Each such attempt has to run again, so none is prepared any more.
    pub(crate) fn check_is_gone(&self) {
        lock(&self.check).unprepared = true;
    }

    /// Remembers that the check was refused, so that COMMIT was not reached. Logs it the first time.
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
