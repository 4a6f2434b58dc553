//! Remembers what the transactions of a pool must do without. There are two cases. If the role may not call a function,
//! the first transaction that is refused notes this here; the pool's transactions use a weaker way for a minute, and
//! then they try again. If prepared statements do not last on the pool's sessions, this is remembered for good.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use crate::sync::lock;
use crate::topology::GenerationId;

/// How long transactions do without a function that was refused. Then they try again, because the privilege may have
/// been granted.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Why transactions cannot be marked if the server's life is not known.
pub(crate) const UNIDENTIFIED: &str = "this role may not read the server's identity: its system identifier, start \
                                       time, timeline and the end of its last replay";

/// How COMMIT's message checks that the open transaction is the pool's own. A later variant is weaker, and so it
/// compares as greater. [`Full`](Self::Full) checks the same as [`Prepared`](Self::Prepared).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Check {
    /// A prepared statement of the session. The server executes it in a quarter of the time that it needs to plan the
    /// same statement.
    #[default]
    Prepared,
    /// The same statement as text.
    Full,
    /// A statement with other functions, which have nearly the same result.
    Other,
    /// `SHOW`, which needs no right. It does not fail on a wrong value, so COMMIT runs in any case, and the pool
    /// compares the value afterwards.
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
    /// The primary on which a BEGIN has failed that travelled with the first statement, and when.
    begin: Mutex<Option<(GenerationId, Instant)>>,
}

/// A primary on which the role cannot write the mark of a transaction, so that a COMMIT in doubt cannot be settled.
#[derive(Debug)]
struct Unmarked {
    id: GenerationId,
    why: String,
    /// When the mark was refused. `is_unmarked` clears this after [`REFUSED_FOR`], so that the next transaction tries
    /// again.
    since: Option<Instant>,
}

/// The check that is used instead of the strongest one.
#[derive(Debug, Default)]
struct Weakened {
    check: Check,
    since: Option<Instant>,
    /// The operator was told.
    said: bool,
    /// Prepared statements do not last on these sessions, because a proxy gives each transaction another session, or a
    /// closure deallocates them. This never expires.
    unprepared: bool,
}

impl Lacking {
    /// Returns whether this primary's transactions cannot be marked. After [`REFUSED_FOR`] it is tried again. If the
    /// server was not `identified` before and is now, it is tried at once.
    pub(crate) fn is_unmarked(&self, id: GenerationId, identified: bool) -> bool {
        let mut mark = lock(&self.mark);
        let Some(unmarked) = mark.as_mut().filter(|unmarked| unmarked.id == id) else { return false };
        if identified && unmarked.why == UNIDENTIFIED {
            unmarked.since = None;
        }
        unmarked.since = unmarked.since.filter(|since| since.elapsed() < REFUSED_FOR);
        unmarked.since.is_some()
    }

    /// Returns the server's words if this primary's transactions cannot be marked.
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

    /// Returns whether BEGIN may travel with the first statement of a transaction on this primary.
    pub(crate) fn may_begin_travel(&self, id: GenerationId) -> bool {
        let mut begin = lock(&self.begin);
        *begin = begin.filter(|(failed, since)| *failed == id && since.elapsed() < REFUSED_FOR);
        begin.is_none()
    }

    /// Notes that a BEGIN has failed which travelled with the first statement. For a while, BEGIN is a message of its
    /// own on this primary, so that its error is known as such.
    pub(crate) fn begin_does_not_travel(&self, id: GenerationId) {
        *lock(&self.begin) = Some((id, Instant::now()));
    }

    /// Returns how a COMMIT checks for its transaction.
    pub(crate) fn check(&self) -> Check {
        let mut weakened = lock(&self.check);
        if weakened.since.is_some_and(|since| since.elapsed() >= REFUSED_FOR) {
            (weakened.check, weakened.since) = (Check::default(), None);
        }
        // `max`: the weaker of the two.
        let strongest = if weakened.unprepared { Check::Full } else { Check::Prepared };
        weakened.check.max(strongest)
    }

    /// Notes that a COMMIT did not run because its prepared check was missing. From now on the check is sent as text,
    /// for good, because each such miss costs another run of the work.
    pub(crate) fn check_is_gone(&self) {
        lock(&self.check).unprepared = true;
    }

    /// Notes that the server refused the check, and that COMMIT therefore did not run. Logs this the first time.
    pub(crate) fn check_refused(&self, refused: Check, why: &str) {
        let mut weakened = lock(&self.check);
        weakened.check = weakened.check.max(refused.weaker());
        weakened.since = weakened.since.or(Some(Instant::now()));
        if !std::mem::replace(&mut weakened.said, true) {
            tracing::warn!(
                why,
                "the role may not call the function by which COMMIT checks that the open transaction is the pool's \
                 own; the pool uses a weaker check"
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
        assert_eq!((lacking.is_unmarked(ONE, true), lacking.check()), (false, Check::Prepared));
        lacking.set_unmarked(ONE, "no right");
        lacking.check_refused(Check::Full, "no right");
        lacking.check_refused(Check::Full, "two transactions met it");
        assert!(lacking.is_unmarked(ONE, true) && !lacking.is_unmarked(GenerationId(2), true));
        assert_eq!((lacking.why_unmarked(ONE), lacking.check()), (Some("no right".to_owned()), Check::Other));
        lacking.check_refused(Check::Other, "no right");
        assert_eq!(lacking.check(), Check::ByShow);
        tokio::time::advance(REFUSED_FOR).await;
        assert_eq!((lacking.is_unmarked(ONE, true), lacking.check()), (false, Check::Prepared));
        lacking.check_is_gone();
        tokio::time::advance(REFUSED_FOR).await;
        assert_eq!(lacking.check(), Check::Full);
        assert_eq!(lacking.why_unmarked(ONE), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_begin_that_failed_does_not_travel_for_a_while() {
        let lacking = Lacking::default();
        assert!(lacking.may_begin_travel(ONE));
        lacking.begin_does_not_travel(ONE);
        assert!(!lacking.may_begin_travel(ONE));
        tokio::time::advance(REFUSED_FOR).await;
        assert!(lacking.may_begin_travel(ONE));
        lacking.begin_does_not_travel(ONE);
        assert!(lacking.may_begin_travel(GenerationId(2)), "another primary");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_identified_later_is_marked_at_once() {
        let lacking = Lacking::default();
        lacking.set_unmarked(ONE, UNIDENTIFIED);
        assert!(lacking.is_unmarked(ONE, false));
        assert!(!lacking.is_unmarked(ONE, true), "it is identified now");
        assert_eq!(lacking.why_unmarked(ONE), None);
        lacking.set_unmarked(ONE, "no right");
        assert!(lacking.is_unmarked(ONE, true), "another reason");
    }
}
